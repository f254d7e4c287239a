"""benchmarks/speed.py: the sides that need no peer, once each and short."""

import math
from itertools import islice

import pytest
import speed


@pytest.mark.expensive
@pytest.mark.parametrize(
    ("row", "steps"), [("updates", 0), ("flops", 0), ("batches", 0), ("overhead", 100), ("growth", 10), ("dhmbpo", 0)]
)
def test_rows(row, steps, monkeypatch):
    experienced = speed.experienced_agent
    # At the real sizes its twenty fits take a quarter of an hour.
    monkeypatch.setattr(speed, "experienced_agent", lambda n: experienced(n // 500 + 200))
    for comparison in islice(speed.ROWS[row].compare(steps), 1):
        sides = [comparison.ours(), comparison.theirs()]
    assert sides[0].keys() & sides[1].keys()
    assert all(math.isfinite(value) and value >= 0 for side in sides for value in side.values())


@pytest.mark.expensive
def test_phases_of_a_loop():
    """They cover the loop, but for a little; gradient steps of both kinds are counted, not timed."""
    figures = speed.run(speed.MBPO("MlpPolicy", "Hopper-v5", seed=0, learning_starts=99), 150)
    assert figures["updates"] == 20 * 51 and figures["fit steps"] >= 100
    assert 0 < figures["rest"] < 0.2 * figures["whole loop"]
