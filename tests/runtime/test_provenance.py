"""Versions, hardware, commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from sb3_mbpo.runtime import provenance


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = provenance.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == metadata.version("torch") and found["sb3_mbpo"] == metadata.version("sb3_mbpo")
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no_such_package"))
    assert set(provenance.versions()) == {"python", "torch"}


def test_hardware_names_the_machine() -> None:
    found = provenance.hardware()
    assert found["cores"] == os.cpu_count() and found["cpu"] and platform.machine() in found["system"]


def test_commit_tells_a_changed_checkout(tmp_path: Path) -> None:
    assert provenance.commit(tmp_path) is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    # No commit yet.
    assert provenance.commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD").strip()
    assert provenance.commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert provenance.commit(tmp_path) == head + "+"


def test_merged_keeps_what_differs() -> None:
    runs = [{"torch": "1", "cores": 2, "gpus": []}, {"torch": "2", "cores": 2, "gpus": []}, {"torch": "1", "cores": 2}]
    assert provenance.merged(runs) == {"torch": ["1", "2"], "cores": 2, "gpus": []}
    assert provenance.merged(["a", "a"]) == "a"
    assert provenance.merged(["a", None]) == ["a", None]
