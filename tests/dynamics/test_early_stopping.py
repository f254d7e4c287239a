import math

import pytest

from sb3_mbpo.dynamics.early_stopping import DECAY_SHARE, LEAST_DECAY, WARM_UP, FitSchedule


def rates_of(schedule: FitSchedule, improves_until: float) -> list[float]:
    """A fit that looks every 50 steps and improves until a step."""
    rates: list[float] = []
    while piece := schedule.next_rates(50):
        rates += piece
        schedule.look(len(rates) <= improves_until)
    return rates


@pytest.mark.parametrize(("until", "decay"), [(0, LEAST_DECAY), (1000, int(DECAY_SHARE * 1200))])
def test_ends_after_patience_and_a_decay(until, decay):
    rates = rates_of(FitSchedule(1e-3, 200, math.inf), until)
    constant = until + 200
    assert len(rates) == constant + decay
    assert rates[:WARM_UP] == pytest.approx([1e-3 * (i + 1) / WARM_UP for i in range(WARM_UP)])
    assert set(rates[WARM_UP:constant]) == {1e-3}
    assert rates[constant:] == pytest.approx([1e-3 * (1 - i / decay) for i in range(decay)])


@pytest.mark.parametrize("most", [1, 49, 60, 100, 333, 1000])
def test_never_more_than_allowed_and_always_decays(most):
    rates = rates_of(FitSchedule(1e-3, 10**6, most), math.inf)
    assert len(rates) == most
    # The last steps are small ones, and the decay has its share.
    assert most < 60 or rates[-1] < 0.05e-3
    assert most < 333 or sum(rate < 1e-3 for rate in rates[WARM_UP:]) >= DECAY_SHARE / (1 + DECAY_SHARE) * most - 1


def test_no_patience_at_all():
    assert len(rates_of(FitSchedule(1e-3, 0, math.inf), math.inf)) == LEAST_DECAY
