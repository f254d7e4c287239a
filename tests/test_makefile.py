"""What `make train` installs, with a Python that only writes down what it is asked to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The Makefile asks for a GPU on Linux alone, and a machine without make cannot run it.
pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("make") is None, reason="needs make on Linux")

PYTHON = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
    *--index-url*) exit {code};;
esac
"""


class Checkout:
    """A copy of what make reads, a false Python, and maybe a false GPU."""

    def __init__(self, folder: Path, gpu: bool = False, index_code: int = 0) -> None:
        self.folder, self.calls, self.bin = folder / "checkout", folder / "calls", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "setup.py", "requirements-dev.lock"):
            shutil.copy(ROOT / name, self.folder)
        self._script("python", PYTHON.format(calls=self.calls, code=index_code))
        self._script("nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")

    def _script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *arguments: str) -> list[str]:
        """:return: what Python was asked to do"""
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH_INDEX"):
            environment.pop(name, None)
        self.calls.write_text("")
        command = ["make", "PYTHON=python", *arguments]
        subprocess.run(command, cwd=self.folder, env=environment, check=True, capture_output=True, timeout=60)
        return [line for line in self.calls.read_text().splitlines() if not line.startswith("-c ")]


def installs(calls: list[str]) -> list[str]:
    return [call.partition("check ")[2] for call in calls if call.startswith("-m pip install")]


CPU_BUILD = "--retries 1 --timeout 20 --index-url https://download.pytorch.org/whl/cpu torch"


def test_train_installs_what_it_needs_once(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    first, second = checkout.make("train"), checkout.make("train")
    assert installs(first) == [CPU_BUILD, "-e .[train]"]
    assert first[-1].startswith("benchmarks/train.py --env InvertedPendulum-v5") and second == first[-1:]


@pytest.mark.parametrize("choice", [{"gpu": True}, {"options": ["TORCH_INDEX="]}], ids=["a GPU", "pip's choice"])
def test_no_cpu_build(tmp_path: Path, choice: dict) -> None:
    options = choice.pop("options", [])
    assert installs(Checkout(tmp_path, **choice).make("train", *options)) == ["-e .[train]"]


def test_train_goes_on_where_the_cpu_builds_are_out_of_reach(tmp_path: Path) -> None:
    calls = Checkout(tmp_path, index_code=1).make("train")
    # The version that is tested, from wherever pip looks.
    lock = (ROOT / "requirements-dev.lock").read_text().splitlines()
    locked = next(line.split()[0] for line in lock if line.startswith("torch=="))
    assert installs(calls) == [CPU_BUILD, locked, "-e .[train]"] and calls[-1].startswith("benchmarks/train.py")


def test_tests_install_the_lock_and_that_is_enough_to_train(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    assert installs(checkout.make("lint")) == ["-r requirements-dev.lock", "--no-deps --no-build-isolation -e ."]
    assert installs(checkout.make("train")) == []


def test_train_first_and_tests_later(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.make("train")
    assert installs(checkout.make("lint")) == ["-r requirements-dev.lock", "--no-deps --no-build-isolation -e ."]
