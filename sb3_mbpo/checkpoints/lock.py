"""A lock on a folder, so that two runs never write their checkpoints into the same one."""

import errno
import os
import platform
import sys
import weakref
from pathlib import Path


class FolderLock:
    """
    Locks a folder against other runs, in other processes and in this one, until it is closed.

    The system removes the lock when the process ends, also if it is killed. Forked children do not keep it. The file ``lock``
    stays, and contains the process that had the lock last. On Windows, folders are not locked.

    :param folder: The folder; it is created if it does not exist
    :raises ValueError: another run has locked it
    :raises OSError: the folder cannot be created or written to
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
                f"folder={folder} is used by another run, {owner}: wait for its end, or give each run its own folder"
            )

    def _take(self) -> bool:
        if sys.platform == "win32":
            return True
        import fcntl

        try:
            # Unlike lockf, flock also works between threads, and is not released when this process closes the file elsewhere.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors mean that the file system has no locks.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def close(self) -> None:
        """Release the lock."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    """Release the locks that a forked child shares, because it may live longer than the run."""
    for one in list(_HELD):
        one.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
