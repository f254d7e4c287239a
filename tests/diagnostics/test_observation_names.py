"""Names of an observation's entries, by the env's own attribute, keys or joints."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_mbpo.diagnostics.observation_names import observation_names


class Robot(gym.Env):
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, observation_space=None, names=None):
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,))
        if names is not None:
            self.observation_names = names


def names(env: gym.Env) -> list[str]:
    return observation_names(DummyVecEnv([lambda: env]))


def test_given_names():
    assert names(gym.wrappers.TimeLimit(Robot(names=("arm", "grip")), 5)) == ["arm", "grip"]
    assert names(Robot(names=["arm"])) == names(Robot()) == ["obs 0", "obs 1"]
    # Something else of this name is no list of names.
    assert names(Robot(names=lambda: ["arm", "grip"])) == ["obs 0", "obs 1"]
    stacked = VecFrameStack(DummyVecEnv([lambda: Robot(names=["arm", "grip"])]), 2)
    assert observation_names(stacked) == ["obs 0", "obs 1", "obs 2", "obs 3"]


def test_keys_of_a_flattened_dict():
    """In the order in which Gymnasium flattens them."""
    space = spaces.Dict({"speed": spaces.Box(-1, 1, (2,)), "arm": spaces.Box(-1, 1, (1,)), "mode": spaces.Discrete(2)})
    env = gym.wrappers.FlattenObservation(Robot(space))
    found = names(gym.wrappers.TimeLimit(env, 5))
    sample = space.sample()
    flat = dict(zip(found, spaces.utils.flatten(space, sample), strict=True))
    assert flat["arm"] == sample["arm"][0] and [flat["speed 0"], flat["speed 1"]] == sample["speed"].tolist()
    assert flat[f"mode {sample['mode']}"] == 1


@pytest.mark.parametrize("task", ["InvertedPendulum-v5", "Hopper-v5", "Ant-v5", "Swimmer-v5", "Humanoid-v5"])
def test_joints_of_mujoco(task):
    """A name says which number of the simulator it is."""
    pytest.importorskip("mujoco")
    env = gym.make(task)
    obs, _ = env.reset(seed=0)
    data, found = env.unwrapped.data, names(env)
    assert len(set(found)) == len(obs)
    joints = {data.model.joint(i).name: data.model.joint(i) for i in range(data.model.njnt)}
    hinges = {name: joint for name, joint in joints.items() if joint.type[0] in (2, 3)}
    seen = 0
    for name, joint in hinges.items():
        if name in found:
            assert obs[found.index(name)] == data.qpos[joint.qposadr[0]]
            seen += 1
        assert obs[found.index(f"{name} velocity")] == pytest.approx(data.qvel[joint.dofadr[0]])
    assert seen > 0
    if "root" in joints:
        assert obs[found.index("root z")] == data.qpos[2] and obs[found.index("root rotation w")] == data.qpos[3]
        np.testing.assert_array_equal([obs[found.index(f"root {axis} velocity")] for axis in "xyz"], data.qvel[:3])
        assert obs[found.index("root rotation z velocity")] == data.qvel[5]


def test_keys_of_a_dict_that_is_not_flattened():
    parts = spaces.Dict({"b": spaces.Box(-1, 1, (2,)), "a": spaces.Box(-1, 1, (1,))})
    assert names(gym.wrappers.TimeLimit(Robot(parts), 5)) == names(gym.wrappers.FlattenObservation(Robot(parts)))


def test_tasks_that_do_not_say_what_they_observe():
    pytest.importorskip("mujoco")
    assert names(gym.make("Reacher-v5")) == [f"obs {i}" for i in range(10)]
