"""The callback: what it logs, when, and that it only looks."""

import copy
import random
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST, TruePendulum

from sb3_mbpo import MBPO, MBTD3, ModelErrorCallback, ResumeCallback
from sb3_mbpo.theory import optimal_rollout_length

SMALL = {"every": 20, "n_episodes": 1, "horizons": (1, 3), "max_episode_steps": 10}


class Lines(KVWriter):
    """What is logged, by step."""

    def __init__(self):
        self.lines = []

    def write(self, key_values, key_excluded, step=0):
        self.lines.append((step, {key: value for key, value in key_values.items() if key.startswith("model_error")}))

    def close(self):
        pass


def logged(agent, callback, steps):
    lines = Lines()
    agent.set_logger(Logger(None, [lines]))
    agent.learn(steps, callback=callback)
    return [(step, line) for step, line in lines.lines if "model_error/env_steps" in line]


def state_of(agent):
    """Every tensor, buffer and random stream."""
    parameters, buffer = agent.get_parameters(), agent.replay_buffer
    dist = getattr(agent.policy.actor, "action_dist", None)
    return {
        "parameters": parameters,
        "real": [getattr(buffer, name)[: buffer.size()] for name in ("observations", "actions", "rewards", "dones")],
        "imagined": buffer.model_buffer.contents()[0],
        "generators": [
            part.generator.get_state() for part in (agent.dynamics, agent.learned_reward, agent.learned_termination, buffer)
        ],
        "global": [th.get_rng_state(), np.random.get_state()[1:], random.getstate()[1]],
        "statistics": vars(agent.env.obs_rms) if isinstance(agent.env, VecNormalize) else None,
        "spaces": [agent.action_space.np_random.random(), agent.env.action_space.np_random.random()],
        "noise": getattr(dist, "exploration_mat", None),
        "counters": (agent.num_timesteps, agent._n_updates, agent._episode_num, agent.dynamics_fitted_at),
        "training": [module.training for module in agent.policy.modules()],
        # Without the infos: those of Monitor hold the time of day.
        "next": agent.env.step(np.zeros((agent.n_envs, 1), np.float32))[:3],
    }


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, th.Tensor):
        return th.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize(
    ("make", "env", "kwargs"),
    [
        (MBPO, lambda: make_vec_env("Pendulum-v1", seed=0), {}),
        (MBPO, lambda: make_vec_env("Pendulum-v1", seed=0), {"use_sde": True}),
        (MBTD3, lambda: make_vec_env("Pendulum-v1", seed=0), {}),
        (MBPO, lambda: VecNormalize(make_vec_env("InvertedPendulum-v5", 2, seed=0)), {"termination_fn": "learned"}),
    ],
)
def test_a_run_with_it_equals_one_without(make, env, kwargs):
    states = []
    for callback in (ModelErrorCallback(**SMALL), None):
        random.seed(0)
        states.append(state_of(make("MlpPolicy", env(), **FAST, **kwargs).learn(42, callback=callback)))
    assert same(*states)


def test_the_comparison_sees_a_difference():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(30)
    before = state_of(agent)
    after = copy.copy(before)
    after["imagined"] = before["imagined"] + 1e-6
    assert same(before, before) and not same(before, after)


def test_what_is_logged_and_when():
    callback = ModelErrorCallback(**SMALL)
    lines = logged(MBPO("MlpPolicy", "Pendulum-v1", **FAST), callback, 65)
    # The first fit comes after 21 steps.
    assert [step for step, _ in lines] == [21, 40, 60]
    expected = {
        f"{name}_{k}" for name in ("error", "r2_mean", "r2_no_change", "reward_error", "reward_r2_mean") for k in (1, 3)
    }
    expected |= {f"coverage_{n}_{k}" for n in (50, 90) for k in (1, 3)}
    expected |= {"disagreement_rank", "model_error_tv", "rollout_length", "dropped", "env_steps"}
    first, *later = ({key.partition("/")[2] for key in line if key.startswith("model_error/")} for _, line in lines)
    assert first == expected
    assert all(keys == expected | {"policy_shift_tv", "optimal_rollout_length"} for keys in later)
    assert [line["model_error/env_steps"] for _, line in lines] == [10, 20, 30]
    by_dimension = {key for key in lines[0][1] if key.startswith("model_error_by_dimension/")}
    assert by_dimension == {f"model_error_by_dimension/error_{k}_obs_{i:03d}" for k in (1, 3) for i in range(3)}
    last = lines[-1][1]
    k = optimal_rollout_length(
        policy_shift=last["model_error/policy_shift_tv"], model_error=last["model_error/model_error_tv"], gamma=0.99
    )
    assert last["model_error/optimal_rollout_length"] == k
    assert callback.diagnosis is not None and len(callback.diagnosis.episodes) == 1


