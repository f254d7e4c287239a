"""Reads zips, JSON and tensors that anyone may have written. Nothing in them is run."""

import io
import json
import math
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch as th
from stable_baselines3.common.save_util import open_path

# An agent has a dozen members, and a file of PyTorch one for each tensor.
_MOST_MEMBERS = 1_000_000
_MOST_TEXT = 2**24
# Of a value of 30 levels, each of which may be four levels of JSON.
_MOST_LEVELS = 150


def read_bytes(path: Any, suffix: str) -> bytes:
    """
    :param path: a name, with or without the suffix, or an open file, which is read to its end
    :param suffix: without the dot
    :return: the content
    """
    file = open_path(path, "r", suffix=suffix)
    try:
        return file.read()
    finally:
        if file is not path:
            file.close()


def _stored(file: BinaryIO) -> zipfile.ZipFile:
    """
    Open a zip without compression. Reading its members needs no more memory than the file has bytes.

    :param file: open for reading; its position is kept
    :raises ValueError: it is compressed, its sizes are wrong, or it is not a zip
    """
    start = file.tell()
    size = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, OverflowError):
        raise ValueError("it is not a zip file, or is cut off") from None
    finally:
        file.seek(start)
    members = archive.infolist()
    if len(members) > _MOST_MEMBERS:
        raise ValueError(f"it has {len(members)} members")
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise ValueError(f"it has members of the same name: {sorted(names)[:5]}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename[:50]!r} in it is compressed or encrypted; agents are saved as they are")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members say that they are larger than the whole file")
    return archive


def check_whole(file: BinaryIO) -> zipfile.ZipFile:
    """
    :param file: an agent's zip; its position is kept
    :return: the opened zip, after all checksums were compared
    :raises ValueError: it is not a zip file, was cut off, or a member has changed
    """
    start = file.tell()
    try:
        archive = zipfile.ZipFile(file)
        changed = archive.testzip()
    except Exception as error:
        # A damaged zip can raise many kinds of errors.
        raise ValueError(f"it is not a zip file, or is damaged or cut off ({error})") from None
    finally:
        file.seek(start)
    if changed is not None:
        raise ValueError(f"it is damaged: {changed[:50]!r} in it has changed since it was written")
    if any("/" in name for name in archive.namelist()):
        # The members of an agent's zip are zips themselves. If it is cut off, the last complete one is taken for the file.
        raise ValueError("it is damaged or cut off, or no agent's zip-file")
    return archive


def read_members(content: bytes) -> dict[str, bytes]:
    """
    :param content: a zip-file without folders and compression
    :return: the content of each member by its name
    :raises ValueError: it is another file, a member is damaged, or the name of a member is a path
    """
    archive = _stored(io.BytesIO(content))
    for name in archive.namelist():
        if "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"{name[:50]!r} in it is not a member of such a file, which may be cut off")
    try:
        return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"it is damaged: {error}") from None


def write_json(value: Any) -> str:
    """
    :param value: a value that JSON can hold
    :return: strict JSON: no NaN, no infinity
    """
    return json.dumps(value, allow_nan=False, indent=1)


def read_json(text: bytes, most: int | None = _MOST_TEXT) -> Any:
    """
    :param text: strict JSON: no NaN, no infinity, no key twice
    :param most: maximum number of bytes; ``None``: no limit
    :return: the value
    :raises ValueError: anything else
    """
    if most is not None and len(text) > most:
        raise ValueError(f"it has {len(text)} bytes of JSON; the most is {most}")
    try:
        found = json.loads(
            text.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_key_twice
        )
    except RecursionError:
        raise ValueError("its JSON has too many levels") from None
    except UnicodeDecodeError:
        raise ValueError("its JSON is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON cannot be read: {error}") from None
    level = [found]
    for _ in range(_MOST_LEVELS):
        level = [item for value in level if isinstance(value, dict | list) for item in _items(value)]
    if level:
        raise ValueError("its JSON has too many levels")
    return found


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"its JSON has {name}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"its JSON has a number out of range, {text[:50]}")
    return number


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"its JSON has a key twice: {next(key for key in keys if keys.count(key) > 1)[:50]!r}")
    return found


def read_tensors(file: BinaryIO) -> Any:
    """
    Read a file of ``torch.save`` that contains only tensors, numbers, text and containers of them.

    PyTorch's own error message is left out, because it recommends to load a refused file unsafely.

    :param file: open for reading; it is read from its position
    :return: the content, with tensors on the CPU
    :raises ValueError: it contains anything else, or is damaged
    """
    _stored(file)
    try:
        return th.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"it holds something else than tensors, or is damaged ({type(error).__name__})") from None
