"""A lock on a folder, so that no two runs write their checkpoints into one."""

import errno
import os
import platform
import sys
import weakref
from pathlib import Path


class FolderLock:
    """
    Keeps other runs out of a folder, in other processes and in this one, until it is closed.

    The system drops the lock when the process ends, however it does: there are no stale ones. Forked children do not keep it.
    The file ``lock`` stays, and names who had it last. On Windows there is no lock.

    :param folder: made if need be
    :raises ValueError: another run has it
    :raises OSError: the folder cannot be made or written to
    """

    def __init__(self, folder: Path) -> None:
        self._handle = -1
        _HELD.add(self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            owner = None if self._take() else os.read(self._handle, 1000).decode(errors="replace").strip()
            if owner is None:
                os.ftruncate(self._handle, 0)
                os.write(self._handle, f"process {os.getpid()} on {platform.node()}\n".encode())
        except OSError as error:
            self.close()
            raise OSError(
                f"folder={folder} cannot be used for checkpoints: {error}. Free some space there or make it writable, "
                "or choose another folder"
            ) from error
        if owner is not None:
            self.close()
            raise ValueError(
                f"folder={folder} is that of a run under way, {owner}: wait for its end, or give each run its own folder"
            )

    def _take(self) -> bool:
        if sys.platform == "win32":
            return True
        import fcntl

        try:
            # Unlike lockf, flock works between threads, and closing the file elsewhere in this process does not release it.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors: a file system without locks.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def close(self) -> None:
        """Let others in."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child shares the lock, and may outlive the run."""
    for one in list(_HELD):
        one.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
