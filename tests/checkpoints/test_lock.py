import os
import signal
import subprocess
import sys

import pytest

from sb3_mbpo.checkpoints.lock import lock

HOLDS = "import sys; from pathlib import Path; from sb3_mbpo.checkpoints.lock import lock; file = lock(Path(sys.argv[1])); "


def holder(folder, then="print('mine', flush=True); sys.stdin.read()"):
    """A process that has locked a folder and waits."""
    command = [sys.executable, "-c", HOLDS + then, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_another_process_is_kept_out_until_it_has_ended(tmp_path):
    """However it ends; and the error says which one it is."""
    folder = tmp_path / "new" / "run"
    process, _ = holder(folder)
    with process:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"folder={folder} .*process {process.pid} on .*its own folder"):
                lock(folder)
        process.kill()
        process.wait()
        lock(folder).close()


def test_children_do_not_keep_it(tmp_path):
    """A forked one that outlives its parent, as an env's process may."""
    then = "import os; child = os.fork(); child and print(child, flush=True); sys.stdin.read() if child else os.pause()"
    process, child = holder(tmp_path, then.replace("os.pause", "__import__('signal').pause"))
    with process:
        process.kill()
        process.wait()
        try:
            os.kill(int(child), 0)
            lock(tmp_path).close()
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_closed_it_lets_others_in(tmp_path):
    lock(tmp_path).close()
    process, said = holder(tmp_path)
    with process:
        assert said == "mine"
        process.kill()
    assert (tmp_path / "lock").read_text().startswith(f"process {process.pid} on ")
