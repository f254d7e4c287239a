"""
The bounds of sb3_mbpo.theory put to the test on finite MDPs: docs/theory/search.csv and docs/theory/bounds.png.

    python benchmarks/bounds.py             # both; some minutes
    python benchmarks/bounds.py --figure    # only the figure

Random MDPs of three kinds, and such as are climbed to from random ones: changes are kept that bring a gap nearer to its bound.
A case is an MDP, its model and policies, and a k.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabular import Pairs, leaky

from sb3_mbpo import theory

DOCS = Path(__file__).resolve().parent.parent / "docs" / "theory"
COLUMNS = "bound rewards errors family cases violations worst_ratio states actions gamma k".split()
# How far probabilities are from even, and rewards from 0.
FAMILIES = {"dense": 1.0, "sparse": 4.0, "nearly deterministic": 15.0}
SIZES = [(2, 2), (3, 2), (5, 3)]
GAMMAS = (0.1, 0.5, 0.8, 0.9, 0.99)
LENGTHS = (0, 1, 2, 5, 20)
CLIMBERS, CLIMB_STEPS = 32, 400


class Check(NamedTuple):
    """
    :param gap: of pairs, at k
    :param bound: of k, model error, policy shift and discount
    :param of_data: the model's error is meant where the data are, not where the policy goes
    """

    gap: Callable[[Pairs, int], np.ndarray]
    bound: Callable[[int, float, float, float], float]
    of_data: bool = False


def branched(function: Callable[..., float], ahead: int, times_gamma: int = 0, of_data: bool = False) -> Check:
    """
    :param ahead: k counts imagined transitions (0), or imagined states, which is one fewer (1)
    :param times_gamma: power of gamma before the bound
    """
    return Check(
        lambda pairs, k: pairs.branched_return_gap(k + ahead),
        lambda k, error, shift, gamma: (
            gamma**times_gamma * function(k=k, model_error=error, policy_shift=shift, gamma=gamma, r_max=1)
        ),
        of_data,
    )


def same_policy(k: int, error: float, shift: float, gamma: float) -> float:
    return theory.return_gap(model_error=error, gamma=gamma, r_max=1)


def other_policy(k: int, error: float, shift: float, gamma: float) -> float:
    return theory.return_gap(model_error=error, policy_shift=shift, gamma=gamma, r_max=1)


def with_reward_error(k: int, error: float, shift: float, gamma: float) -> float:
    return other_policy(k, error, shift, gamma) + 2 * error / (1 - gamma)


def full(bound: Callable[[int, float, float, float], float], of_data: bool = False) -> Check:
    return Check(lambda pairs, k: pairs.return_gap(), bound, of_data)


# Rewards -> bound -> check
CHECKS: dict[str, dict[str, Check]] = {
    "r(s, a)": {
        "visitation_gap": Check(
            lambda pairs, k: pairs.visitation_gap(),
            lambda k, error, shift, gamma: theory.visitation_gap(model_error=error, gamma=gamma),
        ),
        "return_gap without policy_shift": full(same_policy),
        "return_gap": full(other_policy, of_data=True),
        "branched_return_gap": branched(theory.branched_return_gap, 1, of_data=True),
        "branched_return_gap_on_policy": branched(theory.branched_return_gap_on_policy, 1),
        "quoted_branched_return_gap": branched(theory.quoted_branched_return_gap, 1),
        "gamma sharp_branched_return_gap": branched(theory.sharp_branched_return_gap, 1, times_gamma=1),
    },
    "r(s, a, s')": {
        "return_gap without policy_shift": full(same_policy),
        "return_gap": full(other_policy, of_data=True),
        "return_gap + 2 r_max model_error / (1 - gamma)": full(with_reward_error, of_data=True),
        "branched_return_gap": branched(theory.branched_return_gap, 0, of_data=True),
        "branched_return_gap_on_policy": branched(theory.branched_return_gap_on_policy, 0),
        "quoted_branched_return_gap": branched(theory.quoted_branched_return_gap, 0),
        "sharp_branched_return_gap": branched(theory.sharp_branched_return_gap, 0),
    },
}


class Space(NamedTuple):
    """Pairs of one size, described by vectors of any real numbers."""

    states: int
    actions: int
    rewards: str
    scale: float
    gamma: float

    def shapes(self) -> list[tuple[int, ...]]:
        s, a = self.states, self.actions
        return [(s,), (s, a, s), (s, a, s), (s, a), (s, a), (s, a, s if self.rewards == "r(s, a, s')" else 1), (2,)]

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(n, sum(int(np.prod(shape)) for shape in self.shapes())))

    def pairs(self, vectors: np.ndarray) -> Pairs:
        ends = np.cumsum([np.prod(shape) for shape in self.shapes()])
        parts = [part.reshape(-1, *shape) for part, shape in zip(np.split(vectors, ends[:-1], 1), self.shapes(), strict=True)]
        start, true, other, policy, other_policy = (self._probabilities(part) for part in parts[:5])
        # Between the same and all the other: bounds are nearest where errors are small.
        model_share, policy_share = np.exp(-3 * np.abs(parts[6])).T
        model = true + model_share[:, None, None, None] * (other - true)
        data_policy = policy + policy_share[:, None, None] * (other_policy - policy)
        return Pairs(start, true, model, np.tanh(self.scale * parts[5]), policy, data_policy, self.gamma)

    def _probabilities(self, part: np.ndarray) -> np.ndarray:
        weights = np.exp(self.scale * (part - part.max(axis=-1, keepdims=True)))
        return weights / weights.sum(axis=-1, keepdims=True)


def gaps_and_bounds(check: Check, pairs: Pairs, k: int, errors: str) -> tuple[np.ndarray, np.ndarray]:
    """
    :param errors: "mean" or "largest"
    :return: one of each for every pair
    """
    if errors == "largest":
        model_errors = pairs.largest_error()
    else:
        model_errors = pairs.mean_error(pairs.data_policy if check.of_data else pairs.policy)
    # By rounding a sum of probabilities may be a little more than 1.
    known = zip(np.minimum(model_errors, 1), np.minimum(pairs.policy_shift(), 1), strict=True)
    return check.gap(pairs, k), np.array([check.bound(k, error, shift, pairs.gamma) for error, shift in known])


def judged(gaps: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:return: ratios of gap to bound, 0 where both are nothing but rounding; which are violations"""
    ratios = np.divide(gaps, bounds, out=np.zeros_like(gaps), where=np.maximum(gaps, bounds) > 1e-7)
    return ratios, gaps > bounds * (1 + 1e-6) + 1e-9


