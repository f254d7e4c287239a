"""benchmarks/gpu.py, in its tiny version: it is to be ready when a GPU is."""

import math

import gpu
import pytest


# The buffer is filled by hand.
@pytest.mark.filterwarnings("ignore:No episode has ended")
@pytest.mark.expensive
@pytest.mark.parametrize("measure", gpu.MEASURES)
def test_measures(measure):
    rows = list(gpu.MEASURES[measure]("cpu", tiny=True))
    assert rows and all(math.isfinite(value) for _, _, value, _ in rows)


@pytest.mark.expensive
def test_parts_make_the_whole():
    values = {name: value for name, _, value, _ in gpu.hopper("cpu", tiny=True)}
    phases = ("updates", "fits", "rollouts", "env and all else")
    assert all(values[f"hopper, {phase}"] > 0 for phase in phases)
    assert sum(values[f"hopper, {phase}"] for phase in phases) == pytest.approx(values["hopper, all"])
