"""What the figures show, read back from their lines."""

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest

# Where the lock promises it, test_package.py fails for a missing package.
if find_spec("matplotlib") is None:
    pytest.skip("needs sb3_mbpo[plots]", allow_module_level=True)

from sb3_mbpo.diagnostics import report_figures as figures
from sb3_mbpo.diagnostics.diagnosis import Diagnosis
from sb3_mbpo.diagnostics.open_loop import Episode, segments


def made(obs_dim: int = 3, n_steps: int = 40, horizon: int = 8) -> Diagnosis:
    """A random walk, predicted with noise that grows with the first dimension only; the last dimension never moves."""
    rng = np.random.default_rng(0)
    obs = np.cumsum(rng.normal(size=(n_steps + 1, obs_dim)), axis=0)
    obs[:, -1] = 5.0
    episodes = [Episode(obs, rng.uniform(-1, 1, (n_steps, 1)), rng.normal(size=n_steps), False)]
    pieces = [segments(episodes, k) for k in (1, horizon)]
    noise = [rng.normal(size=(19, *one.outcomes.shape)) * np.exp(one.starts[:, None, :1]) * 0.01 for one in pieces]
    for one in noise:
        one[..., -1] = 0.0
    samples = [np.nan_to_num(one.outcomes) + error for one, error in zip(pieces, noise, strict=True)]
    names = ["reward", *(f"obs {i}" for i in range(obs_dim))]
    return Diagnosis(episodes, pieces[0], samples[0], pieces[1], samples[1], np.zeros((19, n_steps), dtype=bool), None, names)


def label_of(axes) -> list[str]:
    return [line.get_label() for line in axes.lines]


def test_fan():
    found = made()
    axes = figures.fan(found, 3).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "the dynamics")
    errors, still = found.distances()
    np.testing.assert_allclose(line.get_ydata(), np.nanmedian(errors, axis=1))
    assert line.get_xdata().tolist() == list(range(1, 9))
    np.testing.assert_allclose(axes.lines[1].get_ydata(), np.nanmedian(still, axis=1))
    assert "current rollout length, 3" in label_of(axes)


def test_trajectories_leave_out_what_never_moves_and_the_best_of_many():
    shown = [axes.get_title(loc="left") for axes in figures.trajectories(made()).axes if axes.get_visible()]
    assert shown == ["reward", "obs 0", "obs 1"]
    many = made(obs_dim=20)
    good = dataclasses.replace(many, further_samples=many.further_samples.copy())
    good.further_samples[..., 4] = np.nan_to_num(good.further.outcomes[..., 4])
    titles = [axes.get_title(loc="left") for axes in figures.trajectories(good).axes if axes.get_visible()]
    assert len(titles) == 12 and "obs 3" not in titles
    real = figures.trajectories(made()).axes[1].lines[1].get_ydata()
    np.testing.assert_allclose(real, made().episodes[0].obs[1:9, 0])


def test_calibration():
    found = made()
    axes = figures.calibration(found, 8).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "1 step ahead")
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 10) / 10)
    expected = [np.nanmean(found.coverage(1, share)[1:]) for share in np.arange(1, 10) / 10]
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_where_the_error_depends_on_the_state():
    assert figures.most_informative_columns(made(n_steps=400))[0] == 0
    axes = figures.where(made(n_steps=400)).axes
    assert axes[0].get_xlabel() == "obs 0"
    # One dimension that moves is enough.
    figures.png(figures.where(made(obs_dim=2)))


def test_returns_and_lengths():
    imagined = np.array([[1.0, 2.0], [np.nan, 4.0]])
    axes = figures.returns([3.0, 5.0], imagined, [7.0, 8.0]).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), imagined.ravel())
    assert [list(line.get_ydata()) for line in axes.lines[1:]] == [[3.0, 5.0], [7.0, 8.0]]
    assert label_of(axes) == ["imagined, sampled actions", "real, sampled actions", "real, deterministic actions"]
    axes = figures.lengths(0.2, 0.9, 5, [0.4, 0.5]).axes[0]
    x, y = axes.lines[0].get_data()
    # 0.9^k 0.4 <= 0.2 from k = 7 on.
    assert y[np.searchsorted(x, 0.4)] == 7 and y[np.searchsorted(x, 0.19)] == 0
    assert label_of(axes).count("$\\epsilon_\\pi$ from earlier policies") == 1


def test_pictures_are_pngs():
    assert figures.png(figures.fan(made(), 1)).startswith(b"\x89PNG")
