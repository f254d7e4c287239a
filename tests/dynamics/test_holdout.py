import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from test_probabilistic_ensemble import linear_system

from sb3_mbpo.dynamics.holdout import held_out, row_hash


def first(data: ReplayBufferSamples, n: int) -> ReplayBufferSamples:
    return ReplayBufferSamples(*(part[:n] for part in data[:5]))


def test_a_transition_stays_on_its_side():
    """While the data grow, in another order, and among others; a copy of it is on the same side."""
    data = linear_system(2000)
    chosen = held_out(data, 0.2, 5000)
    assert 0.17 < chosen.float().mean() < 0.23
    assert th.equal(held_out(first(data, 500), 0.2, 5000), chosen[:500])
    order = th.randperm(2000, generator=th.Generator().manual_seed(0))
    twice = ReplayBufferSamples(*(th.cat([part[order], part]) for part in data[:5]))
    assert th.equal(held_out(twice, 0.2, 5000), th.cat([chosen[order], chosen]))


def test_a_bound_lets_rows_leave_and_none_enter():
    data = linear_system(3000)
    few, many = held_out(data, 0.2, 100), held_out(data, 0.2, 5000)
    assert 70 < few.sum() < 130 and not (few & ~many).any()


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_at_least_one_row_on_either_side(n):
    for seed in range(20):
        chosen = held_out(linear_system(n, seed=seed), 0.2, 1000)
        assert 1 <= chosen.sum() < n


def test_copies_of_one_row():
    data = ReplayBufferSamples(*(part[:1].expand(100, -1) for part in linear_system(2)[:5]))
    assert held_out(data, 0.2, 1000).sum() == 20


def test_neighbors_are_independent():
    """Rows that follow each other differ in little; on which side one is says nothing about the next."""
    steps = th.arange(4000.0).unsqueeze(1)
    data = ReplayBufferSamples(steps, th.zeros(4000, 1), steps + 1, th.zeros(4000, 1), th.zeros(4000, 1))
    number = row_hash(data)
    assert (number >= 0).all() and (number < 1).all()
    counts = th.histc(number.float(), 10, 0, 1)
    assert (counts > 320).all() and (counts < 480).all()
    assert th.corrcoef(th.stack([number[1:], number[:-1]]))[0, 1].abs() < 0.06
