"""The command: which runs it makes, which it does not make again, what it says of those that fail."""

import csv
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sb3_mbpo.compare import workers
from sb3_mbpo.compare.run import Run, put

NEEDED = ("rl_zoo3", "rliable", "pandas", "matplotlib", "rich")
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
# Not importorskip: an import at collection would change Gymnasium for all tests.
pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason="needs sb3_mbpo[compare]")

OPTIONS = "--env Pendulum-v1 --algo mbpo sac sac:tau=1e-2 --seeds 2 --steps 40 --eval-freq 20 --eval-episodes 2 --folder out"
TINY = "learning_starts=20,batch_size=16,gradient_steps=1,policy_kwargs=dict(net_arch=[8]),buffer_size=1000"
IMAGINED = "rollout_batch_size=20,model_train_freq=20,dynamics_kwargs=dict(net_arch=[8],max_updates=2)"


@pytest.fixture
def compare(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from sb3_mbpo.compare import aggregates
    from sb3_mbpo.compare import cli as compare

    monkeypatch.setattr(aggregates, "REPETITIONS", 20)
    return compare


@pytest.fixture
def made(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Run]]:
    """Instead of training: the runs that were begun. One of TQC fails."""
    runs: list[Run] = []

    class Pretended(workers.LocalWorkers):
        def start(self, run: Run) -> None:
            self.active[str(run)] = run

        def collect(self) -> list[tuple[Run, str | None]]:
            assert self.count is None or len(self.active) <= self.count
            run = self.active.pop(next(iter(self.active)))
            runs.append(run)
            folder = self.root / run.folder
            run.begin(folder)
            pretend(run, folder)
            if run.algo == "tqc":
                (folder / "run.json").unlink()
                (folder / "output.txt").write_text("Traceback\nValueError: too bad")
            return [(run, workers.outcome(folder, 1))]

        def stop(self) -> None:
            self.active = {}

    monkeypatch.setattr(compare, "LocalWorkers", Pretended)
    yield runs


