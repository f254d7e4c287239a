import io
import json
import os
import zipfile

import pytest
import torch as th
from hostile import Payload

from sb3_mbpo.saving.safe_files import read_bytes, read_json, read_members, read_tensors, write_json


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def test_members():
    assert read_members(zipped([("a", b"1"), ("b.pth", b"")])) == {"a": b"1", "b.pth": b""}


def test_names_with_and_without_suffix(tmp_path):
    (tmp_path / "agent.zip").write_bytes(b"x")
    assert read_bytes(tmp_path / "agent", "zip") == read_bytes(str(tmp_path / "agent.zip"), "zip") == b"x"
    file = io.BytesIO(b"xyz")
    assert read_bytes(file, "zip") == b"xyz" and not file.closed
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "other", "zip")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..\\a", ".hidden"])
def test_paths_for_names(name):
    with pytest.raises(ValueError, match="not a member of such a file"):
        read_members(zipped([(name, b"1")]))


def test_a_bomb():
    with pytest.raises(ValueError, match="compressed"):
        read_members(zipped([("a", b"0" * 10_000_000)], zipfile.ZIP_DEFLATED))


def test_a_size_that_is_not_there():
    """The size of the only member, in both of its headers and for both of its sizes, is raised to 4 GB."""
    content = zipped([("a", b"x" * 1234)]).replace((1234).to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="larger than the whole file"):
        read_members(content)


def test_a_name_twice():
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = zipped([("a", b"1"), ("a", b"2")])
    with pytest.raises(ValueError, match="same name"):
        read_members(content)


def test_a_changed_byte():
    content = zipped([("a", b"hello")])
    with pytest.raises(ValueError, match="damaged"):
        read_members(content.replace(b"hello", b"hallo"))


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04", zipped([("a", b"1" * 99)])[:-5]])
def test_no_zip(content):
    with pytest.raises(ValueError, match="not a zip file, or is cut off"):
        read_members(content)


def test_json():
    value = {"a": [1, 2.5, None, True, "ü"], "b": {}}
    assert read_json(write_json(value).encode()) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(float("nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((b'{"a": NaN}', "NaN"), (b"[Infinity]", "Infinity"), (b"[-Infinity]", "-Infinity"), (b"[1e999]", "out of range")),
        *((b'{"a": 1, "a": 2}', "key twice: 'a'"), (b"{", "cannot be read"), (b"", "cannot be read"), (b"\xff", "UTF-8")),
        *((b"[" * 200 + b"]" * 200, "too many levels"), (b"[" * 100_000, "too many levels"), (b"1" * 5000, "integer")),
        (b" " * (2**24 + 1), "bytes of JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_strict_json(text, message):
    with pytest.raises(ValueError, match=message):
        read_json(text)


def saved(value, **options):
    file = io.BytesIO()
    th.save(value, file, **options)
    file.seek(0)
    return file


def test_tensors():
    value = {"a": th.ones(3), "b": [1, (2.5, "text", None)]}
    again = read_tensors(saved(value))
    assert th.equal(again.pop("a"), value.pop("a")) and again == value


@pytest.mark.parametrize("function", [os.system, exec, eval])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_a_pickle_that_acts(tmp_path, function, options):
    """PyTorch's own message recommends unsafe loading; ours does not."""
    file = saved({"a": Payload(tmp_path / "marker", function)}, **options)
    with pytest.raises(ValueError, match=r"something else than tensors|not a zip file") as caught:
        read_tensors(file)
    assert "weights_only" not in str(caught.value) and caught.value.__suppress_context__
    assert not (tmp_path / "marker").exists()


def test_a_compressed_torch_file():
    with zipfile.ZipFile(saved(th.zeros(1000))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(io.BytesIO(zipped(members, zipfile.ZIP_DEFLATED)))


def test_the_environment_cannot_switch_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="something else than tensors"):
        read_tensors(saved(Payload(tmp_path / "marker", exec)))
    assert not (tmp_path / "marker").exists()


def test_strict_json_is_json():
    assert json.loads(write_json({"x": [1]})) == {"x": [1]}
