import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.model_buffer import ModelBuffer


def imagined(values: list[int]) -> ReplayBufferSamples:
    """Transitions whose every number tells their origin: -1 - value."""
    column = -1.0 - th.tensor(values, dtype=th.float32).unsqueeze(1)
    return ReplayBufferSamples(column.repeat(1, 3), column.repeat(1, 2), column.repeat(1, 3), th.zeros_like(column), column)


def contents(buffer: ModelBuffer) -> list[int]:
    """The numbers in a model buffer, oldest first."""
    rows, refills = buffer.contents()
    assert refills == list(buffer.refills) and sum(refills) == len(rows)
    assert (rows[:, [0, 3, 4, 5, 7, 9]] == rows[:, :1]).all() and (rows[:, 8] == 0).all()
    return (-1 - rows[:, 0]).int().tolist()


def flat(parts: list[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def test_retention_by_refills():
    """Against a plain list of lists, over many refills of changing size, in several pieces each."""
    rng = np.random.default_rng(0)
    buffer, expected, number = ModelBuffer(3, 2, retained_rollouts=3), [], 0
    for _ in range(60):
        buffer.begin_refill()
        expected = [*expected, []][-3:]
        for _ in range(rng.integers(0, 4)):
            values = list(range(number, number + int(rng.integers(0, 30))))
            number += len(values)
            buffer.add(imagined(values))
            expected[-1] += values
            assert contents(buffer) == flat(expected)
    assert [len(part) for part in expected] == list(buffer.refills)


def test_bound_on_rows():
    rng = np.random.default_rng(1)
    buffer, expected, number = ModelBuffer(3, 2, retained_rollouts=2, max_rows=25), [], 0
    for _ in range(80):
        if rng.random() < 0.4 or not buffer.refills:
            buffer.begin_refill()
            expected = [*expected, []][-2:]
        values = list(range(number, number + int(rng.integers(0, 40))))
        number += len(values)
        buffer.add(imagined(values))
        expected[-1] += values
        surplus = len(flat(expected)) - 25
        for part in expected:
            dropped = min(max(surplus, 0), len(part))
            del part[:dropped]
            surplus -= dropped
        assert contents(buffer) == flat(expected) and len(buffer.rows) <= 25


def test_memory_follows_the_content():
    buffer = ModelBuffer(3, 2, retained_rollouts=4)
    assert buffer.rows.numel() == 0
    for _ in range(12):
        buffer.begin_refill()
        for _ in range(10):
            buffer.add(imagined(list(range(100))))
    assert len(buffer) == 4000 and len(buffer.rows) <= 6000


def test_model_buffer_samples_uniformly():
    buffer = ModelBuffer(3, 2, retained_rollouts=2)
    for first in (0, 10, 20):
        buffer.begin_refill()
        buffer.add(imagined(list(range(first, first + 10))))
    drawn = (-1 - buffer.sample(40_000, th.Generator().manual_seed(0))[:, -1]).int().flatten().bincount(minlength=30)
    assert (drawn[:10] == 0).all() and ((drawn[10:] > 1800) & (drawn[10:] < 2200)).all()


def test_imagined_rows_of_another_precision():
    buffer = ModelBuffer(3, 2)
    buffer.begin_refill()
    buffer.add(ReplayBufferSamples(*(part.double() for part in imagined([0, 1])[:5])))
    assert contents(buffer) == [0, 1] and buffer.rows.dtype == th.float32


def test_restored_by_a_buffer_with_other_limits():
    full = ModelBuffer(3, 2, retained_rollouts=4)
    for first, last in ((0, 10), (10, 12), (12, 12), (12, 40)):
        full.begin_refill()
        full.add(imagined(list(range(first, last))))
    for kwargs, expected in [
        ({}, [10, 2, 0, 28]),
        ({"retained_rollouts": 6}, [10, 2, 0, 28]),
        ({"retained_rollouts": 2}, [0, 28]),
        ({"max_rows": 29}, [0, 1, 0, 28]),
    ]:
        other = ModelBuffer(3, 2, **kwargs)
        other.begin_refill()
        other.add(imagined([99]))
        other.restore(*full.contents())
        assert list(other.refills) == expected and contents(other) == list(range(40 - sum(expected), 40))


def test_a_refill_taken_back_and_repeated():
    """Whatever part of it was there: after the whole one, the buffer holds what it would have held at once."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        limits = {"retained_rollouts": int(rng.integers(1, 4)), "max_rows": [None, 25][rng.integers(2)]}
        once, twice = ModelBuffer(3, 2, **limits), ModelBuffer(3, 2, **limits)
        for i, size in enumerate(rng.integers(0, 20, size=5)):
            values = list(range(100 * i, 100 * i + size))
            twice.begin_refill()
            twice.add(imagined(values[: size // 2]))
            twice.drop_refill()
            for buffer in (once, twice):
                buffer.begin_refill()
                buffer.add(imagined(values))
            assert contents(once) == contents(twice)
            assert list(once.refills) == list(twice.refills)


@pytest.mark.parametrize("sizes", [(3,), (3, 4), (3, 0), (0, 4), (0, 0), (3, 4, 5)])
@pytest.mark.parametrize("retained", [1, 2, 5])
def test_several_refills_taken_back(retained, sizes):
    """None of them stays, and of those before only what had not left."""
    buffer = ModelBuffer(3, 2, retained)
    for i in range(3):
        buffer.begin_refill()
        buffer.add(imagined([i, i]))
    before, begun = contents(buffer), buffer.begun
    for size in sizes:
        buffer.begin_refill()
        if size:
            buffer.add(imagined([99] * size))
    for _ in sizes:
        buffer.drop_refill()
    kept = contents(buffer)
    assert buffer.begun == begun and 99 not in kept and kept == before[len(before) - len(kept) :]
    assert len(kept) >= 2 * min(3, max(retained - len(sizes), 0))
    buffer.begin_refill()
    buffer.add(imagined([7]))
    assert contents(buffer)[-1] == 7


def test_a_refill_without_rows_leaves_no_trace():
    """What left for it is back, as long as nothing came in; a ring that is full included."""
    for limits in ({"retained_rollouts": 1}, {"retained_rollouts": 3}, {"retained_rollouts": 3, "max_rows": 25}):
        buffer = ModelBuffer(3, 2, **limits)
        for i in range(7):
            buffer.begin_refill()
            buffer.add(imagined(list(range(10 * i, 10 * i + 10))))
            before = contents(buffer), list(buffer.refills)
            buffer.begin_refill(10)
            assert list(buffer.refills) != before[1]
            buffer.drop_refill()
            assert (contents(buffer), list(buffer.refills)) == before


def test_spread_and_rewards():
    """At even distances in age, whatever the ring has been through; nothing is drawn, nothing changed."""
    buffer = ModelBuffer(1, 1, retained_rollouts=2)
    for first in (0, 100, 200):
        buffer.begin_refill()
        rows = th.arange(first, first + 100).float().unsqueeze(1)
        buffer.add(ReplayBufferSamples(rows, rows, rows, rows, -rows))
    assert buffer.evenly_spaced(4)[:, 0].tolist() == [149, 199, 249, 299]
    assert buffer.evenly_spaced(1000)[:, 0].tolist() == list(range(100, 300)) and buffer.evenly_spaced(1000).shape == (200, 5)
    assert buffer.rewards().tolist() == [[-float(i)] for i in range(100, 300)]
    empty = ModelBuffer(1, 1)
    assert empty.evenly_spaced(4).shape == (0, 5) and empty.rewards().shape == (0, 1)


def test_relabeled_rows_end_by_the_new_rule_and_are_paid_accordingly():
    buffer = ModelBuffer(1, 1, retained_rollouts=2)
    obs = th.arange(10.0).unsqueeze(1)
    # Until now, episodes ended from 7 on; the ring has wrapped around.
    for first in (100.0, 0.0, 0.0):
        ended = (obs >= 7).float()
        buffer.begin_refill()
        buffer.add(ReplayBufferSamples(obs + first, obs, obs + first, ended, obs - 20 * ended))
    changed = buffer.relabel(
        lambda obs, actions, next_obs: next_obs.flatten() >= 4,
        lambda obs, actions, next_obs, ended: 1000 - 20.0 * ended.float(),
        block=3,
    )
    rows, refills = buffer.contents()
    assert changed == 2 * 3 and refills == [10, 10]
    for part in rows.split(10):
        expected = (obs >= 4).float().flatten()
        assert th.equal(part[:, 0], obs.flatten()) and th.equal(part[:, 3], expected)
        assert th.allclose(part[:, 4], obs.flatten() - 20 * expected, atol=1e-3)
    assert buffer.relabel(lambda obs, actions, next_obs: next_obs.flatten() >= 8, None) == 2 * 4
    assert th.equal(buffer.contents()[0][:10, 3], (obs >= 8).float().flatten())
    assert ModelBuffer(1, 1).relabel(lambda *transition: transition[0].flatten() > 0, None) == 0
