"""Mistakes in how envs, wrappers and callbacks are put together: each is named, with what to do instead."""

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO


def pendulum(n_envs=1):
    return DummyVecEnv([lambda: gym.make("Pendulum-v1")] * n_envs)


def frozen(env):
    return VecNormalize(env, training=False)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda env: VecFrameStack(VecNormalize(env), 2), r"Swap the two: VecNormalize\(VecFrameStack\(env, n_stack\)\)"),
        (lambda env: VecMonitor(VecFrameStack(VecMonitor(VecNormalize(env)), 2)), "VecFrameStack over VecNormalize"),
        (lambda env: VecNormalize(VecNormalize(env)), "a VecNormalize wraps another one"),
    ],
)
def test_wrappers_in_an_order_that_does_not_work(wrap, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MBPO("MlpPolicy", wrap(pendulum()), **FAST)
    agent = MBPO("MlpPolicy", pendulum(), **FAST)
    with pytest.raises(ValueError, match=message):
        agent.set_env(wrap(pendulum()))
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=message):
        MBPO.load(tmp_path / "agent", env=wrap(pendulum()))


@pytest.mark.parametrize("wrap", [lambda env: VecNormalize(VecFrameStack(env, 2)), lambda env: VecNormalize(frozen(env))])
def test_wrappers_in_an_order_that_works(wrap):
    MBPO("MlpPolicy", wrap(pendulum()), **FAST).learn(3)


@pytest.mark.parametrize("safe", [False, True])
def test_statistics_missing_at_load(tmp_path, safe, recwarn):
    MBPO("MlpPolicy", VecNormalize(pendulum()), **FAST).learn(3).save(tmp_path / "agent")
    MBPO.load(tmp_path / "agent", env=VecNormalize(pendulum()), safe=safe)
    agent = MBPO.load(tmp_path / "agent", safe=safe)
    assert len(recwarn) == 0
    for env in (pendulum(), VecNormalize(pendulum(), norm_obs=False)):
        with pytest.warns(UserWarning, match=r"this env does not normalize them.*VecNormalize\.load\(path, env\)") as caught:
            MBPO.load(tmp_path / "agent", env=env, safe=safe)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="this env does not normalize them"):
        agent.set_env(pendulum())


def test_an_agent_of_raw_observations_may_be_loaded_with_any_env(tmp_path):
    for env in (pendulum(), VecNormalize(pendulum(), norm_obs=False)):
        MBPO("MlpPolicy", env, **FAST).learn(3).save(tmp_path / "agent")
        MBPO.load(tmp_path / "agent", env=pendulum())


@pytest.mark.parametrize(
    "evaluation",
    [
        lambda env: EvalCallback(env),
        lambda env: [EvalCallback(VecMonitor(env))],
        lambda env: [EvalCallback(env.envs[0], callback_on_new_best=StopTrainingOnRewardThreshold(0))],
        lambda env: EvalCallback(DummyVecEnv([lambda: env.envs[1].unwrapped])),
    ],
)
# Of SB3, which compares the outermost classes.
@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_evaluation_in_the_training_env_is_refused(evaluation):
    env = pendulum(2)
    agent = MBPO("MlpPolicy", VecMonitor(env), **{**FAST, "gradient_steps": 4})
    with pytest.raises(ValueError, match=r"callback: EvalCallback evaluates in the training env.*second env"):
        agent.learn(3, callback=evaluation(env))


def test_evaluation_in_an_env_of_its_own():
    MBPO("MlpPolicy", gym.make("Pendulum-v1"), **FAST).learn(3, callback=EvalCallback(pendulum(), verbose=0))
