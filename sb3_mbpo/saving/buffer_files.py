"""Saves the replay buffer as tensors. Loading such a file runs no code, so its author need not be trusted."""

import os
from typing import Any, BinaryIO

import torch as th

from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer
from sb3_mbpo.saving.safe_files import read_json, read_tensors, write_json
from sb3_mbpo.saving.serialization import Tensors, cut_out, decode, encode
from sb3_mbpo.saving.whole_files import check_checksum

SUFFIX = "pt"
FORMAT = 2
# Every zip file begins like this, and no pickle that Python writes.
_ZIP = b"PK"


def means_tensors(path: Any) -> bool:
    """
    :param path: a name, or an open file, which may have one
    :return: whether a file of this name has to hold tensors, not a pickle
    """
    name = path if isinstance(path, str | os.PathLike) else getattr(path, "name", "")
    return str(name).lower().endswith(f".{SUFFIX}")


def starts_as_zip(file: BinaryIO) -> bool:
    """
    :param file: open for reading; its position is kept
    :return: whether the file may hold tensors; then it is not a pickle
    """
    start = file.tell()
    try:
        return file.read(len(_ZIP)) == _ZIP
    finally:
        file.seek(start)


def save_tensors(buffer: MixedReplayBuffer, file: BinaryIO, imagined: bool) -> None:
    """
    :param buffer: its filled part is saved
    :param file: open for writing
    :param imagined: also save the imagined transitions
    """
    tensors: Tensors = {}
    contents = buffer.contents(imagined) | {"handle_timeout_termination": buffer.handle_timeout_termination}
    content = write_json(encode(contents, tensors))
    th.save({"format": FORMAT, "content": content, "tensors": cut_out(tensors)}, file)


def load_tensors(buffer: MixedReplayBuffer, file: BinaryIO) -> None:
    """
    Replace the transitions of a buffer by those of a file. If there are more than it has room for, the newest.

    :param buffer: a buffer for the same envs; unchanged if the file is refused
    :param file: written by :func:`save_tensors` within :func:`.whole_files.with_checksum`, or by anyone
    :raises ValueError: another file, an altered one, transitions of other envs, or numbers that are not finite
    """
    if not starts_as_zip(file):
        raise ValueError(
            "it is not a replay buffer saved with safe=True, and a pickle is not opened. "
            f"Load it with safe=False if you trust its author; its name must not end in .{SUFFIX} then"
        )
    if not check_checksum(file):
        raise ValueError("it is cut off, or no replay buffer saved with safe=True: there is no checksum at its end")
    found = read_tensors(file)
    if not isinstance(found, dict) or set(found) != {"format", "content", "tensors"}:
        raise ValueError("it is not a replay buffer saved with safe=True")
    if type(found["format"]) is not int or found["format"] != FORMAT:
        raise ValueError(f"format={str(found['format'])[:50]} is unknown; it must be {FORMAT}")
    if not isinstance(found["content"], str) or not isinstance(found["tensors"], dict):
        raise ValueError("it is not a replay buffer saved with safe=True")
    contents = decode(read_json(found["content"].encode("utf-8", "replace")), found["tensors"], "the replay buffer")
    by_timeout = contents.pop("handle_timeout_termination", None) if isinstance(contents, dict) else None
    if not isinstance(by_timeout, bool):
        raise ValueError("handle_timeout_termination must be true or false")
    buffer.restore(contents)
    buffer.handle_timeout_termination = by_timeout