@pytest.fixture
def no_figures(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longest, and are the subject of test_plots.py."""

    def save(rows: Any, folder: Path, thresholds: Any) -> dict[str, Path]:
        pictures = {env: folder / f"{env}.png" for env in rows["env"].unique()}
        for picture in pictures.values():
            picture.touch()
        return pictures

    monkeypatch.setattr(compare.plots, "save_figures", save)


def pretend(run: Run, folder: Path) -> None:
    """The files of a finished run; the return is 100 seed + step + episode."""
    from sb3_mbpo.compare.evaluation import COLUMNS, PHASES

    with (folder / "evaluations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in run.evaluation_steps:
            for i in range(run.eval_episodes):
                values = [run.env, run.label, run.seed, step, i, 100 * run.seed + step + i, 200]
                writer.writerow([*values, *[step, *[1] * len(PHASES)] * 2])
    if run.algo == "mbpo":
        with (folder / "fits.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[20, "q_max", run.seed], [20, "updates", 7], [40, "updates", 8]])
    seconds = {**dict.fromkeys(PHASES, 1.0), "total": 9.0}
    about = {"versions": {"torch": "1"}, "hardware": {"cores": 2}, "commit": None, "finished": "2030-01-01"}
    times = {"seconds": seconds, "cpu_seconds": seconds}
    content = {"run": dataclasses.asdict(run), "settings": run.settings, **times, **about}
    put(folder / "run.json", json.dumps(content).encode())


def rows(path: str = "out/results.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def labelled(runs: list[Run]) -> list[tuple[str, int]]:
    return [(run.label, run.seed) for run in runs]


EVERYTHING = [("mbpo", 0), ("sac", 0), ("sac:tau=1e-2", 0), ("mbpo", 1), ("sac", 1), ("sac:tau=1e-2", 1)]


def test_every_algorithm_gets_every_seed_once(compare: ModuleType, made: list[Run], capsys: Any) -> None:
    compare.main([*OPTIONS.split(), "--workers", "2"])
    assert labelled(made) == EVERYTHING
    assert made[2] == Run("Pendulum-v1", "sac:tau=1e-2", "sac", {"tau": 0.01}, 0, 40, 20, 2)
    found = rows()
    # Tidy: by algorithm, seed, step, episode, each once.
    keys = [(row["algorithm"], int(row["seed"]), int(row["step"]), int(row["episode"])) for row in found]
    assert keys == [
        (label, seed, step, i)
        for label in ("mbpo", "sac", "sac:tau=1e-2")
        for seed in (0, 1)
        for step in (0, 20, 40)
        for i in (0, 1)
    ]
    assert {float(row["return"]) for row in found if row["seed"] == "1" and row["step"] == "40"} == {140, 141}
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["command"] == "sb3_mbpo compare " + OPTIONS + " --workers 2"
    assert manifest["arguments"]["baseline"] == "sac" and manifest["thresholds"] == {"Pendulum-v1": 90.5}
    assert manifest["versions"] == {"torch": "1"} and manifest["failed"] == [] and len(manifest["runs"]) == 6
    assert manifest["runs"][0]["cpu_seconds"]["total"] == 9.0
    # A row for each fit, a column for each number logged.
    assert rows("out/fits.csv") == [
        dict(zip(("env", "algorithm", "seed", "step", "q_max", "updates"), ("Pendulum-v1", "mbpo", *values), strict=True))
        for values in (("0", "20", "0.0", "7.0"), ("0", "40", "", "8.0"), ("1", "20", "1.0", "7.0"), ("1", "40", "", "8.0"))
    ]
    assert manifest["settings"]["Pendulum-v1"]["sac:tau=1e-2"] == {"tau": 0.01}
    files = {file.name for file in Path("out").iterdir()}
    pictures = {"Pendulum-v1.png", "Pendulum-v1.svg"}
    assert files == {"Pendulum-v1", "results.csv", "fits.csv", "manifest.json", "report.html", *pictures}
    output = capsys.readouterr().out
    assert "[6/6] Pendulum-v1, sac:tau=1e-2, seed 1: done" in output and "6 of 6 runs -> out/report.html" in output
    assert "| sac (2 seeds, baseline) |" in output


@pytest.mark.usefixtures("no_figures")
def test_finished_runs_are_skipped(compare: ModuleType, made: list[Run], capsys: Any) -> None:
    compare.main(OPTIONS.split())
    del made[:]
    before = rows()
    compare.main(OPTIONS.split())
    assert made == [] and rows() == before and "all 6 runs were finished before" in capsys.readouterr().out
    # One more seed, one more algorithm.
    compare.main(OPTIONS.replace("--seeds 2", "--seeds 3").replace("mbpo sac", "mbpo mbtqc sac").split())
    assert labelled(made) == [("mbtqc", 0), ("mbtqc", 1), ("mbpo", 2), ("mbtqc", 2), ("sac", 2), ("sac:tau=1e-2", 2)]
    assert len(rows()) == 4 * 3 * 3 * 2


@pytest.mark.usefixtures("no_figures")
def test_unfinished_run_starts_again(compare: ModuleType, made: list[Run]) -> None:
    compare.main(OPTIONS.split())
    del made[:]
    folder = Path("out/Pendulum-v1/sac/seed_1")
    (folder / "run.json").unlink()
    (folder / "left_over").touch()
    before = rows()
    compare.main(OPTIONS.split())
    assert labelled(made) == [("sac", 1)] and rows() == before and not (folder / "left_over").exists()


@pytest.mark.usefixtures("no_figures")
def test_other_arguments_want_another_folder(compare: ModuleType, made: list[Run]) -> None:
    compare.main(OPTIONS.split())
    del made[:]
    before = rows()
    with pytest.raises(SystemExit, match=r"steps=40, not 60.*choose another --folder"):
        compare.main(OPTIONS.replace("--steps 40", "--steps 60").split())
    assert made == [] and rows() == before


@pytest.mark.usefixtures("no_figures")
def test_failed_run_is_reported_and_tried_again(compare: ModuleType, made: list[Run], capsys: Any) -> None:
    options = OPTIONS.replace("sac:tau=1e-2", "tqc").split()
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            compare.main(options)
        assert caught.value.code == 1
        output = capsys.readouterr().out
        assert "tqc, seed 1: failed: exit code 1" in output and "    ValueError: too bad" in output
        assert "2 failed; the same command tries them again" in output and "4 of 6 runs ->" in output
        assert {row["algorithm"] for row in rows()} == {"mbpo", "sac"}
        assert json.loads(Path("out/manifest.json").read_text())["failed"] == [f"Pendulum-v1, tqc, seed {i}" for i in (0, 1)]
    assert [label for label, _ in labelled(made)].count("tqc") == 4 and len(made) == 8


def test_nothing_but_failures(compare: ModuleType, made: list[Run]) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main("--env Pendulum-v1 --algo tqc --seeds 1 --steps 40 --folder out".split())
    assert caught.value.code == 1 and not Path("out/results.csv").exists()


@pytest.mark.usefixtures("no_figures")
def test_several_envs(compare: ModuleType, made: list[Run]) -> None:
    options = "--env Pendulum-v1 MountainCarContinuous-v0 --algo mbpo --seeds 1 --steps 40 --threshold 10 20"
    compare.main(options.split())
    folder = Path("logs/compare/Pendulum-v1_MountainCarContinuous-v0")
    assert (folder / "MountainCarContinuous-v0.png").exists()
    assert {row["env"] for row in rows(str(folder / "results.csv"))} == {"Pendulum-v1", "MountainCarContinuous-v0"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["thresholds"] == {"Pendulum-v1": 10, "MountainCarContinuous-v0": 20}
    assert manifest["arguments"]["baseline"] is None and made[0].eval_freq == 2


@pytest.mark.usefixtures("no_figures")
def test_settings_files(compare: ModuleType, made: list[Run]) -> None:
    Path("mine.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 9}")
    compare.main(
        [*OPTIONS.split(), "--conf-file", "sac=mine.yml", "--env-kwargs", "g:1.0", "--device", "cpu", "--threads", "2"]
    )
    assert [run.conf_file for run in made[:3]] == [None, *[str(Path("mine.yml").resolve())] * 2]
    assert made[0].env_kwargs == ["g:1.0"] and made[0].device == "cpu" and made[0].threads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("mbpo sac", "mpbo sac"), "no algorithm 'mpbo' among .*; did you mean 'mbpo'"),
        (("mbpo sac", "sac sac"), "share a folder"),
        (("mbpo sac", "sac:ent_coef=a/b sac:ent_coef=a?b"), "share a folder"),
        (("Pendulum-v1", "Pendulum-v11"), "no environment 'Pendulum-v11'; did you mean 'Pendulum-v1'"),
        (("Pendulum-v1", "Pendulum-v1 Pendulum-v1"), "names an environment twice"),
        (("--steps 40", "--steps 40 --baseline tqc"), "--baseline tqc is not among"),
        (("--steps 40", "--steps 40 --threshold 1 2"), "--threshold needs a number for each of the 1"),
        (("--steps 40", "--steps 40 --conf-file tqc=a.yml"), "write ALGO=FILE"),
        (("--steps 40", "--steps 40 --conf-file a.yml"), "write ALGO=FILE"),
        (("--steps 40", "--steps 40 --conf-file sac=a.yml"), "--conf-file sac=a.yml cannot be read: .*No such file"),
        (("--steps 40", "--steps 40 --conf-file sac=a.module"), "--conf-file sac=a.module cannot be read: No module"),
        (("--steps 40", "--steps 40 --conf-file sac=text.yml"), "--conf-file sac=text.yml has no settings for Pendulum-v1"),
        (("--steps 40", "--steps 40 --conf-file sac=broken.yml"), "--conf-file sac=broken.yml cannot be read: while"),
        (("--steps 40", "--steps 40 --conf-file sac=other.py"), "--conf-file sac=other.py has no settings for Pendulum-v1"),
        (("--steps 40", "--steps 40 --conf-file mbpo=mbpo_full_obs.yml"), "obs.yml has no settings for Pendulum-v1"),
        (("--steps 40", "--steps 0"), "--steps must be at least 1"),
        (("--steps 40", "--steps 40 --workers 0"), "--workers must be at least 1"),
        (("--eval-freq 20", "--eval-freq -1"), "--eval-freq must be at least 1"),
        (("--seeds 2", "--seeds 0"), "--seeds must be at least 1"),
    ],
)
def test_what_no_run_would_survive_is_refused(
    compare: ModuleType, made: list[Run], capsys: Any, change: tuple[str, str], message: str
) -> None:
    for name, text in {"text.yml": "hello", "broken.yml": "a: [", "other.py": "hyperparams = {'default': {}}"}.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as caught:
        compare.main(OPTIONS.replace(*change).split())
    assert caught.value.code == 2 and re.search(message, capsys.readouterr().err) and made == []


@pytest.mark.parametrize(
    ("algorithms", "baseline"),
    [("mbpo sac:tau=1e-2 sac", "sac"), ("mbpo sac:tau=1e-2 sac:tau=1e-3", "sac:tau=1e-2"), ("mbpo tqc", None)],
)
def test_baseline(compare: ModuleType, algorithms: str, baseline: str | None) -> None:
    assert compare.parse(OPTIONS.replace("mbpo sac sac:tau=1e-2", algorithms).split()).baseline == baseline


@pytest.mark.usefixtures("no_figures")
def test_interrupt_keeps_what_is_finished(compare: ModuleType, made: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    collect, stop = compare.LocalWorkers.collect, compare.LocalWorkers.stop

    def interrupted(self: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        return collect(self)

    def stopping(self: Any) -> None:
        stopped.append(len(self.active))
        stop(self)

    monkeypatch.setattr(compare.LocalWorkers, "collect", interrupted)
    monkeypatch.setattr(compare.LocalWorkers, "stop", stopping)
    with pytest.raises(SystemExit, match="Finished runs are kept"):
        compare.main([*OPTIONS.split(), "--workers", "3"])
    assert stopped == [3]
    monkeypatch.setattr(compare.LocalWorkers, "collect", collect)
    compare.main(OPTIONS.split())
    assert labelled(made) == EVERYTHING


def command(folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"MPLBACKEND": "Agg", "MUJOCO_GL": "disable", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line = [sys.executable, "-m", "sb3_mbpo", "compare", *options]
    return subprocess.Popen(line, cwd=folder, env=os.environ | quiet | environment, **pipes)  # type: ignore[call-overload]


@pytest.mark.expensive
def test_real_runs(tmp_path: Path) -> None:
    options = ["--env", "Pendulum-v1", "--algo", f"mbpo:{TINY},{IMAGINED}", f"sac:{TINY}", "sac:no_such=1"]
    options += "--seeds 1 --steps 50 --eval-freq 25 --eval-episodes 1 --workers 2 --folder out".split()
    process = command(tmp_path, *options)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "TypeError" in output and "no_such" in output and "1 failed" in output and "2 of 3 runs" in output
    found = rows(str(tmp_path / "out" / "results.csv"))
    keys = [(row["algorithm"].partition(":")[0], row["seed"], row["step"]) for row in found]
    assert keys == [(algo, "0", step) for algo in ("mbpo", "sac") for step in ("0", "25", "50")]
    assert all(-2000 < float(row["return"]) < 0 for row in found)
    assert "data:image/png;base64" in (tmp_path / "out" / "report.html").read_text()


SLOW_ENV = """
import os, time
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

class Slow(PendulumEnv):
    # The first process to come here waits to be killed, after it has learned for a while.
    def step(self, action):
        if os.path.exists(os.environ["ARRIVED"]):
            return super().step(action)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > 300:
            with open(os.environ["ARRIVED"] + ".part", "w") as file:
                file.write(f"{os.getpid()} {os.getppid()}")
            os.rename(os.environ["ARRIVED"] + ".part", os.environ["ARRIVED"])
            time.sleep(600)
        return super().step(action)

gym.register("Slow-v0", Slow, max_episode_steps=100)
"""


def arrived(folder: Path, process: subprocess.Popen[str]) -> tuple[int, int]:
    """Wait for a run under way: ids of its process and of that process's parent."""
    (folder / "slow_env.py").write_text(SLOW_ENV)
    while not (folder / "arrived").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    own, parent = map(int, (folder / "arrived").read_text().split())
    return own, parent


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has waited for yet is dead.
    return " Z " not in Path(f"/proc/{pid}/stat").read_text() if Path("/proc").exists() else True


SLOW = "--env Slow-v0 --gym-packages slow_env --seeds 1 --steps 50 --eval-freq 25 --eval-episodes 2 --folder out"
SLOW += f" --algo sac:{TINY}"


@pytest.mark.expensive
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_runs_end_with_the_command(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "slow_env.py").write_text(SLOW_ENV)
    process = command(tmp_path, *SLOW.split(), ARRIVED=str(tmp_path / "arrived"))
    own, parent = arrived(tmp_path, process)
    assert parent == process.pid
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == (1 if how == signal.SIGINT else -9)
    assert ("Finished runs are kept" in output) == (how == signal.SIGINT)
    for _ in range(100):
        if not is_alive(own):
            break
        time.sleep(0.1)
    assert not is_alive(own)
    assert not list(tmp_path.glob("out/**/run.json"))


@pytest.mark.expensive
@pytest.mark.timeout(900)
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
@pytest.mark.parametrize("which", ["the run", "the worker of Ray"])
def test_killed_run_on_ray_is_tried_again(tmp_path: Path, which: str) -> None:
    (tmp_path / "slow_env.py").write_text(SLOW_ENV)
    options = SLOW.replace("--seeds 1", "--seeds 2").split()
    process = command(tmp_path, *options, "--ray-address", "local", "--workers", "2", ARRIVED=str(tmp_path / "arrived"))
    own, parent = arrived(tmp_path, process)
    os.kill(own if which == "the run" else parent, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "2 of 2 runs" in output
    keys = [(row["seed"], row["step"], row["episode"]) for row in rows(str(tmp_path / "out" / "results.csv"))]
    assert keys == [(seed, step, episode) for seed in "01" for step in ("0", "25", "50") for episode in "01"]
    # The run of the dead worker did not go on by itself.
    assert not is_alive(own)


@pytest.mark.expensive
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
def test_cluster_that_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are in another folder; they find the settings file all the same, and what they leave comes back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "mine.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 9, learning_starts: 7}")
    options = f"--env Pendulum-v1 --algo sac:{TINY.partition(',')[2]} --conf-file sac=mine.yml --seeds 2 --steps 20"
    options += " --eval-freq 10 --eval-episodes 1 --folder out --ray-address auto"
    # In a short path: the cluster has sockets there.
    with tempfile.TemporaryDirectory(prefix="ray") as elsewhere:
        start = f"start --head --block --node-ip-address 127.0.0.1 --port {port} --num-cpus 2 --temp-dir {elsewhere}"
        start += " --include-dashboard=false --disable-usage-stats"
        ray = [str(Path(sys.executable).with_name("ray")), *start.split()]
        # Whether or not this machine has a token of Ray's.
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with subprocess.Popen(ray, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
            try:
                assert head.stdout is not None and any("block forever" in line for line in head.stdout)
                process = command(tmp_path, *options.split(), RAY_ADDRESS=f"127.0.0.1:{port}")
                output, _ = process.communicate()
            finally:
                head.terminate()
                head.communicate()
    assert process.returncode == 0 and "2 of 2 runs" in output, output
    assert [row["seed"] for row in rows(str(tmp_path / "out" / "results.csv"))] == list("000111")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["Pendulum-v1"]
    assert [one["learning_starts"] for one in settings.values()] == [7]