Row = dict[str, Any]
Rows = dict[tuple[str, ...], Row]


def note(rows: Rows, key: tuple[str, ...], gaps: np.ndarray, bounds: np.ndarray, of: Row) -> np.ndarray:
    ratios, violations = judged(gaps, bounds)
    row = rows.setdefault(key, {"cases": 0, "violations": 0, "worst_ratio": -1.0})
    row["cases"] += len(gaps)
    row["violations"] += int(violations.sum())
    if ratios.max() > row["worst_ratio"]:
        row |= {"worst_ratio": float(ratios.max()), **of}
    return ratios


def lengths(name: str) -> tuple[int, ...]:
    return LENGTHS if "branched" in name else (0,)


def search_at_random(rows: Rows, n: int, rng: np.random.Generator) -> None:
    for family, scale in FAMILIES.items():
        for states, actions in SIZES:
            for gamma in GAMMAS:
                for rewards in CHECKS:
                    space = Space(states, actions, rewards, scale, gamma)
                    pairs = space.pairs(space.draw(n, rng))
                    for name, check in CHECKS[rewards].items():
                        for errors in ("mean", "largest"):
                            for k in lengths(name):
                                found = gaps_and_bounds(check, pairs, k, errors)
                                of = {"states": states, "actions": actions, "gamma": gamma, "k": k}
                                note(rows, (name, rewards, errors, family), *found, of)


def climb(rows: Rows, rng: np.random.Generator) -> None:
    every = [(rewards, name, check) for rewards, checks in CHECKS.items() for name, check in checks.items()]
    for rewards, name, check in every:
        for states, actions, gamma in ((1, 2, 0.2), (2, 2, 0.5), (2, 2, 0.9), (3, 2, 0.9)):
            for k in lengths(name)[:4]:
                space = Space(states, actions, rewards, FAMILIES["sparse"], gamma)
                vectors, best = space.draw(CLIMBERS, rng), np.full(CLIMBERS, -1.0)
                for step in range(CLIMB_STEPS):
                    lengths_of_step = rng.choice([0.03, 0.3, 1.0], size=(CLIMBERS, 1)) * (step > 0)
                    tried = vectors + lengths_of_step * rng.normal(size=vectors.shape) * (rng.random(vectors.shape) < 0.3)
                    found = gaps_and_bounds(check, space.pairs(tried), k, "mean")
                    of = {"states": states, "actions": actions, "gamma": gamma, "k": k}
                    ratios = note(rows, (name, rewards, "mean", "climbed"), *found, of)
                    better = ratios > best
                    vectors[better], best[better] = tried[better], ratios[better]
        print(name, rewards, rows[name, rewards, "mean", "climbed"], flush=True)


