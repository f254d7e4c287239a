import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.runtime import threads
from sb3_mbpo.runtime.threads import chosen, one_thread_by_default

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of four cores, on which nothing is chosen and PyTorch takes four threads."""
    for name in (*threads.VARIABLES, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    before = th.get_num_threads()
    th.set_num_threads(4)
    yield
    th.set_num_threads(before)


class Look(BaseCallback):
    """Notes the number of threads at each step, and fails at one of them if asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at, self.seen = fail_at, set[int]()

    def _on_step(self) -> bool:
        self.seen.add(th.get_num_threads())
        if self.n_calls == self.fail_at:
            raise KeyError("mine")
        return True


def agent(**settings: Any) -> MBPO:
    return MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "model_train_freq": 25, **settings})


def test_one_thread_within_learn_and_as_many_as_before_afterwards():
    look = Look()
    agent().learn(30, look)
    assert look.seen == {1} and th.get_num_threads() == 4


def test_as_many_as_before_after_an_error():
    look = Look(fail_at=22)
    with pytest.raises(KeyError, match="mine"):
        agent().learn(30, look)
    assert look.seen == {1} and th.get_num_threads() == 4


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_a_variable_of_the_user_is_respected(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    look = Look()
    agent().learn(25, look)
    assert look.seen == {4} and th.get_num_threads() == 4


def test_a_number_that_is_not_the_default_is_respected():
    th.set_num_threads(3)
    look = Look()
    agent().learn(25, look)
    assert look.seen == {3} and th.get_num_threads() == 3


@pytest.mark.parametrize(("smt", "expected"), [("1\n", 1), ("0\n", 2), (None, 1)])
def test_half_the_cores_are_a_default_only_with_hyper_threading(smt, expected, monkeypatch, tmp_path):
    file = tmp_path / "active"
    if smt is not None:
        file.write_text(smt)
    monkeypatch.setattr(threads, "HYPER_THREADING", file)
    th.set_num_threads(2)
    with one_thread_by_default():
        assert th.get_num_threads() == expected
    assert th.get_num_threads() == 2


def test_a_number_set_within_is_kept():
    with one_thread_by_default():
        th.set_num_threads(3)
    assert th.get_num_threads() == 3


def test_nested():
    with one_thread_by_default():
        with one_thread_by_default():
            pass
        assert th.get_num_threads() == 1
    assert th.get_num_threads() == 4


def test_nothing_is_touched_with_the_model_off():
    look = Look()
    agent(real_ratio=1).learn(25, look)
    assert look.seen == {4}


def test_chosen_is_undone(monkeypatch):
    with chosen(4), one_thread_by_default():
        assert th.get_num_threads() == 4
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(KeyError), chosen(4):
        raise KeyError
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_one_line_says_what_runs(monkeypatch, capsys):
    model = agent(verbose=1)
    model.learn(5)
    model.learn(5)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU threads")]
    assert said == ["CPU threads: 1 of 4 cores (OMP_NUM_THREADS=4 uses all, see the guide on speed)"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    model.learn(5)
    said = capsys.readouterr().out
    assert "CPU threads: 4 of 4 cores (OMP_NUM_THREADS). If other programs run" in said and "OMP_WAIT_POLICY=PASSIVE" in said
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    model.learn(5)
    assert "CPU threads: 4 of 4 cores (OMP_NUM_THREADS)\n" in capsys.readouterr().out


# Ends with the test, also where that is killed.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"
# Prints the seconds of 10 steps, of 20 updates each, with PyTorch's default and with one thread in turns.
UPDATES = """
import time, torch as th
from sb3_mbpo import MBPO
from stable_baselines3.common.callbacks import BaseCallback

class Watch(BaseCallback):
    def _on_rollout_start(self):
        if self.num_timesteps == 110:
            self.started = time.perf_counter()
    def _on_step(self):
        return True

default = th.get_num_threads()
for threads in 3 * [default, 1]:
    th.set_num_threads(threads)
    watch = Watch()
    MBPO("MlpPolicy", "Pendulum-v1", seed=0, learning_starts=100, model_train_freq=1000, rollout_batch_size=1000,
         dynamics_kwargs={"max_updates": 10}).learn(120, watch)
    print(time.perf_counter() - watch.started)
"""


@pytest.mark.expensive
def test_a_busy_process_costs_no_more_than_with_one_thread():
    """PyTorch's default is many times slower there. Both in turns, so that what else runs here slows both."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        command = [sys.executable, "-c", UPDATES]
        output = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    finally:
        for process in busy:
            process.kill()
            process.wait()
    seconds = [float(line) for line in output.split()]
    assert min(seconds[::2]) < 2 * min(seconds[1::2]), seconds
