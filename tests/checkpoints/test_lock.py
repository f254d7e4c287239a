import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from sb3_mbpo.checkpoints.lock import FolderLock

HOLDS = "import sys; from pathlib import Path; from sb3_mbpo.checkpoints.lock import FolderLock; "
HOLDS += "held = FolderLock(Path(sys.argv[1])); "


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
                FolderLock(folder)
        process.kill()
        process.wait()
        FolderLock(folder).close()


def test_children_do_not_keep_it(tmp_path):
    """A forked one that outlives its parent, as an env's process may."""
    then = "import os; child = os.fork(); child and print(child, flush=True); sys.stdin.read() if child else os.pause()"
    process, child = holder(tmp_path, then.replace("os.pause", "__import__('signal').pause"))
    with process:
        process.kill()
        process.wait()
        try:
            os.kill(int(child), 0)
            FolderLock(tmp_path).close()
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_closed_it_lets_others_in(tmp_path):
    FolderLock(tmp_path).close()
    process, said = holder(tmp_path)
    with process:
        assert said == "mine"
        process.kill()
    assert (tmp_path / "lock").read_text().startswith(f"process {process.pid} on ")


def test_another_thread_is_kept_out(tmp_path):
    """Two agents of one process, too."""
    mine, errors = FolderLock(tmp_path), []

    def second():
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on"):
            FolderLock(tmp_path)
        errors.append(1)

    thread = threading.Thread(target=second)
    thread.start(), thread.join()
    assert errors == [1]
    mine.close()
    FolderLock(tmp_path).close()


def test_a_look_at_the_file_does_not_open_it(tmp_path):
    """The folder stays locked after other code in this process has opened and closed the lock file."""
    mine = FolderLock(tmp_path)
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    process, said = holder(tmp_path)
    with process:
        assert said == ""
    mine.close()


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    """The error names it, and what to do."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"folder=.*file.run cannot be used for checkpoints: .*choose another folder"):
        FolderLock(tmp_path / "file" / "run")

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"folder=.*run cannot be used for checkpoints: .*space.*Free some space there"):
        FolderLock(tmp_path / "run")
    monkeypatch.undo()
    FolderLock(tmp_path / "run").close()
