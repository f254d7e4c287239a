"""The commands, as a user types them: each in a process of its own, on tiny budgets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Not importorskip: an import at collection would change Gymnasium for all tests.
pytestmark = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs rl_zoo3")

TINY = [
    *["learning_starts:20", "batch_size:16", "gradient_steps:1", "rollout_batch_size:20", "model_train_freq:20"],
    *["dynamics_kwargs:dict(net_arch=[8],max_updates=2)", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])"],
]
PENDULUM = ["--algo", "mbpo", "--env", "Pendulum-v1"]
TRAIN = ["train", *PENDULUM, "--seed", "0", "-n", "30", "--eval-episodes", "2"]
# No window, no hub.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "SDL_VIDEODRIVER": "dummy",
    "MUJOCO_GL": "disable",
    "HF_HUB_OFFLINE": "1",
}


def start(folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sb3_mbpo.zoo.cli", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | QUIET | environment, **pipes)  # type: ignore[call-overload]


def run(folder: Path, *options: str, **environment: str) -> str:
    """What the command prints; it must succeed."""
    process = start(folder, *options, **environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = ["--save-freq", "15", "--save-replay-buffer", "-tb", "tb"]
    run(folder, *TRAIN, "--vec-env", "subproc", *checkpoints, "-params", *TINY)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.mark.expensive
def test_train(trained: Path) -> None:
    folder = trained / "logs" / "mbpo" / "Pendulum-v1_1"
    names = {file.name for file in folder.iterdir()}
    checkpoints = {"rl_model_15_steps.zip", "rl_model_30_steps.zip"}
    assert {"Pendulum-v1.zip", "best_model.zip", "evaluations.npz", "replay_buffer.pkl", *checkpoints} <= names
    assert "-m sb3_mbpo.zoo.cli train --algo mbpo" in (folder / "Pendulum-v1" / "command.txt").read_text()
    assert (trained / "tb" / "Pendulum-v1" / "MBPO_1").is_dir()


@pytest.mark.expensive
@pytest.mark.parametrize(
    "which", [[], ["--load-best"], ["--load-checkpoint", "15"], ["--load-last-checkpoint"], ["-f", "logs"]]
)
def test_enjoy(trained: Path, which: list[str]) -> None:
    assert "Mean reward" in run(trained, "enjoy", *PENDULUM, "-n", "400", "--no-render", *which)


@pytest.mark.expensive
@pytest.mark.parametrize("algo", ["mbtd3", "mbtqc", "mbcrossq"])
def test_variants(algo: str, tmp_path: Path) -> None:
    options = ["--algo", algo, "--env", "InvertedPendulum-v5"]
    output = run(tmp_path, "train", *options, "-n", "30", "--eval-freq", "-1", "-params", *TINY)
    assert f"hyperparams/{algo}.yml" in output
    assert "Mean reward" in run(tmp_path, "enjoy", *options, "-n", "400", "--no-render")


@pytest.mark.expensive
def test_continue(copy: Path) -> None:
    agent = copy / "logs" / "mbpo" / "Pendulum-v1_1" / "Pendulum-v1.zip"
    output = run(copy, *TRAIN, "-i", str(agent), "--vec-env", "subproc", "-params", *TINY)
    assert "Loading replay buffer" in output
    steps = np.load(copy / "logs" / "mbpo" / "Pendulum-v1_2" / "evaluations.npz")["timesteps"]
    assert list(steps) == list(range(33, 61, 3))


@pytest.mark.expensive
def test_normalized_and_several_envs(tmp_path: Path) -> None:
    options = ["-params", "n_envs:2", "normalize:True", *TINY]
    run(tmp_path, *TRAIN, "--vec-env", "subproc", "--n-eval-envs", "2", *options)
    assert (tmp_path / "logs" / "mbpo" / "Pendulum-v1_1" / "Pendulum-v1" / "vecnormalize.pkl").is_file()
    run(tmp_path, "enjoy", *PENDULUM, "-n", "100", "--no-render", "--n-envs", "2")


@pytest.mark.expensive
@pytest.mark.timeout(1500)
def test_search_shared_by_two_processes(tmp_path: Path) -> None:
    study = ["--storage", "studies/demo.log", "--study-name", "demo"]
    fast = [item for item in TINY if not item.startswith(("batch_size", "gradient_steps"))]
    search = ["-optimize", "--max-total-trials", "3", "--n-startup-trials", "1", "--no-optim-plots", *study]
    processes = [start(tmp_path, *TRAIN, *search, "-params", *fast) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    code = f"""
