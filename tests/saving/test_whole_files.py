import errno
import io
import os
import resource
import signal
import stat
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.save_util import open_path
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.saving import whole_files
from sb3_mbpo.saving.whole_files import check_checksum, skip_checksum, with_checksum, written_whole


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "name", ["agent", "agent.zip", "agent.other", "new/folder/agent", "a.folder", "another", "link", ".x"]
)
def test_the_paths_of_sb3(tmp_path, name, kind):
    """Suffix, folders and warnings."""
    found = []
    for save in (lambda path: open_path(path, "w", suffix="zip"), lambda path: written_whole(path, "zip")):
        folder = tmp_path / str(len(found))
        for made in ("a.folder", "another.zip"):
            (folder / made).mkdir(parents=True)
        (folder / "target").touch()
        (folder / "link.zip").symlink_to(folder / "target")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with save(kind(folder / name)) as file:
                file.write(b"content")
        written = [one for one in names(folder) if (folder / one).is_file() and (folder / one).stat().st_size]
        found.append((names(folder), written, [str(one.message).replace(str(folder), "") for one in caught]))
    assert found[0] == found[1]
    assert (tmp_path / "1" / "link.zip").is_symlink()


def test_open_files_are_written_to_and_stay_open(tmp_path):
    memory = io.BytesIO(b"there")
    memory.seek(5)
    with written_whole(memory, "zip") as file:
        file.write(b" and more")
    assert memory.getvalue() == b"there and more"
    with open(tmp_path / "file", "wb") as given:
        with written_whole(given, "zip") as file:
            file.write(b"content")
        assert not given.closed
    assert (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(TypeError):
        written_whole(3, "zip").__enter__()


def test_a_device():
    with written_whole(os.devnull, "") as file:
        file.write(b"content")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, OSError, RuntimeError])
def test_an_error_leaves_the_old_file(tmp_path, error):
    (tmp_path / "agent.zip").write_bytes(b"old")
    expected = OSError if error is RuntimeError else error
    with pytest.raises(expected) as raised, written_whole(tmp_path / "agent", "zip") as file:
        file.write(b"new")
        raise error("what happened")
    if expected is OSError:
        assert "agent.zip could not be written; the existing file is unchanged: what happened (" in str(raised.value)
    assert (tmp_path / "agent.zip").read_bytes() == b"old" and names(tmp_path) == ["agent.zip"]


def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    """The file is already replaced at that point. Reading the free disk space may fail as well."""
    (tmp_path / "agent.zip").write_bytes(b"old")

    def fail(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(whole_files, "flush_folder", fail)
    monkeypatch.setattr(whole_files.shutil, "disk_usage", fail)
    with pytest.raises(OSError, match=r"agent.zip was written, but .*: Input/output error \(an unknown number") as raised:
        with written_whole(tmp_path / "agent", "zip") as file:
            file.write(b"new")
    assert raised.value.errno == errno.EIO and "unchanged" not in str(raised.value)
    assert (tmp_path / "agent.zip").read_bytes() == b"new" and names(tmp_path) == ["agent.zip"]


def test_the_kind_of_error_is_kept(tmp_path):
    with pytest.raises(PermissionError, match=r"agent.zip could not be written: no entry"):
        with written_whole(tmp_path / "agent", "zip"):
            raise PermissionError(errno.EACCES, "no entry")


def test_permissions_stay(tmp_path):
    for mode in (0o600, 0o664):
        (tmp_path / "agent.zip").touch()
        (tmp_path / "agent.zip").chmod(mode)
        with written_whole(tmp_path / "agent", "zip") as file:
            file.write(b"new")
        assert stat.S_IMODE((tmp_path / "agent.zip").stat().st_mode) == mode


def test_a_write_protected_file_stays(tmp_path, monkeypatch):
    """As with SB3. Root may write to it, hence the patch."""
    (tmp_path / "agent.zip").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="write-protected") as raised, written_whole(tmp_path / "agent", "zip") as file:
        file.write(b"new")
    assert raised.value.errno == errno.EACCES and raised.value.filename == str(tmp_path / "agent.zip")
    assert (tmp_path / "agent.zip").read_bytes() == b"old" and names(tmp_path) == ["agent.zip"]
    # A new file needs the folder's permission only.
    with written_whole(tmp_path / "other", "zip") as file:
        file.write(b"new")


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"agent.zip could not be written"),
        written_whole(tmp_path / "file" / "agent.zip", "zip"),
    ):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    child = os.fork()
    if child == 0:
        with written_whole(tmp_path / "agent", "zip") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".agent.zip.")
    running = tmp_path / f"{whole_files._unfinished_prefix(tmp_path / 'agent.zip')}{os.getpid()}-1.part"
    running.touch()
    with written_whole(tmp_path / "agent", "zip") as file:
        file.write(b"whole")
    assert names(tmp_path) == sorted([running.name, "agent.zip"])


