import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.model_buffer import ModelBuffer
from sb3_mbpo.buffers.rollout_blocks import is_out_of_memory, refill


def imagined(start_obs: th.Tensor) -> ReplayBufferSamples:
    column = start_obs[:, :1]
    return ReplayBufferSamples(start_obs, column, start_obs, th.zeros_like(column), column)


class Short:
    """Imagines as many branches at once as there is room for; notes what it was asked for."""

    def __init__(self, room: int, error: BaseException):
        self.room, self.error = room, error
        self.asked: list[int] = []

    def __call__(self, start_obs):
        self.asked.append(len(start_obs))
        if len(start_obs) > self.room:
            raise self.error
        return imagined(start_obs)


def begun(**kwargs) -> ModelBuffer:
    buffer = ModelBuffer(2, 1, **kwargs)
    buffer.begin_refill()
    return buffer


START = th.arange(100.0).unsqueeze(1).repeat(1, 2)


@pytest.mark.parametrize(("block", "asked"), [(1000, [100]), (100, [100]), (30, [30, 30, 30, 10]), (1, [1] * 100)])
def test_blocks(block, asked):
    buffer, imagine, said = begun(), Short(1000, MemoryError()), []
    assert refill(buffer, imagine, START, block, said.append) == block
    assert imagine.asked == asked and buffer.contents()[0][:, 0].tolist() == list(range(100))
    assert len(said) == len(asked) and said[-1] == "imagining, 100 of 100 branches"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        th.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_halves_until_there_is_room_and_keeps_order(error):
    buffer, imagine = begun(), Short(7, error)
    assert refill(buffer, imagine, START, 60, str) == 7
    assert imagine.asked == [60, 30, 15, *[7] * 14, 2]
    assert buffer.contents()[0][:, 0].tolist() == list(range(100)) and list(buffer.refills) == [100]


def test_a_short_last_block_is_halved_from_its_own_size():
    buffer, asked = begun(), []

    def imagine(start_obs):
        asked.append(len(start_obs))
        if asked == [60, 40]:
            raise MemoryError
        return imagined(start_obs)

    assert refill(buffer, imagine, START, 60, str) == 20
    assert asked == [60, 40, 20, 20] and len(buffer) == 100


def test_no_room_for_one():
    buffer, imagine = begun(max_rows=500), Short(100, MemoryError("numbers"))
    refill(buffer, imagine, START, 50, str)
    buffer.begin_refill()
    imagine.room = 0
    with pytest.raises(MemoryError, match=r"(?s)rollout_batch_size=100.*model_buffer_size=500") as caught:
        refill(buffer, imagine, START, 8, str)
    assert caught.value.__cause__ is imagine.error and imagine.asked[-4:] == [8, 4, 2, 1]
    # What was there before is there still.
    assert list(buffer.refills) == [100, 0] and len(buffer.contents()[0]) == 100


def test_other_errors_pass():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught:
        refill(begun(), Short(0, error), START, 10, str)
    assert caught.value is error


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("kwargs", [{}, {"max_rows": 90}])
def test_memory_that_runs_out_in_the_model_buffer(monkeypatch, at, kwargs):
    """Its own allocations fail one after the other; nothing comes in twice, by halves or out of order."""
    buffer = begun(**kwargs)
    buffer.add(imagined(START[:40] - 1000))
    buffer.begin_refill()
    calls = 0
    for owner, name in ((th, "cat"), (th, "arange"), (ModelBuffer, "_grow")):
        original = getattr(owner, name)

        def failing(*args, original=original, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise MemoryError
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
    refill(buffer, imagined, START[:60], 32, str)
    monkeypatch.undo()
    rows = buffer.contents()[0][:, 0].tolist()
    assert calls > at and rows[-60:] == list(range(60))
    assert rows[:-60] == list(range(-1000, -960))[-len(rows[:-60]) :] and list(buffer.refills) == [len(rows) - 60, 60]


def test_what_pytorch_and_numpy_say_in_earnest():
    for allocate in (lambda: th.empty(2**60, dtype=th.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape")) and not is_out_of_memory(ValueError("out of memory"))
