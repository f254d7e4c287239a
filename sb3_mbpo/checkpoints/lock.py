"""A lock on a folder, so that no two runs write their checkpoints into one."""

import errno
import os
import platform
import sys
from pathlib import Path
from typing import IO


def lock(folder: Path) -> IO[str]:
    """
    Keep other processes out of a folder.

    The system holds the lock for this process alone, and drops it when the process ends, however it does: there are no stale
    ones. The file ``lock`` stays, and says who had it last. Not on Windows.

    :param folder: made if need be
    :return: an open file; closed, it lets others in
    :raises ValueError: another process has it
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+")
    if sys.platform != "win32":
        import fcntl

        try:
            # Unlike flock, not shared with forked children, which may outlive the run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors: a file system without locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                with file:
                    file.seek(0)
                    owner = file.read().strip()
                raise ValueError(
                    f"folder={folder} is that of a run under way, {owner}: wait for its end, or give each run its own folder"
                ) from None
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    return file
