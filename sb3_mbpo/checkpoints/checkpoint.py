"""
Checkpoints on disk. They are written completely or not at all, and read only if no byte has changed.

A checkpoint is a folder such as ``00012-step-3000`` with ``state.json``, ``tensors.pt`` and, written last, ``manifest.json``
with the size and the SHA-256 of both. Nothing is unpickled: JSON is read, and tensors are loaded with ``weights_only=True``.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from sb3_mbpo.runtime.provenance import versions
from sb3_mbpo.saving.safe_files import read_json, read_tensors
from sb3_mbpo.saving.serialization import cut_out
from sb3_mbpo.saving.whole_files import flush, flush_folder, free_bytes, is_running

FORMAT = 3
_NAME = r"(\d{5,})-step-(\d+)"
_UNFINISHED = r"\.\d{5,}-step-\d+\.(\d+)"
_FILES = ("state.json", "tensors.pt")
# Errors when reading a file that another program has written.
_STRANGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class CheckpointError(ValueError):
    """A damaged checkpoint. The message names the file, the reason, and what to use instead."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a readable manifest. :func:`read` checks its files."""

    path: Path
    manifest: dict[str, Any]
    #: What is wrong with newer checkpoints.
    passed_over: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """The number of the checkpoint in its folder."""
        return int(self.path.name.split("-")[0])

    @property
    def step(self) -> int:
        """Number of env transitions."""
        return int(self.manifest["step"])

    @property
    def score(self) -> float | None:
        """Mean return of the last evaluation, if there was one."""
        score = self.manifest.get("score")
        return None if score is None else float(score)


