import copy
import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mbpo.buffers.normalization import normalize_obs, normalize_rewards
from sb3_mbpo.buffers.replay_buffer import ROWS, MixedReplayBuffer, balanced_ratio

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACT = spaces.Box(-2, 2, (2,), np.float32)


def imagined(values: list[int]) -> ReplayBufferSamples:
    """Transitions whose every number tells their origin: -1 - value."""
    column = -1.0 - th.tensor(values, dtype=th.float32).unsqueeze(1)
    return ReplayBufferSamples(column.repeat(1, 3), column.repeat(1, 2), column.repeat(1, 3), th.zeros_like(column), column)


def add(buffer: MixedReplayBuffer, first: int) -> None:
    """One step of all envs, numbered from ``first`` up."""
    n_envs = buffer.n_envs
    value = np.arange(float(first), first + n_envs)
    wide = value.reshape(-1, 1)
    buffer.add(wide.repeat(3, 1), wide.repeat(3, 1) + 0.5, wide.repeat(2, 1), value, np.zeros(n_envs), [{}] * n_envs)


def filled(n: int = 40, n_envs: int = 1, **kwargs) -> MixedReplayBuffer:
    """Real transitions numbered from 1 up."""
    buffer = MixedReplayBuffer(200, OBS, ACT, device="cpu", n_envs=n_envs, seed=0, **kwargs)
    for i in range(n):
        add(buffer, 1 + i * n_envs)
    return buffer


def refill(buffer: MixedReplayBuffer, n: int = 30) -> None:
    buffer.model_buffer.begin_refill()
    buffer.model_buffer.add(imagined(list(range(n))))


# ---------------------------------------------------------------------- mixing


@pytest.mark.parametrize(
    ("ratio", "batch_size", "real"),
    [(0.05, 256, 12), (0.5, 7, 3), (0.0, 256, 0), (0.001, 256, 0), (1.0, 256, 256), (0.999, 10, 9), (0.05, 1, 0)],
)
def test_shares(ratio, batch_size, real):
    buffer = filled(real_ratio=ratio)
    refill(buffer)
    batch = buffer.sample(batch_size)
    assert len(batch.observations) == batch_size and buffer.real_rows(batch_size) == real
    assert (batch.observations[:real] > 0).all() and (batch.observations[real:] < 0).all()
    assert [tuple(part.shape) for part in batch[:5]] == [(batch_size, n) for n in (3, 2, 3, 1, 1)]
    assert batch.discounts is None


def test_all_real_while_nothing_is_imagined():
    buffer = filled(real_ratio=0.0)
    assert (buffer.sample(64).observations > 0).all()
    buffer.model_buffer.begin_refill()
    assert (buffer.sample(64).observations > 0).all()


@pytest.mark.parametrize("n_envs", [1, 3])
def test_real_ratio_one_is_sb3s_buffer(n_envs):
    """Same draws from the same global stream, same dtypes, whatever is imagined."""
    mixed = filled(20, n_envs, real_ratio=1.0)
    plain = ReplayBuffer(200, OBS, ACT, device="cpu", n_envs=n_envs)
    plain.__dict__.update({key: value for key, value in mixed.__dict__.items() if key in plain.__dict__})
    refill(mixed)
    batches = []
    for buffer in (mixed, plain):
        np.random.seed(3)
        batches.append(buffer.sample(50))
    assert all(th.equal(a, b) and a.dtype == b.dtype for a, b in zip(batches[0][:5], batches[1][:5], strict=True))


def test_the_real_share_follows_the_global_stream_the_imagined_its_own():
    buffer = filled()
    refill(buffer)
    np.random.seed(0)
    first = buffer.sample(256)
    np.random.seed(0)
    second = buffer.sample(256)
    assert th.equal(first.rewards[:12], second.rewards[:12]) and not th.equal(first.rewards[12:], second.rewards[12:])


