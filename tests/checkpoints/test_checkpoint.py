import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_mbpo.checkpoints import checkpoint
from sb3_mbpo.checkpoints.checkpoint import CheckpointError, listed, newest, prune, read, write


def content(i: int, size: int = 100):
    return {"number": i, "text": "x" * 50}, {"a": th.full((size,), float(i)), "b": th.arange(7)}


def same(found, i: int) -> bool:
    state, tensors = found[:2]
    wanted = content(i, len(tensors["a"]))
    return state == wanted[0] and all(th.equal(tensors[name], wanted[1][name]) for name in ("a", "b"))


def test_write_and_read(tmp_path):
    written = write(tmp_path / "run", *content(3), step=250, score=-1.5)
    assert (written.number, written.step, written.score) == (1, 250, -1.5)
    assert same(read(written.path), 3)
    *found, place = newest(tmp_path / "run")
    assert same(found, 3) and place == written
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["00001-step-250"]
    assert {"torch", "sb3_mbpo", "python"} <= set(written.manifest["versions"])


def test_nothing_there(tmp_path):
    assert newest(tmp_path / "nowhere") is None and list(listed(tmp_path / "nowhere")) == []


def test_the_newest_counts_and_not_the_step(tmp_path):
    for i, step in enumerate([100, 300, 200]):
        write(tmp_path, *content(i), step=step)
    assert same(newest(tmp_path), 2)
    assert [one.step for one in listed(tmp_path)] == [200, 300, 100]


def test_size_is_that_of_what_is_filled(tmp_path):
    """A part of a tensor does not bring the rest of it along."""
    write(tmp_path, {}, {"part": th.zeros(1_000_000)[:10]}, step=1)
    assert (tmp_path / "00001-step-1" / "tensors.pt").stat().st_size < 5_000


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for i, score in enumerate([None, 5.0, 9.0, 1.0, 9.0, 2.0, None, 3.0]):
        write(tmp_path, *content(i), step=i, score=score)
    prune(tmp_path, keep=2)
    # Of equal scores the later one.
    assert [one.step for one in listed(tmp_path)] == [7, 6, 4]
    prune(tmp_path, keep=1, keep_best=False)
    assert [one.step for one in listed(tmp_path)] == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00008-step-7"]