def write(
    folder: Path, state: dict[str, Any], tensors: dict[str, th.Tensor], step: int, score: float | None = None
) -> Checkpoint:
    """
    Add a checkpoint to a folder.

    The files are written under another name, flushed to the disk, and renamed. Older checkpoints are never changed, also if
    this is interrupted.

    :param folder: folder of one run; it is created if it does not exist
    :param state: JSON
    :param tensors: tensors on the CPU
    :param step: number of env transitions
    :param score: mean return of the last evaluation, if there was one
    :return: the new checkpoint
    :raises OSError: the disk is full, or cannot be written to; nothing is left behind
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = max([0, *(int(match[1]) for match in (re.fullmatch(_NAME, name) for name in os.listdir(folder)) if match)]) + 1
    target = folder / f"{number:05}-step-{step}"
    unfinished = folder / f".{target.name}.{os.getpid()}"
    # A killed process with the same number may have left it behind.
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        _write_file(unfinished / "state.json", json.dumps(state, allow_nan=False).encode())
        with (unfinished / "tensors.pt").open("wb") as file:
            th.save(cut_out(tensors), file)
            flush(file)
        files = {name: {"bytes": size, "sha256": digest} for name, size, digest in map(_measure, _paths(unfinished))}
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "score": score, "files": files, "versions": versions()}
        manifest["sha256"] = _digest(manifest)
        _write_file(unfinished / "manifest.json", json.dumps(manifest, indent=1).encode())
        flush_folder(unfinished)
        unfinished.rename(target)
        flush_folder(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # PyTorch raises RuntimeError for a full disk.
        if isinstance(error, OSError | RuntimeError):
            raise OSError(
                f"{target} could not be written, older checkpoints are unchanged: {error} ({free_bytes(folder)} bytes are "
                "free there). Free some space or make the folder writable, and run the same command again"
            ) from error
        raise
    return Checkpoint(target, manifest)


def listed(folder: Path) -> Iterator[Checkpoint]:
    """
    :param folder: folder of one run
    :return: the checkpoints with a readable manifest, newest first
    """
    names = [path for path in folder.iterdir() if re.fullmatch(_NAME, path.name)] if folder.is_dir() else []
    for path in sorted(names, key=lambda path: int(path.name.split("-")[0]), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            checkpoint = Checkpoint(path, manifest)
            if manifest["format"] == FORMAT and checkpoint.step >= 0 and set(manifest["files"]) == set(_FILES):
                yield checkpoint
        except (OSError, *_STRANGE):
            continue


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, th.Tensor], Checkpoint] | None:
    """
    Read the newest intact checkpoint. Damaged ones are skipped.

    :param folder: folder of one run
    :return: state, tensors and the checkpoint they are from; ``None``: there are no checkpoints
    :raises CheckpointError: there are checkpoints, but none is intact
    """
    problems: list[str] = []
    for path in sorted(
        (path for path in folder.glob("*-step-*") if re.fullmatch(_NAME, path.name)), key=_number, reverse=True
    ):
        try:
            content = read(path)
            return *content, Checkpoint(path, json.loads((path / "manifest.json").read_bytes()), tuple(problems))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no checkpoint can be read:\n" + "\n".join(problems))
    return None


def read(path: Path) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    """
    Read one checkpoint.

    :param path: its folder
    :return: state and tensors, as passed to ``write``
    :raises CheckpointError: a file is missing, cut off or altered, or has another format
    """
    content = _read_file(path, "manifest.json")
    try:
        problem = _problem(path, json.loads(content))
    except _STRANGE:
        problem = "manifest.json: not what this program writes"
    if problem:
        raise CheckpointError(f"{path}: {problem}. {_instead(path)}")
    try:
        with (path / "tensors.pt").open("rb") as file:
            return read_json((path / "state.json").read_bytes(), most=None), read_tensors(file)
    except (OSError, ValueError) as error:
        what = f"this program does not write such files, though their checksums are right ({error})"
        raise CheckpointError(f"{path}: {what}. {_instead(path)}") from None


def prune(folder: Path, keep: int, keep_best: bool = True) -> None:
    """
    Remove old checkpoints, and the files that killed processes have left behind. Of a link, only the link is removed.

    :param folder: folder of one run, which this process is not writing to
    :param keep: number of newest checkpoints to keep
    :param keep_best: also keep the checkpoint with the highest score
    """
    checkpoints = list(listed(folder))
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None and math.isfinite(checkpoint.score)]
    best = max(scored, key=lambda checkpoint: (checkpoint.score, checkpoint.number), default=None) if keep_best else None
    for checkpoint in checkpoints[keep:]:
        if checkpoint is not best:
            _remove(checkpoint.path)
    for path in folder.glob("*-step-*"):
        # A process was killed while removing it.
        if re.fullmatch(_NAME, path.name) and not (path / "manifest.json").exists():
            _remove(path)
    for path in folder.glob(".*-step-*.*"):
        match = re.fullmatch(_UNFINISHED, path.name)
        # This process is not writing now, so a folder with its number is from an earlier process.
        if match and (int(match[1]) == os.getpid() or not is_running(int(match[1]))):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return
    # First the manifest, because half a checkpoint must not look like a whole one.
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def _paths(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES]


def _measure(path: Path) -> tuple[str, int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return path.name, path.stat().st_size, digest.hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        flush(file)


def _read_file(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {name}: {error.strerror}. {_instead(path)}") from error


def _problem(path: Path, manifest: dict[str, Any]) -> str | None:
    """:return: what is wrong with a checkpoint; ``None``: nothing"""
    if manifest["sha256"] != _digest({key: value for key, value in manifest.items() if key != "sha256"}):
        return "manifest.json: checksum differs, the content was altered"
    if manifest["format"] != FORMAT:
        return f"format {manifest['format']!r}, and this version of sb3_mbpo reads format {FORMAT}"
    for name in _FILES:
        try:
            _, size, digest = _measure(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        wanted = manifest["files"][name]
        if size != wanted["bytes"]:
            return f"{name}: {size:,} of {wanted['bytes']:,} bytes"
        if digest != wanted["sha256"]:
            return f"{name}: checksum differs, the content was altered"
    return None


def _instead(path: Path) -> str:
    """:return: which checkpoint to use instead of a damaged one, for the error message"""
    for checkpoint in listed(path.parent):
        try:
            if checkpoint.path != path and _problem(checkpoint.path, checkpoint.manifest) is None:
                return f"Use {checkpoint.path}, the newest that is intact"
        except _STRANGE:
            continue
    return "No other checkpoint is intact: remove the folder or choose another one, and start anew"