@pytest.mark.parametrize(("ratio", "real"), [(0.05, 3), (0.0, 0), (1.0, 64)])
def test_many_batches_at_once(ratio, real, monkeypatch):
    """Each is as ``sample`` gives it, none repeats another, and a block that is too small for all of them is no limit."""
    monkeypatch.setattr("sb3_mbpo.buffers.replay_buffer.BLOCK_NUMBERS", 3 * 64 * 10)
    buffer = filled(100, 2, real_ratio=ratio)
    refill(buffer)
    batches = list(buffer.batches(7, 64))
    assert len(batches) == 7
    for batch in batches:
        assert [tuple(part.shape) for part in batch[:5]] == [(64, n) for n in (3, 2, 3, 1, 1)]
        assert (batch.observations[:real] > 0).all() and (batch.observations[real:] < 0).all()
    assert len({tuple(batch.rewards.flatten().tolist()) for batch in batches}) == 7
    # All fields of a row belong together.
    rows = {tuple(row) for row in th.cat(list(buffer.real_transitions()[:5]), dim=1).tolist()}
    rows |= {tuple(row) for row in buffer.model_buffer.sample(5000, buffer.generator).tolist()}
    assert all(tuple(row) in rows for batch in batches for row in th.cat([part.float() for part in batch[:5]], dim=1).tolist())


def make_vec_normalize() -> VecNormalize:
    import gymnasium as gym

    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=1.5, clip_reward=0.7)
    env.seed(0)
    env.reset()
    for _ in range(50):
        env.step(np.ones((1, 1), np.float32))
    return env


@pytest.mark.parametrize(("norm_obs", "norm_reward"), [(True, True), (True, False), (False, True), (False, False)])
def test_normalised_as_vec_normalize_does(norm_obs, norm_reward):
    env = make_vec_normalize()
    env.norm_obs, env.norm_reward = norm_obs, norm_reward
    obs, rewards = np.random.default_rng(0).normal(size=(20, 3)) * 3, np.random.default_rng(1).normal(size=20) * 9
    obs, rewards = obs.astype(np.float32), rewards.astype(np.float32)
    np.testing.assert_allclose(normalize_obs(th.as_tensor(obs), env), env.normalize_obs(obs), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalize_rewards(th.as_tensor(rewards), env), env.normalize_reward(rewards), rtol=1e-5)
    assert th.equal(normalize_obs(th.as_tensor(obs), None), th.as_tensor(obs))


def test_both_kinds_are_stored_raw_and_sampled_normalised():
    env = make_vec_normalize()
    buffer = MixedReplayBuffer(100, env.observation_space, env.action_space, device="cpu", real_ratio=0.5, seed=0)
    raw = np.array([[0.3, -0.2, 1.0]], np.float32)
    buffer.add(raw, raw * 2, np.zeros((1, 1)), np.array([-3.0]), np.zeros(1), [{}])
    buffer.model_buffer.begin_refill()
    buffer.model_buffer.add(buffer.real_transitions())
    batch = buffer.sample(10, env=env)
    for part in batch[:5]:
        th.testing.assert_close(part[:5], part[5:])
    np.testing.assert_allclose(batch.observations[0], env.normalize_obs(raw)[0], rtol=1e-5)
    for several in buffer.batches(3, 10, env):
        th.testing.assert_close(several.observations, batch.observations)
        th.testing.assert_close(several.rewards, batch.rewards)
    # Statistics as they are when sampling, not when storing.
    env.obs_rms.mean += 1
    np.testing.assert_allclose(buffer.sample(10, env=env).observations[-1], env.normalize_obs(raw)[0], rtol=1e-5)


