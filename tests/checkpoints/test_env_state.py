import json

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_mbpo.checkpoints.env_state import CannotRestoreError, RestorableEnv, put_envs, take_envs

ids = pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5", "Ant-v5", "Humanoid-v5"])


def go_on_alike(make, n_envs=2, before=37, after=400):
    """Take the state of one env after some steps, put it into another, and step both: the same to the last bit."""
    first, second = make(1), make(2)
    rng = np.random.default_rng(0)
    low, high = first.action_space.low, first.action_space.high
    actions = rng.uniform(low, high, size=(before + after, n_envs, *low.shape)).astype(np.float32)
    first.reset()
    for action in actions[:before]:
        first.step(action)
    tensors = {}
    state = json.loads(json.dumps(take_envs(first, tensors, "envs"), allow_nan=False))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second.reset()
    put_envs(second, state, tensors)
    ends = 0
    for action in actions[before:]:
        (*ours, our_infos), (*theirs, their_infos) = first.step(action), second.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for a, b in zip(our_infos, their_infos, strict=True):
            assert [a.get("episode", {}).get(key) for key in "rl"] == [b.get("episode", {}).get(key) for key in "rl"]
            assert a["TimeLimit.truncated"] == b["TimeLimit.truncated"]
            ends += "episode" in a
    first.close(), second.close()
    return ends


@ids
def test_they_go_on_to_the_last_bit(env_id):
    if env_id.startswith("Mountain"):
        assert go_on_alike(lambda seed: make_vec_env(env_id, 2, seed=seed), after=1000) == 2
    else:
        # Episodes end, by falling or by time, and the next ones begin alike.
        assert go_on_alike(lambda seed: make_vec_env(env_id, 2, seed=seed), after=1000 if env_id == "Ant-v5" else 400) >= 2


@pytest.mark.parametrize(
    "wrap", [VecNormalize, lambda env: VecFrameStack(env, 3), lambda env: VecFrameStack(VecNormalize(env), 2)]
)
def test_wrappers_of_vectorised_envs(wrap):
    assert go_on_alike(lambda seed: wrap(make_vec_env("Pendulum-v1", 2, seed=seed))) >= 2


def test_gym_wrappers():
    def make(seed):
        env = make_vec_env("Pendulum-v1", 2, seed=seed, wrapper_class=gym.wrappers.NormalizeObservation)
        return env

    assert go_on_alike(make) >= 2


def test_before_the_first_reset():
    """A seed that waits for the first reset is not applied twice."""
    first, second = make_vec_env("Pendulum-v1", 2, seed=1), make_vec_env("Pendulum-v1", 2, seed=1)
    first.reset()
    tensors = {}
    state = take_envs(first, tensors, "envs")
    put_envs(second, state, tensors)
    assert np.array_equal(first.reset(), second.reset())


class Fickle(gym.Wrapper):
    """Holds something that cannot be taken out."""

    def __init__(self, env):
        super().__init__(env)
        self.secret = iter(range(10))


class OwnState(gym.Env):
    """Knows best how to save itself, and has what nobody else could save."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.position, self.handle = 0.0, iter(())

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform()
        return self._obs(), {}

    def step(self, action):
        self.position = 0.9 * self.position + float(action[0]) + self.np_random.normal()
        return self._obs(), -self.position, False, False, {}

    def _obs(self):
        return np.clip(np.array([self.position], dtype=np.float32), -9, 9)


def test_an_env_with_a_state_of_its_own():
    def make(seed):
        return make_vec_env(lambda: gym.wrappers.TimeLimit(OwnState(), 50), 2, seed=seed)

    # Noise and time limit are taken as well, which the env says nothing about.
    assert go_on_alike(make) >= 2


@pytest.mark.expensive
def test_other_processes():
    def make(seed):
        return make_vec_env("Hopper-v5", 2, seed=seed, vec_env_cls=SubprocVecEnv, wrapper_class=RestorableEnv)

    assert go_on_alike(make) >= 2


@pytest.mark.expensive
def test_other_processes_without_help():
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv)
    with pytest.raises(CannotRestoreError, match=r"SubprocVecEnv.*RestorableEnv"):
        take_envs(env, {}, "envs")
    env.close()


@pytest.mark.expensive
def test_processes_that_have_ended():
    """As by a signal to all of a group."""
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv, wrapper_class=RestorableEnv)
    env.reset()
    for process in env.processes:
        process.terminate()
        process.join()
    for _ in range(2):
        with pytest.raises(CannotRestoreError, match="their processes have ended"):
            take_envs(env, {}, "envs")


def test_what_cannot_be_taken_is_named():
    env = make_vec_env("Pendulum-v1", 1, wrapper_class=Fickle)
    with pytest.raises(CannotRestoreError, match=r"Fickle\.secret.*range_iterator"):
        take_envs(env, {}, "envs")


def test_a_library_in_c_is_not_trusted():
    pytest.importorskip("Box2D")
    env = make_vec_env("LunarLanderContinuous-v3", 1)
    env.reset()
    with pytest.raises(CannotRestoreError, match=r"LunarLander\.world"):
        take_envs(env, {}, "envs")


def test_another_number_of_wrappers():
    first, second = make_vec_env("Pendulum-v1", 1), make_vec_env("Pendulum-v1", 1, wrapper_class=gym.wrappers.ClipAction)
    tensors = {}
    state = take_envs(first, tensors, "envs")
    with pytest.raises(ValueError, match=r"has 5 wrappers.*has 6"):
        put_envs(second, state, tensors)
