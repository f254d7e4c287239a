"""The Zoo's experiment in one process, on tiny budgets."""

import argparse
import inspect
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

# Not importorskip: an import at collection would change Gymnasium for all tests.
pytestmark = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs rl_zoo3")

TINY = [
    *["learning_starts:20", "batch_size:16", "gradient_steps:1", "rollout_batch_size:20", "model_train_freq:20"],
    *["dynamics_kwargs:dict(net_arch=[8],max_updates=2)", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"],
]

FLATTEN = "gymnasium.wrappers.FlattenObservation"


def train(zoo: ModuleType, *options: str, n: int = 30, tiny: list[str] = TINY, algo: str = "mbpo") -> None:
    run = ["train", "--algo", algo, "--seed", "0", "-n", str(n), "--eval-freq", "-1", "--log-interval", "-2"]
    params = ["-params", *tiny] if tiny else []
    zoo.main([*run, *options, *params])


def saved(algo: str, env: str, run: int = 1) -> tuple[Path, dict[str, Any]]:
    folder = Path("logs") / algo / f"{env}_{run}"
    return folder, yaml.unsafe_load((folder / env / "config.yml").read_text())


def test_our_settings_are_found(zoo: ModuleType) -> None:
    train(zoo, "--env", "Pendulum-v1")
    folder, config = saved("mbpo", "Pendulum-v1")
    # n_timesteps stands in our file only, learning_starts in both.
    assert config["n_timesteps"] == 2500 and config["learning_starts"] == 20
    agent = zoo.ALGORITHMS["mbpo"].load(folder / "Pendulum-v1.zip")
    assert agent.num_timesteps == 30 and agent.dynamics_fitted_at is not None
    assert agent.learning_starts == 20 and type(agent).__name__ == "MBPO"


def test_known_termination_is_known_in_the_zoo(zoo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    train(zoo, "--env", "Hopper-v5", n=5)
    assert "termination: known, Hopper-v5" in capsys.readouterr().out
    assert saved("mbpo", "Hopper-v5")[1]["rollout_schedule"]["end"] == 155_000


def test_settings_file(zoo: ModuleType, tmp_path: Path) -> None:
    from sb3_mbpo.zoo.experiment import settings_file

    for name in zoo.ALGORITHMS:
        assert settings_file(None, name) == str(zoo.hyperparams_folder() / f"{name}.yml")
    # The Zoo's own.
    assert settings_file(None, "sac") is None
    assert settings_file("mbpo_full_obs.yml", "sac") == str(zoo.hyperparams_folder() / "mbpo_full_obs.yml")
    assert settings_file("a.module", "mbpo") == "a.module"
    assert settings_file("mine.yml", "mbpo") == "mine.yml"
    Path("mbpo.yml").touch()
    assert settings_file("mbpo.yml", "mbpo") == "mbpo.yml"


def test_env_kwargs_of_the_file_reach_the_evaluation(zoo: ModuleType) -> None:
    train(zoo, "--env", "Ant-v5", "--eval-freq", "15", "--eval-episodes", "1", n=15)
    folder, config = saved("mbpo", "Ant-v5")
    agent = zoo.ALGORITHMS["mbpo"].load(folder / "best_model.zip")
    assert agent.observation_space.shape == (27,)
    args = yaml.unsafe_load((folder / "Ant-v5" / "args.yml").read_text())
    # Where record_video, push_to_hub and enjoy look for them.
    assert args["env_kwargs"] == {"include_cfrc_ext_in_observation": False} == config["env_kwargs"]


def test_short_runs_are_evaluated(zoo: ModuleType) -> None:
    train(zoo, "--env", "Pendulum-v1", "--eval-freq", "25000", "--eval-episodes", "1", n=20)
    folder, _ = saved("mbpo", "Pendulum-v1")
    assert list(np.load(folder / "evaluations.npz")["timesteps"]) == list(range(2, 21, 2))


def test_continued_run_goes_on(zoo: ModuleType, recwarn: pytest.WarningsRecorder) -> None:
    train(zoo, "--env", "Pendulum-v1", "--save-replay-buffer")
    first = saved("mbpo", "Pendulum-v1")[0]
    without_dynamics = [item for item in TINY if not item.startswith("dynamics_kwargs")]
    train(zoo, "--env", "Pendulum-v1", "-i", str(first / "Pendulum-v1.zip"), "--save-replay-buffer", tiny=without_dynamics)
    second = saved("mbpo", "Pendulum-v1", run=2)[0]
    agents = [zoo.ALGORITHMS["mbpo"].load(folder / "Pendulum-v1.zip") for folder in (first, second)]
    # An update after each of the steps 21 to 30, then after every step: no second warm-up.
    assert [agent._n_updates for agent in agents] == [10, 40]
    assert [agent.num_timesteps for agent in agents] == [30, 60]
    agents[1].load_replay_buffer(second / "replay_buffer.pkl")
    assert agents[1].replay_buffer.size() == 60


# What these few steps teach is not used.
@pytest.mark.filterwarnings("ignore:The dynamics was not used after 3 fits")
def test_continued_run_without_its_data_warms_up(zoo: ModuleType) -> None:
    train(zoo, "--env", "Pendulum-v1")
    first = saved("mbpo", "Pendulum-v1")[0]
    with pytest.warns(UserWarning, match="empty replay buffer"):
        train(zoo, "--env", "Pendulum-v1", "-i", str(first / "Pendulum-v1.zip"))
    agent = zoo.ALGORITHMS["mbpo"].load(saved("mbpo", "Pendulum-v1", run=2)[0] / "Pendulum-v1.zip")
    assert agent._n_updates == 20 and agent.lifetime_timesteps == 60


@pytest.mark.parametrize("trained", [False, True])
def test_misspelt_settings_are_refused(zoo: ModuleType, trained: bool) -> None:
    options = ["--env", "Pendulum-v1"]
    if trained:
        train(zoo, *options, n=5)
        options += ["-i", str(saved("mbpo", "Pendulum-v1")[0] / "Pendulum-v1.zip")]
    with pytest.raises(ValueError, match="mbpo has no setting 'real_ration'; did you mean 'real_ratio'"):
        train(zoo, *options, tiny=["real_ration:0.1"])


def test_a_refused_run_leaves_no_folder(zoo: ModuleType) -> None:
    with pytest.raises(ValueError, match="gamma"):
        train(zoo, "--env", "Pendulum-v1", tiny=["gamma:2"])
    assert not Path("logs").exists()


def test_a_run_refused_when_learning_begins_leaves_no_folder(zoo: ModuleType) -> None:
    options = ["--env", "Pendulum-v1", "--checkpoints", "saved"]
    train(zoo, *options, algo="mbtd3", n=2)
    with pytest.raises(ValueError, match="is a checkpoint of MBTD3, not of MBPO"):
        train(zoo, *options)
    assert not Path("logs", "mbpo").exists()


def test_a_refused_run_leaves_those_of_others(zoo: ModuleType) -> None:
    before = Path("logs", "mbpo", "Pendulum-v1_1")
    before.mkdir(parents=True)
    with pytest.raises(ValueError, match="gamma"):
        train(zoo, "--env", "Pendulum-v1", tiny=["gamma:2"])
    assert list(Path("logs", "mbpo").iterdir()) == [before]


def test_dynamics_kwargs_are_merged_with_the_files(zoo: ModuleType) -> None:
    settings = "{policy: MlpPolicy, n_timesteps: 100, dynamics_kwargs: 'dict(max_updates=1, patience=7)'}"
    Path("mine.yml").write_text(f"default: {settings}\n")
    train(zoo, "--env", "Pendulum-v1", "-conf", "mine.yml", n=2, tiny=["dynamics_kwargs:dict(net_arch=[8],max_updates=2)"])
    folder, config = saved("mbpo", "Pendulum-v1")
    agent = zoo.ALGORITHMS["mbpo"].load(folder / "Pendulum-v1.zip")
    assert agent.dynamics_kwargs == {"net_arch": [8], "max_updates": 2, "patience": 7} == config["dynamics_kwargs"]


@pytest.mark.parametrize(
    ("wrappers", "expected"),
    [
        (None, [FLATTEN]),
        (FLATTEN, FLATTEN),
        ("my.Wrapper", ["my.Wrapper", FLATTEN]),
        ([FLATTEN, {"my.Wrapper": {"a": 1}}], [FLATTEN, {"my.Wrapper": {"a": 1}}]),
        ([{"my.Wrapper": {"a": 1}}], [{"my.Wrapper": {"a": 1}}, FLATTEN]),
    ],
)
def test_flattened(zoo: ModuleType, wrappers: Any, expected: Any) -> None:
    from sb3_mbpo.zoo.experiment import flattened

    assert flattened(wrappers) == expected


# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
# dm_control and shimmy are an extra of their own, which not every installation has; the gate installs it.
@pytest.mark.skipif(find_spec("shimmy") is None or find_spec("dm_control") is None, reason="needs the extra dm-control")
def test_dm_control_is_flattened_whatever_the_file(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    Path("mine.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 100, termination_fn: never}\n")
    env = "dm_control/pendulum-swingup-v0"
    train(zoo, "--env", env, "-conf", "mine.yml", n=2)
    folder, config = saved("mbpo", "dm_control-pendulum-swingup-v0")
    assert zoo.ALGORITHMS["mbpo"].load(folder / "dm_control-pendulum-swingup-v0.zip").observation_space.shape == (3,)
    # Where enjoy finds it.
    assert config["env_wrapper"] == [FLATTEN]


def test_parallel_training_is_refused(zoo: ModuleType) -> None:
    with pytest.raises(ValueError, match="ParallelTrainCallback trains a copy of the agent"):
        train(zoo, "--env", "Pendulum-v1", tiny=["callback:rl_zoo3.callbacks.ParallelTrainCallback"])


def test_yaml_means_what_it_says(zoo: ModuleType) -> None:
    Path("mine.yml").write_text("""
default:
  n_timesteps: 1e2
  policy: MlpPolicy
  learning_rate: 1e-3
  learning_starts: 2e1
  buffer_size: 1e3
  model_buffer_size: None
  gradient_steps: 1
  rollout_batch_size: 20
  dynamics_kwargs: "dict(net_arch=[8], max_updates=2)"
  rollout_schedule: dict(min_length=1, max_length=2, start=1e1, end=3e1)
  rollout_filter: macura
  min_explained_variance: None
  normalize: true
""")
    train(zoo, "--env", "Pendulum-v1", "-conf", "mine.yml", n=30, tiny=[])
    folder, config = saved("mbpo", "Pendulum-v1")
    agent = zoo.ALGORITHMS["mbpo"].load(folder / "Pendulum-v1.zip")
    assert config["n_timesteps"] == 100 and agent.lr_schedule(1) == 1e-3
    assert agent.model_buffer_size is None and agent.dynamics_kwargs == {"net_arch": [8], "max_updates": 2}
    assert agent.rollout_schedule == {"min_length": 1, "max_length": 2, "start": 10, "end": 30}
    assert agent.rollout_filter == "macura" and len(agent.filter_state) == 2


def test_bare_words_stand_for_themselves(zoo: ModuleType) -> None:
    from sb3_mbpo.zoo.experiment import BareWords

    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=BareWords)
    pairs = [
        "a:learned",
        "b:my_tasks.reward",
        "c:'quoted'",
        "d:0.5",
        "e:None",
        "f:th.nn.ReLU",
        "g:dict(a=[1])",
        "h:th.nn.Nothing",
    ]
    read = parser.parse_args(["-params", *pairs]).params
    assert read.pop("f").__name__ == "ReLU"
    expected = {"a": "learned", "b": "my_tasks.reward", "c": "quoted", "d": 0.5, "e": None, "g": {"a": [1]}}
    assert read == {**expected, "h": "th.nn.Nothing"}
    with pytest.raises(SyntaxError):
        parser.parse_args(["-params", "a:dict(b=1"])


@pytest.mark.parametrize("name", ["mbpo", "mbtd3", "mbtqc", "mbcrossq"])
def test_search_space_is_one_of_the_algorithm(zoo: ModuleType, name: str) -> None:
    import optuna
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    zoo.register()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        kwargs = HYPERPARAMS_SAMPLER[name](trial, 3, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        assert set(kwargs) <= set(inspect.signature(zoo.ALGORITHMS[name]).parameters)
        assert HYPERPARAMS_CONVERTER[name](trial.params) == kwargs
        assert 128 <= kwargs["batch_size"] <= 512 and 0.97 <= kwargs["gamma"] < 1 and kwargs["gradient_steps"] >= 5
        assert -3 <= kwargs.get("target_entropy", -1) < 0
    settings = {"dynamics_kwargs": {"net_arch": [8], "max_updates": 2}, "policy_kwargs": {"net_arch": [8]}}
    small = {"rollout_batch_size": 20, "learning_starts": 18, "model_train_freq": 20}
    agent = zoo.ALGORITHMS[name]("MlpPolicy", "Pendulum-v1", **{**settings, **kwargs, **small}).learn(20)
    assert agent._n_updates == 2 * kwargs["gradient_steps"]


def test_trial_zero_is_a_trial(zoo: ModuleType) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER

    zoo.register()
    storage = optuna.storages.JournalStorage(JournalFileBackend("study.log"))
    study = optuna.create_study(storage=storage, study_name="s", direction="maximize")
    tried = []
    for value in (2.0, 1.0):
        trial = study.ask()
        tried.append(HYPERPARAMS_SAMPLER["mbpo"](trial, 1, 1, {}))
        study.tell(trial, value)
    fast = [item for item in TINY if not item.startswith(("batch_size", "gradient_steps"))]
    for number in (0, 1):
        study_options = ["--storage", "study.log", "--study-name", "s", "--trial-id", str(number)]
        train(zoo, "--env", "Pendulum-v1", *study_options, n=2, tiny=fast)
        _, config = saved("mbpo", "Pendulum-v1", run=number + 1)
        for key in ("gamma", "batch_size", "rollout_schedule", "gradient_steps", "target_entropy"):
            assert config[key] == tried[number][key]


def test_diverged_trials_are_pruned(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna
    import rl_zoo3.exp_manager

    from sb3_mbpo.zoo.experiment import Experiment

    experiment = Experiment.__new__(Experiment)
    experiment.ours = True
    monkeypatch.setattr(rl_zoo3.exp_manager.ExperimentManager, "objective", lambda self, trial: trial)
    assert experiment.objective(3.0) == 3.0  # type: ignore[arg-type]
    with pytest.raises(optuna.exceptions.TrialPruned):
        experiment.objective(float("nan"))  # type: ignore[arg-type]


def test_plain_algorithms_run_as_in_the_zoo(zoo: ModuleType) -> None:
    train(zoo, "--env", "Pendulum-v1", algo="sac", tiny=["learning_starts:20", "batch_size:16"])
    folder, config = saved("sac", "Pendulum-v1")
    assert config["n_timesteps"] == 20_000  # as in the Zoo's sac.yml
    train(zoo, "--env", "Pendulum-v1", "-i", str(folder / "Pendulum-v1.zip"), algo="sac", tiny=["learning_starts:20"])
    from stable_baselines3 import SAC

    assert SAC.load(saved("sac", "Pendulum-v1", run=2)[0] / "Pendulum-v1.zip").num_timesteps == 30