# ---------------------------------------------------------------------- what the dynamics sees


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n", [5, 300])
def test_real_transitions(n, n_envs):
    """All of them, once, also after the ring has turned over."""
    buffer = filled(n, n_envs)
    data = buffer.real_transitions()
    total = min(n, 200 // n_envs) * n_envs
    numbers = sorted(data.rewards.flatten().tolist())
    assert numbers == [float(i) for i in range(n * n_envs - total + 1, n * n_envs + 1)]
    assert all(part.dtype == th.float32 for part in data[:5])
    th.testing.assert_close(data.next_observations, data.observations + 0.5)
    th.testing.assert_close(data.observations[:, :1], data.rewards)
    th.testing.assert_close(data.actions[:, :1], data.rewards)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("n", [30, 200, 430])
@pytest.mark.parametrize("asked", [1, 40, 1000])
def test_newest(n, n_envs, asked):
    """In order of time and of envs, also where the ring has gone round; no more than there are."""
    buffer = filled(n, n_envs)
    steps = buffer.newest(asked)
    there = min(asked, n, 200 // n_envs)
    expected = 1 + np.arange(n * n_envs).reshape(n, n_envs)[n - there :]
    assert [tuple(part.shape) for part in steps[:5]] == [(there, n_envs, width) for width in (3, 2, 3, 1, 1)]
    np.testing.assert_array_equal(steps.observations[:, :, 2], expected)
    np.testing.assert_array_equal(steps.next_observations[:, :, 0], expected + 0.5)
    np.testing.assert_array_equal(steps.rewards[:, :, 0], expected)
    assert steps.observations.dtype == th.float32


def test_newest_knows_time_limits():
    buffer = filled(2)
    one = np.ones((1, 3))
    buffer.add(one, one, np.ones((1, 2)), np.ones(1), np.ones(1), [{"TimeLimit.truncated": True}])
    assert buffer.newest(2).dones.flatten().tolist() == [0, 1]


def test_time_limits_are_no_terminations():
    buffer = MixedReplayBuffer(10, OBS, ACT, device="cpu", seed=0)
    zeros = np.zeros((1, 3))
    for done, info in [(1, {}), (1, {"TimeLimit.truncated": True}), (0, {})]:
        buffer.add(zeros, zeros, np.zeros((1, 2)), np.zeros(1), np.array([done]), [info])
    assert buffer.real_transitions().dones.flatten().tolist() == [1, 0, 0]


def test_start_states_are_uniform_over_all_envs():
    buffer = filled(10, n_envs=3)
    starts = buffer.start_states(60_000)
    assert starts.shape == (60_000, 3) and starts.dtype == th.float32
    counts = starts[:, 0].int().bincount(minlength=31)[1:]
    assert ((counts > 1800) & (counts < 2200)).all()


# ---------------------------------------------------------------------- persistence


def rows_of(buffer: MixedReplayBuffer) -> list[th.Tensor]:
    return [*buffer.real_transitions()[:5], buffer.model_buffer.contents()[0]]


@pytest.mark.parametrize("n", [40, 230])
@pytest.mark.parametrize("again", [lambda buffer: pickle.loads(pickle.dumps(buffer)), copy.deepcopy])
def test_a_copy_goes_on_as_the_original(n, again):
    """The same rows and draws, half full and after the ring has turned over; and no storage is shared."""
    buffer = filled(n)
    refill(buffer, 50)
    refill(buffer, 20)
    other = again(buffer)
    for _ in range(2):
        assert all(th.equal(a, b) for a, b in zip(rows_of(buffer), rows_of(other), strict=True))
        assert list(buffer.model_buffer.refills) == list(other.model_buffer.refills)
        batches = []
        for one in (buffer, other):
            np.random.seed(0)
            batches.append(one.sample(64))
            add(one, 1000)
            refill(one, 70)
        assert all(th.equal(a, b) for a, b in zip(batches[0][:5], batches[1][:5], strict=True))
    assert other.observations.shape == buffer.observations.shape and other.pos == buffer.pos
    size = other.size()
    buffer.reset()
    assert other.size() == size and len(other.model_buffer) == 210


def test_a_pickle_is_as_large_as_what_is_filled():
    small, large = (len(pickle.dumps(MixedReplayBuffer(size, OBS, ACT, device="cpu", seed=0))) for size in (10, 1_000_000))
    assert large - small < 100
    buffer = filled(40)
    assert len(pickle.dumps(buffer)) < small + 40 * 100 + 500


def test_time_limits_are_noted_even_where_sac_takes_them_for_ends():
    """SB3's batches and mixed ones have them as dones; what models learn from has not."""
    mixed, plain = (
        kind(50, OBS, ACT, device="cpu", handle_timeout_termination=False) for kind in (MixedReplayBuffer, ReplayBuffer)
    )
    for i in range(40):
        value = np.full(1, float(i + 1))
        row = (value.repeat(3), value.repeat(3) + 0.5, value.repeat(2), value, np.array([i % 4 == 3]))
        infos = [{"TimeLimit.truncated": i % 8 == 7}]
        mixed.add(*row, infos)
        plain.add(*row, infos)
    batches = []
    for buffer in (mixed, plain):
        np.random.seed(0)
        batches.append(buffer.sample(200))
    assert all(th.equal(one, other) for one, other in zip(batches[0][:5], batches[1][:5], strict=True))
    assert {float(reward) % 8 for reward in batches[0].rewards[batches[0].dones > 0]} == {0.0, 4.0}
    real = mixed.real_transitions()
    assert real.rewards[real.dones > 0].tolist() == [4, 12, 20, 28, 36]
    mixed.real_ratio = 0.5
    refill(mixed)
    batch = mixed.sample(200)
    ends = batch.rewards[:100][batch.dones[:100] > 0]
    assert {float(reward) % 8 for reward in ends} == {0.0, 4.0}
    again = pickle.loads(pickle.dumps(mixed))
    assert th.equal(again.real_transitions().dones, real.dones) and not again.handle_timeout_termination


def test_insert_is_add_many_times():
    """Also over the end of the ring, more rows than there is room for, and several envs."""
    rng = np.random.default_rng(0)
    for sizes in ([7, 20, 60], [150], [1, 66, 67, 68], [200, 400]):
        one, other = (MixedReplayBuffer(200, OBS, ACT, device="cpu", n_envs=3, seed=0) for _ in range(2))
        for n in sizes:
            rows = {name: rng.normal(size=(n, *getattr(one, name).shape[1:])) for name in ROWS}
            rows["timeouts"] = rng.random((n, 3)) < 0.1
            one.insert(rows)
            for i in range(n):
                values = [rows[name][i] for name in ("observations", "next_observations", "actions", "rewards", "dones")]
                other.add(*values, [{"TimeLimit.truncated": bool(late)} for late in rows["timeouts"][i]])
        assert (one.pos, one.full) == (other.pos, other.full)
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ROWS)


def test_takes_over_a_mixed_buffer_with_what_it_imagined():
    """As far as the limits of the one that takes over go."""
    theirs, ours = filled(40), filled(5, retained_rollouts=2, model_buffer_size=60)
    for n in (10, 20, 50):
        refill(theirs, n)
    refill(ours, 5)
    ours.adopt(theirs)
    assert ours.size() == 40 and list(ours.model_buffer.refills) == [10, 50]


def test_takes_over_a_plain_buffer():
    plain = ReplayBuffer(50, OBS, ACT, device="cpu")
    plain.add(np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 2)), np.ones(1), np.zeros(1), [{}])
    mixed = MixedReplayBuffer(200, OBS, ACT, device="cpu", real_ratio=0.5, seed=0)
    refill(mixed)
    mixed.adopt(plain)
    assert len(mixed.model_buffer) == 0
    refill(mixed)
    assert (mixed.sample(10).observations > 0).all(dim=1).sum() == 5 and mixed.size() == 1


