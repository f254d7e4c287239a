"""``dynamics_window`` and ``forget_transitions``: what the agent knows of a world that changes."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from test_buffers import filled, refill
from tiny import FAST, equal_agents

from sb3_mbpo import MBPO, MBTD3, DynamicsModel, ResumeCallback
from sb3_mbpo.model_based.model_learning import ROWS_AFTER_FORGETTING

SMALL = {**FAST, "gradient_steps": 1, "model_train_freq": 30}


class Remembers(DynamicsModel):
    """Keeps the transitions of every fit; imagines that nothing moves."""

    def __init__(self, obs_dim, action_dim, *, seed=None, device="cpu"):
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        self.fits = []

    def fit(self, transitions, progress=None):
        self.fits.append(transitions)
        return {}

    def sample(self, obs, actions):
        return obs, obs[:, 0]


def remembering(env="Pendulum-v1", **kwargs):
    return MBPO("MlpPolicy", env, **{**SMALL, "dynamics_class": Remembers, "dynamics_kwargs": None, **kwargs})


# ---------------------------------------------------------------------- the buffer


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n", [5, 66, 150, 330])
@pytest.mark.parametrize("asked", [1, 10, 61, 1000])
def test_newest_real_transitions(n, n_envs, asked):
    """In order, whole steps of all envs, also where the ring has gone round; all that there are, if there are no more."""
    buffer = filled(n, n_envs)
    steps = min(-(-asked // n_envs), n, 200 // n_envs)
    expected = [float(i) for i in range((n - steps) * n_envs + 1, n * n_envs + 1)]
    data = buffer.real_transitions(asked)
    assert sorted(data.rewards.flatten().tolist()) == expected
    assert steps == min(n, 200 // n_envs) or data.rewards.flatten().tolist() == expected
    th.testing.assert_close(data.next_observations, data.observations + 0.5)
    starts = buffer.start_states(4000, asked)
    assert set(starts[:, 0].tolist()) <= set(expected) and (steps > 10 or set(starts[:, 0].tolist()) == set(expected))


def test_start_states_of_all_draw_as_before():
    first, second = filled(150), filled(150)
    assert th.equal(first.start_states(50), second.start_states(50, newest=10_000))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n", [5, 66, 150, 330])
@pytest.mark.parametrize("keep", [0, 1, 10, 61, 1000])
def test_forget(n, n_envs, keep):
    buffer = filled(n, n_envs)
    refill(buffer)
    newest = buffer.newest(-(-keep // n_envs))
    buffer.forget(keep)
    assert buffer.size() == min(-(-keep // n_envs), n, 200 // n_envs) and len(buffer.model_buffer) == 0
    assert buffer.pos == buffer.size() % buffer.buffer_size and buffer.full == (buffer.size() == buffer.buffer_size)
    for part, kept in zip(buffer.newest(1000)[:5], newest[:5], strict=True):
        assert th.equal(part, kept)


def test_forget_keeps_time_limits():
    buffer = filled(3)
    one = np.ones((1, 3))
    buffer.add(one, one, np.ones((1, 2)), np.ones(1), np.ones(1), [{"TimeLimit.truncated": True}])
    buffer.forget(2)
    assert buffer.newest(5).dones.flatten().tolist() == [0, 1]
    assert buffer.real_transitions().dones.flatten().tolist() == [0, 0]


# ---------------------------------------------------------------------- dynamics_window


def test_window_is_what_the_model_knows():
    """Fit, bounds and start states are of the newest rows; batches' real rows are of all."""
    agent = remembering(dynamics_window=25, prediction_clip_margin=0.0).learn(90)
    assert [len(data.rewards) for data in agent.dynamics.fits] == [21, 25, 25, 25]
    newest = agent.replay_buffer.newest(25)
    assert th.equal(agent.dynamics.fits[-1].rewards, newest.rewards[:, 0])
    imagined = agent.replay_buffer.model_buffer.rows[agent.replay_buffer.model_buffer._places(th.arange(90, 120))]
    starts, known = imagined[:, :3], {tuple(row) for row in newest.observations[:, 0].tolist()}
    assert all(tuple(row) in known for row in starts.tolist())
    assert agent.replay_buffer.size() == 90