def test_prune_removes_what_killed_writers_left(tmp_path):
    write(tmp_path, *content(0), step=0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    # A process that runs; one that does not; and one that had the number that is now this one's.
    names = [f".00002-step-9.{process}" for process in (os.getppid(), child, os.getpid())]
    for name in names:
        (tmp_path / name).mkdir()
    prune(tmp_path, keep=1)
    assert [(tmp_path / name).exists() for name in names] == [True, False, False]


@pytest.mark.parametrize("is_whole", [True, False])
def test_prune_follows_no_links(tmp_path, is_whole):
    """To a checkpoint of another run: the link goes, and what it points to stays."""
    other = write(tmp_path / "other", *content(7), step=7).path
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "00001-step-7").symlink_to(other, target_is_directory=True)
    if not is_whole:
        (other / "manifest.json").unlink()
        (other / "kept").touch()
    for i in range(2):
        write(folder, *content(i), step=10 + i)
        prune(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["00002-step-10", "00003-step-11"]
    assert same(read(other), 7) if is_whole else (other / "kept").exists()


def test_a_manifest_that_nests_too_deep(tmp_path):
    """It is passed over, and named with what to use instead."""
    write(tmp_path, *content(0), step=10)
    bad = write(tmp_path, *content(1), step=20).path
    (bad / "manifest.json").write_text("[" * 100_000 + "]" * 100_000)
    assert same(newest(tmp_path), 0) and [one.step for one in listed(tmp_path)] == [10]
    with pytest.raises(CheckpointError, match=r"00002-step-20: manifest\.json.*Use .*00001-step-10"):
        read(bad)


@pytest.mark.parametrize("name", ["state.json", "tensors.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_one_is_named_and_passed_over(tmp_path, name, damage):
    write(tmp_path, *content(0), step=10)
    bad = write(tmp_path, *content(1), step=20).path
    path = bad / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[data.index(b"torch" if name == "manifest.json" else b"t")] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read(bad)
    assert str(bad) in str(error.value) and name in str(error.value) and "00001-step-10" in str(error.value)
    assert same(newest(tmp_path), 0)
    shutil.rmtree(tmp_path / "00001-step-10")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read(.|\n)*start anew"):
        newest(tmp_path)


def test_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = write(tmp_path, *content(0), step=1).path
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 99.*reads format 3"):
        read(path)


def test_a_pickle_in_its_place_is_not_opened(tmp_path):
    """Even where its checksum is right."""
    import pickle

    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (marker,)

    path = write(tmp_path, *content(0), step=1).path
    th.save({"a": Hostile()}, path / "tensors.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    _, size, digest = checkpoint._measure(path / "tensors.pt")
    manifest["files"]["tensors.pt"] = {"bytes": size, "sha256": digest}
    manifest["sha256"] = checkpoint._digest({key: value for key, value in manifest.items() if key != "sha256"})
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        read(path)
    assert not marker.exists()


def test_a_failed_write_leaves_nothing(tmp_path):
    write(tmp_path, *content(0), step=10)
    with pytest.raises(ValueError):
        write(tmp_path, {"x": float("nan")}, {}, step=20)
    assert [path.name for path in tmp_path.iterdir()] == ["00001-step-10"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "run", *content(0), step=1)


@pytest.mark.expensive
def test_killed_at_random_moments(tmp_path):
    """SIGKILL in the midst of 200 saves: there is always a newest checkpoint, and it is whole."""
    rng = np.random.default_rng(0)
    write(tmp_path, *content(0, 300_000), step=0)
    started, cut = time.perf_counter(), 0
    for _ in range(5):
        write(tmp_path, *content(0, 300_000), step=0)
    duration = (time.perf_counter() - started) / 5
    for i in range(1, 201):
        child = os.fork()
        if child == 0:
            write(tmp_path, *content(i, 300_000), step=i)
            prune(tmp_path, keep=2)
            os._exit(0)
        # From its very beginning to well after its end.
        time.sleep(duration * 10 ** rng.uniform(-1, 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        *found, place = newest(tmp_path)
        assert same(found, place.step) and place.step <= i
        cut += place.step != i
    prune(tmp_path, keep=2)
    assert 20 <= cut <= 190, "the moments miss the saves"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.expensive
def test_full_disk(tmp_path):
    """Twenty saves that the system does not let grow beyond some size: an error, and everything is as it was."""
    write(tmp_path, *content(0, 100_000), step=0)
    for limit in np.linspace(100, 390_000, 20).astype(int):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
            try:
                write(tmp_path, *content(1, 100_000), step=1)
            except OSError as error:
                os._exit(3 if "00002-step-1 could not be written" in str(error) else 4)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert same(newest(tmp_path), 0) and [path.name for path in tmp_path.iterdir()] == ["00001-step-0"]


@pytest.mark.expensive
@pytest.mark.parametrize("name", ["state.json", "tensors.pt", "manifest.json"])
def test_cut_at_many_lengths_and_bits_flipped(tmp_path, name):
    """50 lengths and 200 bits of each file: what loads is the older one, or equal to what was written."""
    write(tmp_path, *content(0), step=10)
    bad = write(tmp_path, *content(1), step=20).path
    path, rng = bad / name, np.random.default_rng(0)
    data = path.read_bytes()
    for length in np.linspace(0, len(data) - 1, 50).astype(int):
        path.write_bytes(data[:length])
        assert same(newest(tmp_path), 0)
        with pytest.raises(CheckpointError, match=f"{name}(.|\n)*00001-step-10"):
            read(bad)
    for position, bit in zip(rng.integers(len(data), size=200), rng.integers(8, size=200), strict=True):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        *found, place = newest(tmp_path)
        # White space between the words of the manifest means nothing.
        assert same(found, 0 if place.step == 10 else 1)
        assert name == "manifest.json" or place.step == 10
