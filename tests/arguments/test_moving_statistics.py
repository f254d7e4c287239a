from functools import partial

import gymnasium as gym
import pytest
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics, TimeLimit
from gymnasium.wrappers.utils import RunningMeanStd
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.arguments.moving_statistics import moving_statistics


class CopiedRunningMeanStd(RunningMeanStd):
    pass


class OfMyOwn(gym.Wrapper):
    def __init__(self, env):
        super().__init__(env)
        self.statistics = CopiedRunningMeanStd()


class VecOfMyOwn(VecEnvWrapper):
    def __init__(self, venv):
        super().__init__(venv)
        self.statistics = RunningMeanStd()

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def plain(env):
    return TimeLimit(RecordEpisodeStatistics(env), 50)


def deep(wrapper, env):
    """In the middle of a stack."""
    return Monitor(TimeLimit(wrapper(RecordEpisodeStatistics(env)), 50))


def frozen(env):
    env = NormalizeReward(NormalizeObservation(env))
    env.update_running_mean = env.env.update_running_mean = False
    return env


def make(wrapper):
    return wrapper(gym.make("Pendulum-v1"))


def stacks(*wrappers, kind=DummyVecEnv):
    return kind([partial(make, wrapper) for wrapper in wrappers])


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("wrapper", [NormalizeReward, NormalizeObservation, OfMyOwn])
def test_found(wrapper, kind):
    """In the second of two envs, deep in it, in a worker as well."""
    envs = stacks(plain, partial(deep, wrapper), kind=kind)
    try:
        name = "a wrapper with RunningMeanStd" if wrapper is OfMyOwn else wrapper.__name__
        warning = moving_statistics(VecMonitor(envs))
        assert warning.startswith(f"env: {name} normalizes with") and "VecNormalize instead" in warning
    finally:
        envs.close()


@pytest.mark.parametrize("wrapper", [plain, frozen])
def test_not_found(wrapper):
    assert moving_statistics(stacks(wrapper)) is None


def test_around_all_envs():
    assert moving_statistics(VecNormalize(stacks(plain))) is None
    assert moving_statistics(VecNormalize(VecOfMyOwn(stacks(plain)))).startswith("env: VecOfMyOwn normalizes")
    assert moving_statistics(VecNormalize(stacks(NormalizeReward))) is not None


def test_an_agent_warns_at_construction_and_at_set_env(tmp_path):
    with pytest.warns(UserWarning, match="env: NormalizeReward normalizes") as caught:
        MBPO("MlpPolicy", NormalizeReward(gym.make("Pendulum-v1")), **FAST)
    assert len(caught) == 1 and caught[0].filename == __file__
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.warns(UserWarning, match="env: NormalizeReward normalizes") as caught:
        agent.set_env(NormalizeReward(gym.make("Pendulum-v1")))
    assert len(caught) == 1 and caught[0].filename == __file__
    agent.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="env: NormalizeReward normalizes") as caught:
        MBPO.load(tmp_path / "agent", env=NormalizeReward(gym.make("Pendulum-v1")))
    assert len(caught) == 1


def test_the_remedy_works():
    MBPO("MlpPolicy", VecNormalize(stacks(plain)), **FAST).learn(30)