def test_window_with_several_envs_and_a_wrapped_buffer():
    settings = {"dynamics_window": 31, "buffer_size": 60, "model_train_freq": 45}
    agent = remembering(make_vec_env("Pendulum-v1", n_envs=3, seed=0), **settings).learn(180)
    assert agent.replay_buffer.full
    assert [len(data.rewards) for data in agent.dynamics.fits[1:]] == [33] * (len(agent.dynamics.fits) - 1)
    assert th.equal(agent.dynamics.fits[-1].observations, agent.replay_buffer.newest(11).observations.flatten(0, 1))


def test_window_after_prefill():
    given = MBPO("MlpPolicy", "Pendulum-v1", **SMALL, real_ratio=1).learn(200).replay_buffer
    agent = remembering(dynamics_window=100)
    agent.prefill(given)
    agent.learn(25)
    first = agent.dynamics.fits[0]
    assert len(first.rewards) == 100
    th.testing.assert_close(first.rewards[:79], given.newest(79).rewards[:, 0])


@pytest.mark.parametrize("window", [0, 2.5, "many", True, 9])
def test_window_that_is_none(window):
    with pytest.raises(ValueError, match=r"dynamics_window=.* must be .*at least 1"):
        MBPO("MlpPolicy", "Pendulum-v1", **FAST, dynamics_window=window)


def test_window_is_read_saved_and_loaded(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST, dynamics_window="5e2")
    assert agent.dynamics_window == 500
    agent.save(tmp_path / "agent")
    assert all(MBPO.load(tmp_path / "agent", safe=safe).dynamics_window == 500 for safe in (False, True))
    assert MBPO.load(tmp_path / "agent", dynamics_window=None).dynamics_window is None


@pytest.mark.parametrize(("window", "retained"), [(None, 4), (25, 1), (31, 2), (500, 4)])
def test_imagined_transitions_of_fits_before_the_window_leave(window, retained):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **SMALL, dynamics_window=window)
    assert agent.replay_buffer.model_buffer.refills.maxlen == retained


# ---------------------------------------------------------------------- forget_transitions


def test_what_leaves_and_what_stays():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **SMALL, rollout_schedule="auto").learn(60)
    before, counters = agent.get_parameters(), (agent.num_timesteps, agent._n_updates, agent.lifetime_timesteps)
    agent.auto_rollout_length, agent.imagined_fraction, agent.filter_state = 7, 0.3, [1.0, 2.0]
    assert agent.explained_at_fit
    agent.forget_transitions(keep=4)
    assert agent.replay_buffer.size() == 4 and len(agent.replay_buffer.model_buffer) == 0
    assert (agent.auto_rollout_length, agent.imagined_fraction, agent.filter_state) == (1, 1.0, [])
    assert agent.explained_at_fit == []
    assert (agent.num_timesteps, agent._n_updates, agent.lifetime_timesteps) == counters
    after = agent.get_parameters()
    assert all(th.equal(before[part][key], after[part][key]) for part in ("policy", "dynamics") for key in before[part])


@pytest.mark.parametrize("learning_starts", [20, 500])
def test_what_happens_next(learning_starts):
    """No update until there are enough rows; then a fit to these alone, imagined rows, and updates at every step."""
    agent = remembering(learning_starts=learning_starts, model_train_freq=1000).learn(learning_starts + 10)
    begun, updates = agent.num_timesteps, agent._n_updates
    agent.forget_transitions()
    needed = min(learning_starts, ROWS_AFTER_FORGETTING)
    seen = []

    def note(local, _):
        seen.append((agent.num_timesteps - begun, agent._n_updates - updates, len(agent.dynamics.fits)))
        return True

    agent.learn(needed + 5, callback=note, reset_num_timesteps=False)
    # Noted before the updates of the same step.
    assert seen == [(i, max(0, i - needed), 1 + (i > needed)) for i in range(1, needed + 6)]
    assert th.equal(agent.dynamics.fits[-1].rewards, agent.replay_buffer.newest(1000).rewards[:needed, 0])
    assert len(agent.replay_buffer.model_buffer) == 30 and agent._n_updates == updates + 6


