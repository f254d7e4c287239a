"""Figures: what is drawn is what was measured."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
if any(find_spec(name) is None for name in ("rliable", "pandas", "matplotlib")):
    pytest.skip("needs sb3_mbpo[compare]", allow_module_level=True)

import pandas as pd
from matplotlib.colors import to_rgb

from sb3_mbpo.compare import aggregates, plots
from sb3_mbpo.compare.aggregates import interval


@pytest.fixture(autouse=True)
def fewer_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "REPETITIONS", 100)


def results(env: str = "E", algorithm: str = "a", seeds: int = 3, slowness: float = 60, episodes: int = 2) -> pd.DataFrame:
    """Returns 100 seed + step ± 1; a step takes as many seconds as the slowness says."""
    return pd.DataFrame(
        [
            {"env": env, "algorithm": algorithm, "seed": seed, "step": step, "episode": i, "seconds": slowness * step}
            | {"return": 100 * seed + step + 2 * i - 1}
            for seed in range(seeds)
            for step in (0, 10, 20)
            for i in range(episodes)
        ]
    )


def curves(figure: Any, panel: int) -> list[tuple[list[float], list[float]]]:
    lines = (line.get_xydata() for line in figure.axes[panel].lines)
    return [(xy[:, 0].tolist(), xy[:, 1].tolist()) for xy in map(np.asarray, lines) if len(xy)]


def test_curve_against_steps() -> None:
    figure = plots.draw(results(), "E")
    assert curves(figure, 0) == [([0, 10, 20], [100, 110, 120])]
    assert figure.axes[0].get_xlabel() == "env steps" and "minutes" in figure.axes[1].get_xlabel()
    (band,) = figure.axes[0].collections
    low, high = interval(np.array([[100 * seed + step for step in (0, 10, 20)] for seed in range(3)]))
    edges = np.asarray(band.get_paths()[0].vertices)
    assert edges[:, 1].min() == low.min() and edges[:, 1].max() == high.max()
    assert figure.get_suptitle() == "E"


def test_curve_against_minutes() -> None:
    rows = pd.concat([results(slowness=60), results(algorithm="b", slowness=30)])
    first, second = curves(plots.draw(rows, "E"), 1)
    assert first[0][-1] == 20 and first[1][-1] == 120
    assert second[0][-1] == 10 and second[1][-1] == 120
    # Half of b's time, half of its steps.
    assert np.interp(5, *second) == pytest.approx(110)


def test_few_seeds_are_shown_one_by_one() -> None:
    one, two, three = (plots.draw(results(seeds=n), "E") for n in (1, 2, 3))
    assert [len(curves(figure, panel)) for figure in (one, two, three) for panel in (0, 1)] == [2, 2, 3, 3, 1, 1]
    assert curves(two, 0)[1:] == [([0, 10, 20], [0, 10, 20]), ([0, 10, 20], [100, 110, 120])]
    # One seed has no interval.
    drawn = [np.asarray(band.vertices) for band in one.axes[0].collections[0].get_paths()]
    assert not any(np.isfinite(vertices).all(axis=1).any() for vertices in drawn)


def test_threshold_is_marked() -> None:
    assert (curves(plots.draw(results(), "E", threshold=42), 0)[-1])[1] == [42, 42]


def test_legend_names_all() -> None:
    rows = pd.concat([results(), results(algorithm="sac:" + "x" * 100, seeds=1)])
    (legend,) = plots.draw(rows, "E").legends
    first, second = (text.get_text() for text in legend.get_texts())
    assert first == "a (3 seeds)" and second.replace("\n", "") == f"sac:{'x' * 100} (1 seed)"
    assert max(map(len, second.split("\n"))) < 80


def test_algorithms_look_different() -> None:
    looks = [plots.look(i) for i in range(len(plots.COLOURS) * len(plots.STYLES))]
    assert len({tuple(look.values()) for look in looks}) == len(looks)
    # Also where colours cannot be seen, for the first few.
    grey = sorted(float(np.dot(to_rgb(look["color"]), (0.21, 0.72, 0.07))) for look in looks[:3])
    assert min(np.diff(grey)) > 0.02


def test_nothing_is_cut_off() -> None:
    labels = ["mbpo", "sac", "sac:gradient_steps=20", "tqc:" + "y" * 90]
    rows = pd.concat([results(algorithm=label) for label in labels])
    figure: Any = plots.draw(rows, "E")
    figure.savefig("x.png")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
    # Below the panels, not on them.
    assert all(axes.get_tightbbox().y0 > box.y1 - 2 for axes in figure.axes)


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pd.concat([results("E/a-v0"), results("F-v0")]).to_csv("results.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["plots", "results.csv"])
    plots.main()
    assert capsys.readouterr().out.split() == ["E_a-v0.png", "F-v0.png"]
    assert Path("F-v0.png").read_bytes().startswith(b"\x89PNG") and "<svg" in Path("E_a-v0.svg").read_text()