def test_terminations_are_judged():
    _, line = logged(MBPO("MlpPolicy", "InvertedPendulum-v5", **FAST), ModelErrorCallback(**SMALL), 30)[0]
    assert 0 <= line["model_error/termination_recall"] <= 1


def test_dynamics_without_predict_and_a_deterministic_policy():
    kwargs = {**FAST, "dynamics_kwargs": {}}
    lines = logged(MBTD3("MlpPolicy", "Pendulum-v1", dynamics_class=TruePendulum, **kwargs), ModelErrorCallback(**SMALL), 45)
    for _, line in lines:
        assert line["model_error/r2_no_change_1"] > 1 - 1e-6 and line["model_error/error_3"] < 1e-4
        absent = ("disagreement_rank", "policy_shift_tv", "optimal_rollout_length", "coverage_90_1", "termination_recall")
        assert not {f"model_error/{name}" for name in absent} & line.keys()


def test_tensorboard_and_the_tables(tmp_path, capsys):
    """All dimensions would fill the screen."""
    callback = ModelErrorCallback(verbose=1, **SMALL)
    MBPO("MlpPolicy", "Pendulum-v1", verbose=1, tensorboard_log=str(tmp_path), **FAST).learn(30, callback=callback)
    shown = capsys.readouterr().out
    assert "model_error/" in shown and "by_dimension" not in shown
    assert "Dynamics after 21 steps: R^2 of one step compared with no change" in shown
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(next(tmp_path.iterdir()))).Reload()
    assert {"model_error/error_1", "model_error_by_dimension/error_3_obs_002"} <= set(events.Tags()["scalars"])


def test_resumed_it_goes_on_as_it_would_have(tmp_path):
    """Snapshots and counts included."""
    whole, second = ModelErrorCallback(**SMALL), ModelErrorCallback(**SMALL)
    expected = logged(MBPO("MlpPolicy", "Pendulum-v1", **FAST), whole, 65)
    saves = ResumeCallback(tmp_path / "saved", every=10)
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(45, callback=[ModelErrorCallback(**SMALL), saves])
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    resumed = logged(agent, [second, ResumeCallback(tmp_path / "saved", every=1000)], 65)
    assert [step for step, _ in resumed] == [60]
    assert same(resumed[-1], expected[-1])


def test_a_second_agent_is_looked_at_too():
    """And is not taken for the first one at an earlier time."""
    callback, fresh = ModelErrorCallback(**SMALL), ModelErrorCallback(**SMALL)
    logged(MBPO("MlpPolicy", "Pendulum-v1", **copy.deepcopy(FAST)), callback, 41)
    assert len(callback.snapshots) > 1
    lines = [logged(MBPO("MlpPolicy", "Pendulum-v1", **copy.deepcopy(FAST)), one, 25) for one in (callback, fresh)]
    assert [step for step, _ in lines[0]] == [step for step, _ in lines[1]] != []
    assert len(callback.snapshots) == len(fresh.snapshots)


def test_another_env_may_be_given():
    callback = ModelErrorCallback(lambda: gym.make("Pendulum-v1", g=1.0), **SMALL)
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(25, callback=callback)
    assert callback._own_env.get_attr("g") == [1.0]


@pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs sb3_mbpo[zoo]")
def test_in_the_settings_of_the_zoo(zoo):
    """Whose time limit is not Gymnasium's."""
    from rl_zoo3.utils import get_callback_list

    (callback,) = get_callback_list({"callback": [{"sb3_mbpo.ModelErrorCallback": SMALL}]})
    assert isinstance(callback, ModelErrorCallback)
    MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 1), **FAST).learn(25, callback=callback)
    assert callback.env_steps == 10


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, r"every=0 must be a whole number of at least 1"),
        ({"n_episodes": 1.5}, r"n_episodes=1.5 must be a whole number"),
        ({"max_episode_steps": True}, r"max_episode_steps=True must be"),
        ({"seed": -1}, r"seed=-1 must be"),
        ({"horizons": 5}, r"horizons=5 must be a list of numbers of steps, such as \[1, 5, 20\]"),
        ({"horizons": []}, r"horizons=\[\] must be"),
        ({"horizons": [0]}, r"horizons=\[0\] must be"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ModelErrorCallback(**kwargs)


def test_agents_of_others_and_agents_without_a_model():
    with pytest.raises(ValueError, match="ModelErrorCallback works with agents of sb3_mbpo, not with SAC"):
        SAC("MlpPolicy", "Pendulum-v1").learn(1, callback=ModelErrorCallback())
    with pytest.warns(UserWarning, match="no dynamics to measure, because real_ratio=1"):
        lines = logged(MBPO("MlpPolicy", "Pendulum-v1", real_ratio=1, **FAST), ModelErrorCallback(**SMALL), 30)
    assert lines == []