# ---------------------------------------------------------------------- checksums


def summed(content, before=b""):
    file = io.BytesIO()
    file.write(before)
    with with_checksum(file) as inside:
        for part in content:
            inside.write(part)
    file.seek(len(before))
    return file


@pytest.mark.parametrize("before", [b"", b"something"])
@pytest.mark.parametrize(
    "content", [[], [b"a"], [b"x" * 3_000_000, b"y", memoryview(b"z" * 8_000_000)]], ids=["0", "1", "large"]
)
def test_checksum(content, before):
    file = summed(content, before)
    assert check_checksum(file) and file.tell() == len(before)
    whole = b"".join(bytes(part) for part in content)
    assert file.read(len(whole)) == whole
    skip_checksum(file)
    assert file.read() == b""


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 1000])
def test_no_checksum(content):
    file = io.BytesIO(content)
    assert not check_checksum(file)
    skip_checksum(file)
    assert file.tell() == 0


def test_each_flipped_bit_is_found():
    content = summed([b"some content"]).getvalue()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        try:
            assert not check_checksum(io.BytesIO(flipped)) and flipped.startswith(b"some content")
        except ValueError as error:
            assert "checksum differs" in str(error)


# ---------------------------------------------------------------------- agents


@pytest.fixture(scope="module")
def agent():
    return MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)


# Each of what an agent writes, and how to see that it is whole.
SAVES = {
    "agent.zip": (lambda agent, path: agent.save(path), lambda path: MBPO.load(path)),
    "buffer.pkl": (lambda agent, path: agent.save_replay_buffer(path), None),
    "buffer.pt": (lambda agent, path: agent.save_replay_buffer(path), None),
    "policy.pt": (lambda agent, path: agent.export(path), lambda path: th.jit.load(path)),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_full_disk(tmp_path, agent, name):
    """The system does not let the file grow: what was there before is there afterwards."""
    save, path = SAVES[name][0], tmp_path / name
    save(agent, path)
    before = path.read_bytes()
    for limit in (0, 1000, len(before) - 1):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(agent, path)
            except OSError as error:
                os._exit(3 if f"{name} could not be written; the existing file is unchanged" in str(error) else 4)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert path.read_bytes() == before and names(tmp_path) == [name]


@pytest.mark.expensive
@pytest.mark.parametrize("name", ["agent.zip", "buffer.pkl", "buffer.pt"])
def test_killed_at_random_moments(tmp_path, agent, name):
    """SIGKILL in the midst of 60 saves over a good file: there is always one, and it is whole."""
    rng, path = np.random.default_rng(0), tmp_path / name
    save, load = SAVES[name]
    load = load or (lambda path: MBPO("MlpPolicy", "Pendulum-v1", **FAST).load_replay_buffer(path))
    save(agent, path)
    started = time.perf_counter()
    save(agent, path)
    duration, cut = time.perf_counter() - started, 0
    for _ in range(60):
        before = path.stat().st_ino
        child = os.fork()
        if child == 0:
            save(agent, path)
            os._exit(0)
        time.sleep(duration * 10 ** rng.uniform(-1, 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut += path.stat().st_ino == before
        load(path)
    assert 5 <= cut <= 55, "the moments miss the saves"
    save(agent, path)
    assert names(tmp_path) == [name]