def search(n: int, seed: int) -> None:
    rows: Rows = {}
    rng = np.random.default_rng(seed)
    search_at_random(rows, n, rng)
    climb(rows, rng)
    with (DOCS / "search.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for key in sorted(rows):
            row = rows[key]
            writer.writerow(dict(zip(COLUMNS, key, strict=False)) | row | {"worst_ratio": f"{row['worst_ratio']:.4f}"})


def draw_lengths(axes: Any, error: float = 1e-3, gamma: float = 0.99) -> None:
    """Gaps against k, without policy shift."""
    ks = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000]
    worst = leaky(error, 0, gamma)
    known = {"model_error": error, "policy_shift": 0, "gamma": gamma, "r_max": 1}
    axes.plot(ks, [theory.branched_return_gap_on_policy(k=k, **known) for k in ks], "C0--", label="Theorem 4.3")
    axes.plot(ks, [theory.sharp_branched_return_gap(k=k, **known) for k in ks], "C0:", label="sharp")
    axes.plot(ks, [worst.branched_return_gap(k)[0] for k in ks], "C0", label="two states, exact")
    space = Space(5, 3, "r(s, a, s')", FAMILIES["sparse"], gamma)
    pairs = space.pairs(space.draw(500, np.random.default_rng(0)))
    share = (error / pairs.largest_error())[:, None, None, None]
    model = pairs.true + share * (pairs.model - pairs.true)
    pairs = replace(pairs, model=model, data_policy=pairs.policy)
    gaps = np.array([pairs.branched_return_gap(k) for k in ks])
    axes.fill_between(ks, np.median(gaps, 1), gaps.max(1), color="C0", alpha=0.2, label="500 random, median to largest")
    axes.axhline(worst.return_gap()[0], color="C3", label="full rollouts, two states, exact")
    axes.set(xscale="log", yscale="log", xlabel="k", ylabel="gap between returns", ylim=(1e-3, 300))
    axes.set_title(f"model error {error:g}, no policy shift, discount {gamma:g}", fontsize="medium")


def draw_horizons(axes: Any, error: float = 1e-5) -> None:
    """Gaps against the horizon, without policy shift."""
    horizons = np.geomspace(2, 1000, 40)
    pairs = [leaky(error, 0, 1 - 1 / horizon) for horizon in horizons]
    known = [{"model_error": error, "policy_shift": 0, "gamma": pair.gamma, "r_max": 1} for pair in pairs]
    axes.plot(horizons, [theory.return_gap(**kwargs) for kwargs in known], "C3--", label="full rollouts, Theorem 4.1")
    axes.plot(horizons, [pair.return_gap()[0] for pair in pairs], "C3", label="full rollouts, exact")
    for colour, k in (("C1", 10), ("C0", 1)):
        bounds = [theory.branched_return_gap_on_policy(k=k, **kwargs) for kwargs in known]
        axes.plot(horizons, bounds, f"{colour}--", label=f"k = {k}, Theorem 4.3")
        axes.plot(horizons, [pair.branched_return_gap(k)[0] for pair in pairs], colour, label=f"k = {k}, exact")
    axes.set(xscale="log", yscale="log", xlabel="horizon 1 / (1 - discount)", ylabel="gap between returns")
    axes.set_title(f"two states, model error {error:g}", fontsize="medium")


def draw_trade(axes: Any, error: float = 1e-3, shift: float = 5e-3, gamma: float = 0.9) -> None:
    """Policy shift against model error."""
    ks = range(41)
    known = {"model_error": error, "policy_shift": shift, "gamma": gamma, "r_max": 1}
    bound = [theory.branched_return_gap_on_policy(k=k, **known) for k in ks]
    axes.plot(ks, bound, "C0--", label="Theorem 4.3")
    best = theory.optimal_rollout_length(model_error=error, policy_shift=shift, gamma=gamma)
    axes.plot(best, bound[best], "C0o", label=f"k* = {best}")
    axes.plot(ks, [theory.quoted_branched_return_gap(k=k, **known) for k in ks], "C2-.", label="as often quoted")
    axes.plot(ks, [theory.sharp_branched_return_gap(k=k, **known) for k in ks], "C0:", label="sharp")
    axes.plot(ks, [leaky(error, shift, gamma).branched_return_gap(k)[0] for k in ks], "C0", label="two states, exact")
    axes.set(xlabel="k", ylabel="gap between returns", ylim=(0, None))
    axes.set_title(f"model error {error:g}, policy shift {shift:g}, discount {gamma:g}", fontsize="medium")


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, figsize=(7, 12.6), layout="constrained")
    draw_lengths(panels[0])
    draw_horizons(panels[1])
    draw_trade(panels[2])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(DOCS / "bounds.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="search nothing")
    parser.add_argument("--mdps", type=int, default=200, help="random MDPs of each kind, size and discount")
    args = parser.parse_args()
    if not args.figure:
        search(args.mdps, seed=0)
    draw()


if __name__ == "__main__":
    main()
