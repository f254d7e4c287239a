"""``make audit``, with a stand-in for pip-audit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, "audit: 0 known vulnerabilities in 1 of 2 packages"),
        ({"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}]}, "a 1: CVE-1\naudit: 1 known"),
        ({"dependencies": [{"name": "a", "skip_reason": "not found"}] * 2}, "audit: skipped, the index knows none of the 2"),
        (None, "audit: skipped, no answer"),
    ],
)
def test_what_was_not_asked_is_no_all_clear(tmp_path, answer, expected):
    tool = tmp_path / "pip-audit"
    text = "" if answer is None else json.dumps(answer)
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit 1\n")
    tool.chmod(0o755)
    (tmp_path / "lock").write_text("# comment\na==1\nb==2+cpu\n")
    command = [sys.executable, str(ROOT / ".ci" / "audit"), str(tmp_path / "lock")]
    result = subprocess.run(command, env={**os.environ, "PIP_AUDIT": str(tool)}, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith(expected), result.stderr
