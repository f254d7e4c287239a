"""Evaluations of a run through the Zoo: at the same steps for all, and without a trace in the training."""

import csv
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
# Not importorskip: an import at collection would change Gymnasium for all tests.
pytestmark = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs rl_zoo3")

TINY = [
    *["learning_starts:20", "batch_size:16", "gradient_steps:1", "rollout_batch_size:20", "model_train_freq:20"],
    *["dynamics_kwargs:dict(net_arch=[8],max_updates=2)", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"],
    "min_explained_variance:None",
]
OURS = ("rollout_batch_size", "model_train_freq", "dynamics_kwargs", "min_explained_variance")
PLAIN = [item for item in TINY if item.split(":")[0] not in OURS]


def run(
    zoo: ModuleType, algo: str, due: list[int], steps: int, params: list[str], episodes: int = 1, **options: Any
) -> tuple[Any, list[dict[str, str]]]:
    from sb3_mbpo.compare.evaluation import ComparisonExperiment, EvaluationRecorder

    recorder = EvaluationRecorder(Path("e.csv"), {"env": "Pendulum-v1", "algorithm": algo, "seed": 3}, due, episodes)
    arguments = ["--algo", algo, "--env", "Pendulum-v1", "--seed", "3", "-n", str(steps), "--eval-freq", "-1"]
    zoo.main(["train", *arguments, "-params", *params], experiment=partial(ComparisonExperiment, recorder=recorder))
    with open("e.csv", newline="") as file:
        return recorder, list(csv.DictReader(file))


@pytest.mark.parametrize(("algo", "params"), [("mbpo", TINY), ("sac", PLAIN)])
def test_rows(zoo: ModuleType, algo: str, params: list[str]) -> None:
    recorder, rows = run(zoo, algo, [0, 25, 40], 40, [*params, "tau:1e-2"], episodes=2)
    assert [(int(row["step"]), int(row["episode"])) for row in rows] == [(s, i) for s in (0, 25, 40) for i in (0, 1)]
    assert all((row["env"], row["algorithm"], row["seed"], row["length"]) == ("Pendulum-v1", algo, "3", "200") for row in rows)
    assert all(-2000 < float(row["return"]) < 0 for row in rows)
    assert recorder.due == []
    phases = [f"{phase}_seconds" for phase in ("env_and_policy", "updates", "fits", "rollouts")]
    for row in rows:
        # To the rounding of five numbers.
        assert float(row["seconds"]) == pytest.approx(sum(float(row[phase]) for phase in phases), abs=0.003)
        of_cpu = sum(float(row[phase.replace("seconds", "cpu_seconds")]) for phase in phases)
        assert float(row["cpu_seconds"]) == pytest.approx(of_cpu, abs=0.003)
    assert [float(row["seconds"]) for row in rows] == sorted(float(row["seconds"]) for row in rows)
    assert float(rows[0]["seconds"]) == 0 < float(rows[0]["evaluation_seconds"]) < float(rows[-1]["evaluation_seconds"])
    assert (float(rows[-1]["fits_seconds"]) > 0) == (algo == "mbpo") and float(rows[-1]["updates_seconds"]) > 0
    # The settings are those used: of the options, and of the file. The number of steps is the comparison's.
    assert recorder.settings["tau"] == 0.01 and recorder.settings["learning_starts"] == 20
    assert recorder.settings["policy"] == "MlpPolicy" and "n_timesteps" not in recorder.settings


def test_phases_are_told_apart(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase takes time of its own on a clock that stands still otherwise, and twice as much on that of the CPU."""
    import sb3_mbpo.compare.evaluation as experiment
    from sb3_mbpo import MBPO
    from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
    from sb3_mbpo.model_based import model_learning

    now = [0.0]

    def taking(seconds: float, call: Any) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return call(*args, **kwargs)

        return slow

    for module in (experiment, model_learning):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(module.time, "process_time", lambda: 2 * now[0])
    monkeypatch.setattr(MBPO, "train", taking(1, MBPO.train))
    monkeypatch.setattr(MBPO, "_store_transition", taking(0.125, MBPO._store_transition))
    monkeypatch.setattr(ProbabilisticEnsemble, "fit", taking(100, ProbabilisticEnsemble.fit))
    monkeypatch.setattr(model_learning, "branched_rollout", taking(1000, model_learning.branched_rollout))
    monkeypatch.setattr(experiment, "evaluate_policy", taking(10_000, experiment.evaluate_policy))
    recorder, rows = run(zoo, "mbpo", [0, 30, 64], 64, TINY)
    # Updates after steps 21 to 64; fits after 21, 40 and 60. SB3's callbacks come before a step's transition is stored.
    expected = {"env_and_policy": 8, "updates": 44, "fits": 300, "rollouts": 3000, "evaluation": 30_000}
    assert recorder.seconds == expected
    assert recorder.cpu_seconds == {phase: 2 * seconds for phase, seconds in expected.items()}
    at_30 = {key: float(value) for key, value in rows[1].items() if key.endswith("seconds")}
    seconds = {
        "seconds": 29 * 0.125 + 9 + 1100,
        "env_and_policy_seconds": 29 * 0.125,
        "updates_seconds": 9,
        "fits_seconds": 100,
        "rollouts_seconds": 1000,
        "evaluation_seconds": 20_000,
    }
    assert at_30 == {**seconds, **{key.replace("seconds", "cpu_seconds"): 2 * value for key, value in seconds.items()}}


def test_what_is_logged_at_a_fit_is_recorded_before_another_callback_writes_it_out(zoo: ModuleType) -> None:
    look = "dict(every=20,n_episodes=1,max_episode_steps=5)"
    recorder, _ = run(zoo, "mbpo", [0], 45, [*TINY, f"callback:[{{'sb3_mbpo.ModelErrorCallback':{look}}}]"])
    with open("fits.csv", newline="") as file:
        fits = {(step, name): float(value) for step, name, value in csv.reader(file)}
    assert {step for step, _ in fits} == {"21", "40"} and fits["40", "updates"] == 2
    assert recorder.seconds["fits"] > 0


def test_a_fit_without_a_rollout_has_none_of_its_numbers(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fit explains nothing; the log is not written out before it, and still holds the first rollout's numbers."""
    shares = iter([1.0, 0.0])
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.imagined_fraction", lambda *args: next(shares))
    recorder, _ = run(zoo, "mbpo", [0], 45, TINY)
    with open("fits.csv", newline="") as file:
        fits = {(step, name): float(value) for step, name, value in csv.reader(file)}
    assert ("40", "updates") in fits and ("40", "rollout_length") not in fits
    assert recorder.seconds["rollouts"] == pytest.approx(fits["21", "rollout_seconds"], rel=1e-4)


@pytest.mark.parametrize(("algo", "params"), [("mbpo", TINY), ("sac", PLAIN)])
def test_training_is_the_same_without(zoo: ModuleType, algo: str, params: list[str]) -> None:
    run(zoo, algo, [0, 15, 45, 60], 60, params)
    zoo.main(["train", *f"--algo {algo} --env Pendulum-v1 --seed 3 -n 60 --eval-freq -1".split(), "-params", *params])
    loaded = [zoo.ALGOS[algo].load(f"logs/{algo}/Pendulum-v1_{i}/Pendulum-v1.zip").policy.state_dict() for i in (1, 2)]
    assert all(np.array_equal(loaded[0][key], loaded[1][key]) for key in loaded[0])


def test_evaluation_episodes_start_alike_for_all(zoo: ModuleType) -> None:
    # All random: agents of other settings, whose policies do not act the same.
    starts = []
    for params in (PLAIN, [*PLAIN, "gamma:0.9"]):
        recorder, _ = run(zoo, "sac", [0], 1, params)
        starts.append(recorder.eval_env.reset())
    assert np.array_equal(starts[0], starts[1])
    training = recorder.model.env
    training.seed(3)
    assert not np.array_equal(training.reset(), starts[0])


def test_several_envs_and_normalisation(zoo: ModuleType) -> None:
    recorder, rows = run(zoo, "sac", [0, 5, 10], 10, [*PLAIN, "n_envs:2", "normalize:True"])
    assert [int(row["step"]) for row in rows] == [0, 5, 10]
    assert recorder.eval_env.norm_reward is False and recorder.eval_env.training is False
    assert np.allclose(recorder.eval_env.obs_rms.mean, recorder.training_env.obs_rms.mean, atol=0.3)
    # Raw rewards: normalised ones would be far smaller.
    assert all(float(row["return"]) < -500 for row in rows)
