"""Writes files completely or not at all, with a checksum that shows whether a byte has changed."""

import errno
import hashlib
import io
import os
import platform
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from stable_baselines3.common.save_util import open_path

# At the end of a file, followed by the SHA-256 of everything before it. A pickle or a zip ends before it.
_MARK = b"sb3_mbpo sha256 "
_SUM_LENGTH = len(_MARK) + hashlib.sha256().digest_size
_BLOCK = 2**20


@contextmanager
def written_whole(path: Any, suffix: str) -> Iterator[BinaryIO]:
    """
    Open a file for writing, by the rules of SB3's ``open_path(path, "w", suffix=suffix)``.

    The content is written to a hidden file in the same folder, flushed to the disk, and renamed. If this is interrupted, an
    existing file of that name is unchanged. The error says so, or that only the flush of the folder failed.

    :param path: a name; without a suffix, it gets ``suffix``; missing folders are created. Or an open file, which is written
        to directly and stays open
    :param suffix: without the dot
    :return: the file to write to
    :raises OSError: the disk is full, or the folder or a file of that name cannot be written to; nothing is left behind
    """
    if not isinstance(path, str | Path):
        yield open_path(path, "w")  # type: ignore[misc]
        return
    target = _target(Path(path), suffix)
    if target.exists() and not target.is_file():  # a device, or a pipe
        with target.open("wb") as file:
            yield file
        return
    if target.exists() and not os.access(target, os.W_OK):
        # Renaming needs only the permission of the folder.
        raise PermissionError(errno.EACCES, "the file is write-protected, and unchanged", str(target))
    unfinished = target.parent / f"{_unfinished_prefix(target)}{os.getpid()}-{threading.get_ident()}.part"
    _remove_leftovers(target)
    is_renamed = False
    try:
        with unfinished.open("wb") as file:
            yield file
            flush(file)
        if target.exists():
            shutil.copymode(target, unfinished)
        unfinished.replace(target)
        is_renamed = True
        flush_folder(target.parent)
    except BaseException as error:
        if unfinished.parent.is_dir():
            unfinished.unlink(missing_ok=True)
        # PyTorch raises RuntimeError for a full disk.
        if isinstance(error, OSError | RuntimeError):
            what = "could not be written"
            if is_renamed:
                what = "was written, but may be lost in a power failure: its folder could not be flushed to the disk"
            elif target.exists():
                what += "; the existing file is unchanged"
            number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
            text = f"{target} {what}: {reason} ({free_bytes(target.parent)} bytes are free there)"
            # With the number, OSError becomes the subclass that SB3 would raise, such as PermissionError.
            raise (OSError(text) if number is None else OSError(number, text)) from error
        raise


def _target(path: Path, suffix: str) -> Path:
    """:return: the file that SB3 would open, with SB3's warnings; links are followed"""
    if path.suffix == "" and suffix:
        path = Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=5)
        return _target(Path(f"{path}_2"), suffix)
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=5)
        path.parent.mkdir(exist_ok=True, parents=True)
    return Path(os.path.realpath(path))


def _unfinished_prefix(target: Path) -> str:
    # With the machine: the folder may be shared, and whether a process on another machine is running is unknown.
    return f".{target.name[:100]}.{platform.node()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove unfinished versions of the same file that killed processes have left behind."""
    pattern = re.escape(_unfinished_prefix(target)) + r"(\d+)-\d+\.part"
    for name in os.listdir(target.parent) if target.parent.is_dir() else ():
        match = re.fullmatch(pattern, name)
        if match and not is_running(int(match[1])):
            (target.parent / name).unlink(missing_ok=True)


def free_bytes(folder: Path) -> str:
    """
    :param folder: a folder
    :return: number of bytes that are free there, for an error message
    """
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"


def flush(file: Any) -> None:
    """:param file: its content is on the disk afterwards"""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """:param path: the names in this folder are on the disk afterwards"""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_running(process: int) -> bool:
    """
    :param process: number of a process
    :return: whether it is running on this machine; ``True`` if that is unknown
    """
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class _Summing(io.RawIOBase):
    """Writes to a file, and computes the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        written = self.file.write(block)
        self.sum.update(memoryview(block)[:written])
        return written


@contextmanager
def with_checksum(file: BinaryIO) -> Iterator[io.BufferedWriter]:
    """
    Add a checksum to the end of a file.

    :param file: open for writing
    :return: a file to write to instead
    """
    summing = _Summing(file)
    with io.BufferedWriter(summing) as writer:
        yield writer  # type: ignore[misc]
        writer.flush()
        file.write(_MARK + summing.sum.digest())


def check_checksum(file: BinaryIO) -> bool:
    """
    :param file: open for reading; its position is kept
    :return: whether there is a checksum at its end; without one, the file may have been written by SB3
    :raises ValueError: there is one, and the file from its position to the checksum has changed since it was written
    """
    start = file.tell()
    try:
        length = file.seek(0, io.SEEK_END) - start - _SUM_LENGTH
        if length < 0:
            return False
        file.seek(start + length)
        mark = file.read(_SUM_LENGTH)
        if not mark.startswith(_MARK):
            return False
        found = hashlib.sha256()
        file.seek(start)
        for place in range(0, length, _BLOCK):
            found.update(file.read(min(_BLOCK, length - place)))
        if found.digest() != mark[len(_MARK) :]:
            raise ValueError("it is damaged: its checksum differs, so a part of it was altered")
        return True
    finally:
        file.seek(start)


def skip_checksum(file: BinaryIO) -> None:
    """:param file: open for reading; a checksum at its position is skipped"""
    start = file.tell()
    if not file.read(_SUM_LENGTH).startswith(_MARK):
        file.seek(start)