import json
import optuna
from optuna.storages.journal import JournalFileBackend
study = optuna.load_study(study_name="demo", storage=optuna.storages.JournalStorage(JournalFileBackend({study[1]!r})))
trials = {{"COMPLETE": [], "PRUNED": []}}
for trial in study.trials:
    trials[trial.state.name].append(len(trial.intermediate_values))
print(json.dumps([trials, study.trials[0].params["rollout_schedule"]]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    trials, schedule = json.loads(result.stdout)
    # Two processes: any trial may be the one that ends first and that nothing can prune. It has ten evaluations.
    assert len(trials["COMPLETE"] + trials["PRUNED"]) == 3
    assert trials["COMPLETE"] and set(trials["COMPLETE"]) == {10} and max(trials["PRUNED"], default=0) < 10
    run(tmp_path, *TRAIN, *study, "--trial-id", "0", "--eval-freq", "-1", "-params", *fast)
    *_, folder = sorted((tmp_path / "logs" / "mbpo").glob("Pendulum-v1_?"))
    config = yaml.unsafe_load((folder / "Pendulum-v1" / "config.yml").read_text())
    assert config["rollout_schedule"] == schedule and config["n_timesteps"] == 2500


@pytest.mark.expensive
def test_checkpoints(tmp_path: Path) -> None:
    """SIGTERM ends a run with a code of its own; the same command goes on and ends where an undisturbed one ends."""
    command = [*TRAIN, "-n", "1500", "--eval-freq", "500", "--checkpoints"]
    process = start(tmp_path, *command, "saved", "-params", *TINY)
    while process.poll() is None and not list(tmp_path.glob("saved/*-step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 75 and "SIGTERM: saved in saved; the same command resumes the run" in output, output
    output = run(tmp_path, *command, "saved", "-params", *TINY)
    assert "Resumed at step" in output
    run(tmp_path, *command, "undisturbed", "-params", *TINY)
    steps = [np.load(tmp_path / f"logs/mbpo/Pendulum-v1_{i}/evaluations.npz") for i in (2, 3)]
    assert np.array_equal(steps[0]["timesteps"], steps[1]["timesteps"]) and len(steps[0]["timesteps"]) == 3
    assert np.array_equal(steps[0]["results"], steps[1]["results"])


@pytest.mark.expensive
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_of_a_run(tmp_path: Path, name: str) -> None:
    """As Ctrl-C in a terminal: it ends the envs' processes as well, and the code is that of a run that was saved."""
    command = [*TRAIN, "-n", "100000", "--vec-env", "subproc", "--checkpoints", "saved", "-params", *TINY, "n_envs:2"]
    process = start(tmp_path, *command)
    while process.poll() is None and not list(tmp_path.glob("saved/*-step-*")):
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, name))
    output, _ = process.communicate()
    assert process.returncode == 75 and f"{name}: saved in saved; the same command resumes the run" in output, output
    output = run(tmp_path, "train", *PENDULUM, "-n", "10", *command[command.index("--vec-env") :])
    assert "Resumed at step" in output and "start of an episode" in output


@pytest.mark.expensive
def test_checkpoints_of_other_algorithms(tmp_path: Path) -> None:
    process = start(tmp_path, "train", "--algo", "sac", "--env", "Pendulum-v1", "--checkpoints", "saved")
    output, _ = process.communicate()
    assert process.returncode == 1 and "--checkpoints works with mbpo, " in output


@pytest.mark.expensive
def test_plots(copy: Path) -> None:
    pytest.importorskip("seaborn")
    # The Zoo's plot_from_file leaves out what was run only once.
    runs = copy / "logs" / "mbpo"
    shutil.copytree(runs / "Pendulum-v1_1", runs / "Pendulum-v1_2")
    options = ["-a", "mbpo", "sac", "-e", "Pendulum-v1", "-f", "logs", "--no-display", "--no-million"]
    output = run(copy, "plot", *options, "-o", "results")
    assert "MBPO" in output and (copy / "results.pkl").is_file()
    run(copy, "plot_from_file", "-i", "results.pkl", "-o", "figure", "--format", "png", "--no-million", "--skip-timesteps")
    run(copy, "plot_train", "-a", "mbpo", "-e", "Pendulum-v1", "-f", "logs")


@pytest.mark.expensive
def test_record_video(copy: Path) -> None:
    pytest.importorskip("pygame")
    run(copy, "record_video", *PENDULUM, "-n", "20")
    assert [file.suffix for file in (copy / "logs" / "mbpo" / "Pendulum-v1_1" / "videos").glob("*.mp4")] == [".mp4"]


@pytest.mark.expensive
def test_benchmark(copy: Path) -> None:
    output = run(copy, "benchmark", "--log-dir", "logs", "--no-hub", "-n", "400", "--num-threads", "1")
    assert "Evaluating mbpo on Pendulum-v1" in output
    assert "|mbpo|Pendulum-v1|" in (copy / "benchmark.md").read_text().replace(" ", "")


@pytest.mark.expensive
@pytest.mark.parametrize("command", ["record_training", "load_from_hub", "push_to_hub", "plot_train"])
def test_help(command: str, tmp_path: Path) -> None:
    assert "usage: " in run(tmp_path, command, "--help")


def test_number_of_threads_is_the_users(tmp_path: Path) -> None:
    code = f"""
import os
from contextlib import ExitStack
from sb3_mbpo.zoo.cli import prepare
for options in ([], ["--num-threads", "3"], ["--num-threads", "-1"]):
    with ExitStack() as stack:
        prepare("train", [*{PENDULUM}, *options], stack)
        print(os.environ.get("OMP_NUM_THREADS"))
print(os.environ.get("OMP_NUM_THREADS"))
"""
    environment = {name: value for name, value in (os.environ | QUIET).items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["None", "3", "None", "None"], result.stderr


def test_without_the_zoo(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.modules['rl_zoo3'] = None; {}"
    for line, prefix in (
        ("runpy.run_module('sb3_mbpo.zoo.cli', run_name='__main__')", ""),
        ("import sb3_mbpo.zoo.cli", "ModuleNotFoundError: "),
    ):
        result = subprocess.run([sys.executable, "-c", code.format(line)], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1
        remedy = 'in the checkout of sb3_mbpo, pip install ".[zoo]"'
        assert result.stderr.splitlines()[-1] == f"{prefix}this command needs the RL Zoo: {remedy}"


def test_usage(zoo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        zoo.main(arguments)
        printed = capsys.readouterr().out
        assert all(command in printed for command in zoo.COMMANDS)
    with pytest.raises(SystemExit, match="no command 'trian'"):
        zoo.main(["trian"])


@pytest.mark.parametrize("command", ["train", "enjoy"])
def test_our_algorithms_are_choices(zoo: ModuleType, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    with pytest.raises(SystemExit):
        zoo.main([command, "--help"])
    printed = capsys.readouterr().out
    assert f"usage: sb3_mbpo {command}" in printed and "sac" in printed
    assert all(f"{name}" in printed for name in zoo.ALGORITHMS)
    assert ("--checkpoints FOLDER" in printed and "SIGUSR1" in printed) == (command == "train")
    assert sys.argv is before


@pytest.mark.parametrize(
    ("command", "script"),
    [
        (["python", "enjoy.py", "-n", "5"], "enjoy"),
        (["python", "-m", "rl_zoo3.record_video", "-n", "5"], "record_video"),
        (["ls", "-n", "5"], None),
    ],
)
def test_scripts_that_the_zoo_starts_know_us(zoo: ModuleType, command: list[str], script: str | None) -> None:
    seen: list[list[str]] = []

    def call(command: list[str], **kwargs: Any) -> int:
        seen.append(command)
        return 3

    assert zoo.call_ours(call, command) == 3
    assert seen == [command if script is None else [sys.executable, "-m", "sb3_mbpo.zoo.cli", script, "-n", "5"]]


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("enjoy", ["--algo=mbpo"], ["--algo=mbpo", "-f", "logs"]),
        ("record_video", ["--algo", "mbtqc"], ["--algo", "mbtqc", "-f", "logs"]),
        ("enjoy", ["--algo", "mbpo", "-f", "here"], ["--algo", "mbpo", "-f", "here"]),
        ("enjoy", ["--algo", "sac"], ["--algo", "sac"]),
        ("train", ["--algo", "mbpo", "--save-freq", "-1"], ["--algo", "mbpo", "--save-freq", "-1"]),
    ],
)
def test_agents_are_looked_for_where_train_puts_them(
    zoo: ModuleType, command: str, options: list[str], expected: list[str]
) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        assert zoo.prepare(command, options, stack) == expected
    assert {name: zoo.ALGOS[name] for name in zoo.ALGORITHMS} == zoo.ALGORITHMS


def test_missing_dm_control(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit,
        match=r"dm_control/cartpole-swingup-v0 needs .*: in the checkout of sb3_mbpo, pip install \"\.\[dm-control\]\"",
    ):
        zoo.main(["train", "--algo", "mbpo", "--env", "dm_control/cartpole-swingup-v0"])


def test_model_card_names_what_can_load_the_agent(zoo: ModuleType, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("```\npip install rl_zoo3\npython -m rl_zoo3.enjoy --algo mbpo\n```\n")
    saved: list[tuple[Path, dict[str, Any]]] = []
    zoo.save_card(lambda *arguments: saved.append(arguments), card, {"a": 1})
    install = '# in a checkout of sb3_mbpo\npip install ".[zoo]"'
    assert card.read_text() == f"```\n{install}\npython -m sb3_mbpo enjoy --algo mbpo\n```\n"
    assert saved == [(card, {"a": 1})]


FAKE_HUB = """
import huggingface_hub, pathlib, sys

class Hub:
    def create_repo(self, repo_id, **kwargs):
        return f"hub/{repo_id}"
    def snapshot_download(self, repo_id, local_dir):
        pathlib.Path(local_dir).mkdir(parents=True)
    def upload_folder(self, repo_id, folder_path, commit_message):
        print("uploaded", repo_id, sorted(file.name for file in pathlib.Path(folder_path).iterdir()))

huggingface_hub.HfApi = Hub
from sb3_mbpo.zoo.cli import main
main(["push_to_hub", "--algo", "mbpo", "--env", "Pendulum-v1", "-f", "logs", "-orga", "me", "--no-render", "-n", "20"])
"""


@pytest.mark.expensive
def test_push_to_hub(copy: Path) -> None:
    command = [sys.executable, "-c", FAKE_HUB]
    result = subprocess.run(command, cwd=copy, env=os.environ | QUIET, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "uploaded me/mbpo-Pendulum-v1" in result.stdout
    pushed = copy / "hub" / "mbpo-Pendulum-v1"
    assert "python -m sb3_mbpo enjoy --algo mbpo" in (pushed / "README.md").read_text()
    assert "rl_zoo3.enjoy" not in (pushed / "README.md").read_text()


@pytest.mark.expensive
def test_installed_copy_finds_its_settings(tmp_path: Path, wheel: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    output = run(tmp_path, *TRAIN, "-params", *TINY, PYTHONPATH=str(site))
    assert f"Loading hyperparameters from: {site / 'sb3_mbpo' / 'hyperparams' / 'mbpo.yml'}" in output
    script = site / "bin" / "sb3_mbpo"
    environment = os.environ | QUIET | {"PYTHONPATH": str(site)}
    result = subprocess.run([script, "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "COMMAND is a script of the Zoo" in result.stdout, result.stderr