def test_rows_that_are_kept_count():
    agent = remembering().learn(40)
    agent.forget_transitions(keep=20)
    agent.learn(1, reset_num_timesteps=False)
    assert len(agent.dynamics.fits[-1].rewards) == 21 and agent._n_updates == 21


@pytest.mark.parametrize("cls", [MBPO, MBTD3])
def test_without_a_model(cls):
    agent = cls("MlpPolicy", "Pendulum-v1", **{**SMALL, "real_ratio": 1}).learn(40)
    agent.forget_transitions()
    updates = agent._n_updates
    assert agent.learn(19, reset_num_timesteps=False)._n_updates == updates
    assert agent.learn(2, reset_num_timesteps=False)._n_updates == updates + 2


def test_a_buffer_too_small_for_the_dynamics_does_not_wait_forever():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = MBPO("MlpPolicy", "Pendulum-v1", **SMALL, buffer_size=5).learn(30)
        agent.forget_transitions()
        assert agent.learn(10, reset_num_timesteps=False)._n_updates > 10


class Forgets(BaseCallback):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.num_timesteps == self.at:
            self.model.forget_transitions()
        return True


def test_in_a_callback():
    """The transition of this very step comes after it."""
    agent = remembering().learn(70, callback=Forgets(41))
    assert agent.replay_buffer.size() == 30
    assert [len(data.rewards) for data in agent.dynamics.fits] == [21, 30, 20]


def test_saved_while_it_waits(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(40)
    agent.forget_transitions()
    agent.learn(10, reset_num_timesteps=False)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    for safe in (False, True):
        loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), safe=safe)
        loaded.load_replay_buffer(tmp_path / "buffer.pt")
        assert loaded.waits_for_transitions and loaded.forgot_transitions and loaded.lifetime_timesteps == 50
        updates = loaded._n_updates
        assert loaded.learn(9, reset_num_timesteps=False)._n_updates == updates
        assert loaded.learn(3, reset_num_timesteps=False)._n_updates == updates + 3
    assert not hasattr(agent.to_sac(), "forgot_transitions")


@pytest.mark.parametrize("cut", [30, 45, 52, 58])
def test_resumed_run_is_the_uncut_one(tmp_path, cut):
    """Cut before it forgets, while it waits, at the fit, and after it."""
    settings = {**SMALL, "dynamics_window": 25}

    def run(total, *callbacks):
        return MBPO("MlpPolicy", gym.make("Pendulum-v1"), **settings).learn(total, callback=[Forgets(40), *callbacks])

    whole = run(70)
    run(cut, ResumeCallback(tmp_path / "run"))
    resumed = run(70, ResumeCallback(tmp_path / "run"))
    assert equal_agents(whole, resumed)
    rows = zip(whole.replay_buffer.newest(100)[:5], resumed.replay_buffer.newest(100)[:5], strict=True)
    assert all(th.equal(*pair) for pair in rows) and whole.dynamics_fitted_at == resumed.dynamics_fitted_at


@pytest.mark.parametrize("keep", [-1, 2.5, True, "all"])
def test_keep_that_is_no_count(keep):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match=r"forget_transitions: keep=.* must be a whole number of at least 0"):
        agent.forget_transitions(keep)


def test_a_wrong_reward_fn_is_said_again():
    agent = remembering(reward_fn=lambda obs, actions, next_obs: obs[:, 0] + 5)
    with pytest.warns(UserWarning, match="reward_fn disagrees"):
        agent.learn(25)
    agent.forget_transitions()
    with pytest.warns(UserWarning, match="reward_fn disagrees"):
        agent.learn(25, reset_num_timesteps=False)


def test_the_fast_update_still_covers_the_agent():
    """It looks whether train() is overridden, and ModelBased overrides it to wait."""
    assert MBPO("MlpPolicy", "Pendulum-v1", **FAST, fast_update=True)._is_fast()
