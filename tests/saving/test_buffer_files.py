import io
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hostile import Payload
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from tiny import FAST

from sb3_mbpo import MBPO, MixedReplayBuffer
from sb3_mbpo.buffers.replay_buffer import ROWS


def make(env="Pendulum-v1", **kwargs):
    return MBPO("MlpPolicy", env, **{**FAST, **kwargs})


def same_rows(first, second):
    return all(th.equal(*pair) for pair in zip(first.real_transitions()[:5], second.real_transitions()[:5], strict=True))


@pytest.mark.parametrize("imagined", [False, True])
@pytest.mark.parametrize("name", ["buffer.pt", "buffer"])
def test_saved_and_loaded(tmp_path, imagined, name):
    agent, other = make().learn(60), make()
    agent.save_replay_buffer(tmp_path / name, imagined=imagined, safe=True)
    assert (tmp_path / "buffer.pt").stat().st_size < 15_000
    other.load_replay_buffer(tmp_path / name, safe=True)
    buffer = other.replay_buffer
    assert same_rows(agent.replay_buffer, buffer) and buffer.pos == 60 and not buffer.full
    assert len(buffer.model_buffer) == 30 * imagined
    if imagined:
        assert th.equal(buffer.model_buffer.contents()[0], agent.replay_buffer.model_buffer.contents()[0])
    other.learn(20)
    assert buffer.size() == 80


def test_the_suffix_is_enough(tmp_path):
    agent, other = make().learn(10), make()
    agent.save_replay_buffer(str(tmp_path / "buffer.pt"))
    for kwargs in ({}, {"safe": True}):
        other.replay_buffer.reset()
        other.load_replay_buffer(str(tmp_path / "buffer.pt"), **kwargs)
        assert same_rows(agent.replay_buffer, other.replay_buffer)


def test_open_files():
    agent, other, file = make().learn(10), make(), io.BytesIO()
    agent.save_replay_buffer(file, safe=True)
    for safe in (False, True):
        file.seek(0)
        other.load_replay_buffer(file, safe=safe)
        assert same_rows(agent.replay_buffer, other.replay_buffer) and not file.closed


@pytest.mark.parametrize("size", [25, 40, 100])
def test_a_full_buffer_in_one_of_another_size(tmp_path, size):
    agent, other = make(buffer_size=40).learn(60), make(buffer_size=size)
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    agent_rows, other_rows = (
        {tuple(row) for row in one.replay_buffer.real_transitions().next_observations.tolist()} for one in (agent, other)
    )
    assert len(other_rows) == min(size, 40) and other_rows <= agent_rows
    newest = (agent.replay_buffer.pos - 1) % 40
    assert tuple(agent.replay_buffer.next_observations[newest, 0].tolist()) in other_rows
    assert other.replay_buffer.buffer_size == size and other.learn(3).replay_buffer.size() == min(size, min(size, 40) + 3)


def test_several_envs_and_time_limits(tmp_path):
    agent = make(make_vec_env("Pendulum-v1", 2), gradient_steps=1).learn(420)
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    other = make(make_vec_env("Pendulum-v1", 2), gradient_steps=1)
    other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert agent.replay_buffer.timeouts.sum() == other.replay_buffer.timeouts.sum() == 2
    assert same_rows(agent.replay_buffer, other.replay_buffer)
    with pytest.raises(ValueError, match="observations has shape"):
        make().load_replay_buffer(tmp_path / "buffer.pt", safe=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "uint16", "int64"])
def test_observations_of_any_type(tmp_path, dtype):
    class Env(gym.Env):
        observation_space = spaces.Box(0, 100, (3,), dtype)
        action_space = spaces.Box(-1, 1, (1,))

        def reset(self, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    agent, other = make(Env(), real_ratio=1.0).learn(10), make(Env(), real_ratio=1.0)
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert np.array_equal(agent.replay_buffer.observations[:10], other.replay_buffer.observations[:10])
    assert other.replay_buffer.observations.dtype == dtype


def test_a_buffer_that_was_thrown_away(tmp_path):
    agent = make().learn(30)
    agent.save_replay_buffer(tmp_path / "buffer.pt", imagined=True)
    agent.replay_buffer = None
    with pytest.raises(FileNotFoundError):
        agent.load_replay_buffer(tmp_path / "other", safe=True)
    agent.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert isinstance(agent.replay_buffer, MixedReplayBuffer) and agent.replay_buffer.size() == 30


# ---------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("name", ["buffer.pkl", "buffer.pt", "buffer"])
def test_a_pickle_is_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    agent = make()
    with pytest.raises(ValueError, match=rf"load_replay_buffer: .*{name}: it is no replay buffer saved with safe=True"):
        agent.load_replay_buffer(tmp_path / name, safe=True)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(AssertionError):
        agent.load_replay_buffer(tmp_path / name)
    assert (tmp_path / "marker").exists(), "the payload is a real one"


def test_an_honest_pickle_is_not_opened_either(tmp_path):
    agent = SAC("MlpPolicy", "Pendulum-v1").learn(10)
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match="Load it with safe=False if you trust its author"):
        make().load_replay_buffer(tmp_path / "buffer.pkl", safe=True)


