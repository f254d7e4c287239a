"""Saves the replay buffer as tensors. Loading such a file runs no code, so its author need not be trusted."""

import os
from typing import Any, BinaryIO

import numpy as np
import torch as th

from sb3_mbpo.buffers.replay_buffer import ROWS, MixedReplayBuffer, check_finite
from sb3_mbpo.saving.safe_files import read_tensors
from sb3_mbpo.saving.whole_files import check_checksum

SUFFIX = "pt"
FORMAT = 1
_KEYS = {"format", "rows", "buffer_size", "pos", "full", "handle_timeout_termination", "imagined", "refills"}
# Every zip-file begins so, and no pickle that Python writes.
_ZIP = b"PK"


def means_tensors(path: Any) -> bool:
    """
    :param path: a name, or an open file, which may have one
    :return: whether a file of this name has to hold tensors, not a pickle
    """
    name = path if isinstance(path, str | os.PathLike) else getattr(path, "name", "")
    return str(name).lower().endswith(f".{SUFFIX}")


def starts_as_zip(file: BinaryIO) -> bool:
    """:return: whether a file, which is left where it was, may hold tensors; then it is no pickle"""
    start = file.tell()
    try:
        return file.read(len(_ZIP)) == _ZIP
    finally:
        file.seek(start)


def save_tensors(buffer: MixedReplayBuffer, file: BinaryIO, imagined: bool) -> None:
    """
    :param buffer: what is filled of it goes to the file
    :param file: open for writing
    :param imagined: with the imagined transitions, too
    """
    rows, refills = buffer.model_buffer.contents()
    content = {
        "format": FORMAT,
        "rows": {name: th.as_tensor(np.ascontiguousarray(getattr(buffer, name)[: buffer.size()])) for name in ROWS},
        "buffer_size": buffer.buffer_size,
        "pos": buffer.pos,
        "full": buffer.full,
        "handle_timeout_termination": buffer.handle_timeout_termination,
        # A view would bring all of its memory into the file.
        "imagined": rows.cpu() if imagined else th.empty(0, rows.shape[1]),
        "refills": refills if imagined else [],
    }
    th.save(content, file)


def load_tensors(buffer: MixedReplayBuffer, file: BinaryIO) -> None:
    """
    Put the transitions of a file in the place of those of a buffer; of more than it has room for, the last ones.

    :param buffer: of the same envs; unchanged if the file is refused
    :param file: written by :func:`save_tensors` within :func:`.whole_files.with_checksum`, or by anyone
    :raises ValueError: another file, an altered one, transitions of other envs, or numbers that are not finite
    """
    if not starts_as_zip(file):
        raise ValueError(
            "it is no replay buffer saved with safe=True, and a pickle is not opened. "
            f"Load it with safe=False if you trust its author; its name must not end in .{SUFFIX} then"
        )
    if not check_checksum(file):
        raise ValueError("it is cut off, or no replay buffer saved with safe=True: there is no checksum at its end")
    content = read_tensors(file)
    if not isinstance(content, dict) or set(content) != _KEYS:
        raise ValueError("it is no replay buffer saved with safe=True")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise ValueError(f"format={str(content['format'])[:50]} is unknown; it must be {FORMAT}")
    n_rows = _check_rows(content, buffer)
    _check_places(content, n_rows)
    _check_imagined(content, buffer.model_buffer.rows.shape[1])
    rows = {name: tensor.numpy() for name, tensor in content["rows"].items()}
    check_finite(rows, content["imagined"])
    buffer.reset()
    if content["buffer_size"] == buffer.buffer_size:
        for name, array in rows.items():
            getattr(buffer, name)[:n_rows] = array
        buffer.pos, buffer.full = content["pos"], content["full"]
    else:
        oldest = content["pos"] if content["full"] else 0
        buffer.insert({name: np.roll(array, -oldest, axis=0) for name, array in rows.items()})
    buffer.handle_timeout_termination = content["handle_timeout_termination"]
    buffer.model_buffer.restore(content["imagined"], content["refills"])


def _check_rows(content: dict[str, Any], buffer: MixedReplayBuffer) -> int:
    """:return: number of rows, a row for each step of all envs"""
    rows = content["rows"]
    if not isinstance(rows, dict) or set(rows) != set(ROWS):
        raise ValueError(f"rows must be {', '.join(ROWS)}")
    n_rows: int | None = None
    for name, tensor in rows.items():
        ours = getattr(buffer, name)
        dtype = th.as_tensor(ours[:0]).dtype
        if not isinstance(tensor, th.Tensor) or tensor.layout != th.strided or tensor.is_quantized or tensor.dtype != dtype:
            raise ValueError(f"{name} must be a tensor of {dtype}")
        if tensor.ndim != ours.ndim or tensor.shape[1:] != ours.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this agent's steps have {ours.shape[1:]}")
        # A tensor that repeats itself is larger than its file.
        if not tensor.is_contiguous() or tensor.requires_grad:
            raise ValueError(f"{name} must be a plain tensor")
        n_rows = len(tensor) if n_rows is None else n_rows
        if len(tensor) != n_rows:
            raise ValueError(f"{name} has {len(tensor)} steps, but others have {n_rows}")
    return n_rows or 0


def _check_places(content: dict[str, Any], n_rows: int) -> None:
    size, pos, full = content["buffer_size"], content["pos"], content["full"]
    if not isinstance(full, bool) or not isinstance(content["handle_timeout_termination"], bool):
        raise ValueError("full and handle_timeout_termination must be true or false")
    if type(size) is not int or type(pos) is not int or not (0 <= pos < size and n_rows == (size if full else pos)):
        raise ValueError(f"buffer_size, pos and full do not go with {n_rows} steps")


def _check_imagined(content: dict[str, Any], width: int) -> None:
    rows, refills = content["imagined"], content["refills"]
    fits = isinstance(rows, th.Tensor) and rows.layout == th.strided and rows.dtype == th.float32 and rows.ndim == 2
    if not fits or rows.shape[1] != width or not rows.is_contiguous() or rows.requires_grad:
        raise ValueError(f"imagined must be a float32 tensor of {width} columns")
    if not isinstance(refills, list) or not all(type(n) is int and n >= 0 for n in refills) or sum(refills) != len(rows):
        raise ValueError("refills must be how many imagined rows each refill has")