@pytest.mark.parametrize(
    ("space", "kwargs", "name"),
    [
        (spaces.Box(-1, 1, (4,)), {}, "obs_shape"),
        (OBS, {"n_envs": 2}, "n_envs"),
        (OBS, {"optimize_memory_usage": True, "handle_timeout_termination": False}, "optimize_memory_usage"),
    ],
)
def test_does_not_take_over_what_does_not_fit(space, kwargs, name):
    buffer = filled()
    with pytest.raises(ValueError, match=f"this replay buffer has {name}="):
        buffer.adopt(ReplayBuffer(50, space, ACT, device="cpu", **kwargs))
    assert buffer.size() == 40


def test_reset_forgets_both_kinds():
    buffer = filled()
    refill(buffer)
    buffer.reset()
    assert buffer.size() == 0 and len(buffer.model_buffer) == 0


def test_shares_are_not_cut_by_rounding():
    buffer = filled(real_ratio=0.29)
    refill(buffer)
    assert buffer.real_rows(100) == 29


@pytest.mark.parametrize(("updates", "share"), [(20, 0.05), (40, 0.05), (10, 0.1), (5, 0.2), (2, 0.5), (1, 0.5), (0.25, 0.5)])
def test_a_balanced_ratio_draws_a_real_row_as_often_as_one_update_does(updates, share):
    assert balanced_ratio(updates) == pytest.approx(share)
    # Real rows drawn for each env transition, in batches.
    assert not 2 <= updates <= 20 or updates * balanced_ratio(updates) == pytest.approx(1)