@pytest.fixture(scope="module")
def content():
    file = io.BytesIO()
    make().learn(40).save_replay_buffer(file, imagined=True, safe=True)
    return file.getvalue()


def changed(content, change):
    value = th.load(io.BytesIO(content), weights_only=True)
    value = change(value) or value
    file = io.BytesIO()
    th.save(value, file)
    file.seek(0)
    return file


def in_rows(name, tensor):
    return lambda value: value["rows"].update({name: tensor})


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [1, 2], "no replay buffer"),
        (lambda v: v.update(more=1), "no replay buffer"),
        (lambda v: {key: v[key] for key in v if key != "pos"}, "no replay buffer"),
        (lambda v: v.update(format=2), "format=2"),
        (lambda v: v.update(rows=[]), "rows must be"),
        (lambda v: v.update(rows={key: v["rows"][key] for key in ROWS[1:]}), "rows must be"),
        (in_rows("rewards", th.zeros(41, 1)), "rewards has 41 steps, but others have 40"),
        (in_rows("rewards", th.zeros(40, 2)), r"rewards has shape \(40, 2\)"),
        (in_rows("rewards", th.zeros(40, 1).double()), "rewards must be a tensor of torch.float32"),
        (in_rows("rewards", [0.0] * 40), "rewards must be a tensor"),
        (in_rows("rewards", th.zeros(40, 1).to_sparse()), "rewards must be a tensor"),
        (in_rows("observations", th.zeros(1, 1, 1).expand(10**9, 1, 3)), "observations must be a plain tensor"),
        (in_rows("observations", th.zeros(40, 1, 4)), "observations has shape"),
        (lambda v: v.update(pos=39), "do not go with 40 steps"),
        (lambda v: v.update(pos=-1), "do not go with"),
        (lambda v: v.update(pos=True), "do not go with"),
        (lambda v: v.update(full=True), "do not go with"),
        (lambda v: v.update(full=1), "must be true or false"),
        (lambda v: v.update(buffer_size=10), "do not go with"),
        (lambda v: v.update(imagined=th.zeros(30, 3)), "imagined must be"),
        (lambda v: v.update(refills=[31]), "refills must be"),
        (lambda v: v.update(refills=[-1, 31]), "refills must be"),
        (lambda v: v.update(refills=[10**12]), "refills must be"),
    ],
)
def test_hostile_buffers(content, change, message, safe):
    """Refused before anything of the agent's own buffer is touched."""
    agent = make().learn(5)
    before = agent.replay_buffer.observations[:5].copy()
    with pytest.raises(ValueError, match=f"^load_replay_buffer: .*{message}"):
        agent.load_replay_buffer(changed(content, change), safe=safe)
    assert agent.replay_buffer.size() == 5 and np.array_equal(agent.replay_buffer.observations[:5], before)


def test_a_declared_size_costs_nothing(content):
    agent = make()
    agent.load_replay_buffer(changed(content, lambda v: v.update(buffer_size=10**15)), safe=True)
    assert agent.replay_buffer.size() == 40 and agent.replay_buffer.buffer_size == make().replay_buffer.buffer_size


def test_cut_off_anywhere(content):
    for length in (0, 2, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match="load_replay_buffer: "):
            make().load_replay_buffer(io.BytesIO(content[:length]), safe=True)


def test_a_pickle_inside_the_zip(tmp_path, content):
    with pytest.raises(ValueError, match="something else than tensors"):
        make().load_replay_buffer(changed(content, lambda v: v.update(pos=Payload(tmp_path / "marker"))))
    assert not (tmp_path / "marker").exists()


def test_all_rows_are_there(content):
    assert set(th.load(io.BytesIO(content), weights_only=True)["rows"]) == set(ROWS)
