"""
How much work may one fit do? Hold-out and on-policy error of fits and epochs of at most so many gradient steps.

    python benchmarks/fit_bound.py [--cadence late] [--seeds 0 1] [--device cuda]

The transitions are those of an agent that learns Hopper-v5 without a model (one update a step; "late": a hundred at a time).
An ensemble is fitted on the first 1,000 of them, then on more and more, each fit going on from the one before; what it says
is compared with the next 250 transitions, which the policy of that time will bring. The cadence "training" is that of MBPO, a
fit every 250 steps; in "sparse" the steps between two fits grow with the data, so that a fit has more that is new to learn
and a bound more to lose; "late" is the cadence of training again, from 100,000 transitions on, with an ensemble that four
fits without a bound have seen there: the same one for every bound.
The error is the geometric mean over reward and observation dimensions of root mean square error over standard deviation of
the change. One process, one thread; a sequence that is complete in the CSV is not measured again. Seconds are the CPU's, and
left out on a GPU.
"""

import argparse
import copy
import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from targets import errors

from sb3_mbpo import MBPO, ProbabilisticEnsemble

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "fit_bound.csv"
# Most gradient steps of a fit, and of an epoch
Bound = tuple[int | None, int | None]
BOUNDS: list[Bound] = [(1000, None), (2000, None), (2000, 64), (None, None), (500, None), (250, None), (2000, 32), (2000, 128)]
CADENCES: dict[str, Sequence[int]] = {
    "sparse": (1_000, 1_250, 1_500, 2_000, 3_000, 4_500, 7_000, 10_000, 15_000, 20_000),
    "training": range(1_000, 6_001, 250),
    "late": range(100_250, 102_001, 250),
}
# Steps, and updates, from one round of updates to the next
AT_ONCE = {"late": 100}
WARM_UP = {"late": (10_000, 30_000, 60_000, 100_000)}
COLUMNS = "env cadence seed max_updates epoch_updates transitions epochs cpu_seconds holdout_error next_error".split()


def learning_transitions(task: str, n: int, seed: int, device: str, at_once: int) -> ReplayBufferSamples:
    """The first ``n`` transitions of an agent that learns without a model, in their order."""
    settings: dict[str, Any] = {"real_ratio": 1, "train_freq": at_once, "gradient_steps": at_once, "learning_starts": 1000}
    agent = MBPO("MlpPolicy", task, **settings, fast_update=True, seed=seed, device=device)
    return agent.learn(n).replay_buffer.real_transitions()


def between(data: ReplayBufferSamples, first: int, last: int) -> ReplayBufferSamples:
    return ReplayBufferSamples(*(part[first:last] for part in data[:5]))


def warmed_up(data: ReplayBufferSamples, sizes: Sequence[int], seed: int) -> ProbabilisticEnsemble:
    """An ensemble after fits without a bound on the first ``sizes`` transitions."""
    obs_dim, action_dim, device = data.observations.shape[1], data.actions.shape[1], data.observations.device
    ensemble = ProbabilisticEnsemble(obs_dim, action_dim, seed=seed, device=device, max_updates=None, epoch_updates=None)
    for n in sizes:
        ensemble.fit(between(data, 0, n))
    return ensemble


def sequence(
    ensemble: ProbabilisticEnsemble, data: ReplayBufferSamples, sizes: Sequence[int], bound: Bound
) -> Iterator[list[str]]:
    """A copy's fits on the first ``sizes`` transitions: those, then the columns after them."""
    ensemble = copy.deepcopy(ensemble)
    ensemble.max_updates, ensemble.epoch_updates = bound
    for n in sizes:
        started = time.process_time()
        fit = ensemble.fit(between(data, 0, n))
        on_cpu = data.observations.device.type == "cpu"
        seconds = f"{time.process_time() - started:.1f}" if on_cpu else ""
        error = errors(ensemble, between(data, n, n + 250)).log().mean().exp().item()
        yield [str(n), str(fit["epochs"]), seconds, f"{fit['holdout_error']:.5f}", f"{error:.4f}"]


def measured(path: Path) -> dict[tuple[str, ...], list[list[str]]]:
    """The rows of the CSV by sequence: env, cadence, seed and bound."""
    sequences: dict[tuple[str, ...], list[list[str]]] = {}
    if path.exists():
        with path.open() as file:
            for row in list(csv.reader(file))[1:]:
                sequences.setdefault(tuple(row[:5]), []).append(row)
    return sequences


def write(path: Path, sequences: dict[tuple[str, ...], list[list[str]]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(row for rows in sequences.values() for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--cadence", choices=CADENCES, default="training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    th.set_num_threads(1)
    sequences, sizes = measured(args.csv), CADENCES[args.cadence]
    for seed in args.seeds:
        origins = {bound: (args.env, args.cadence, str(seed), *map(str, bound)) for bound in BOUNDS}
        missing = [bound for bound in BOUNDS if len(sequences.get(origins[bound], [])) < len(sizes)]
        if not missing:
            continue
        data = learning_transitions(args.env, sizes[-1] + 250, seed, args.device, AT_ONCE.get(args.cadence, 1))
        ensemble = warmed_up(data, WARM_UP.get(args.cadence, ()), seed)
        for bound in missing:
            rows: list[list[str]] = []
            for row in sequence(ensemble, data, sizes, bound):
                rows.append([*origins[bound], *row])
                print(*rows[-1], flush=True)
                # What there is of a sequence that was cut stays until there is as much anew.
                if len(rows) >= len(sequences.get(origins[bound], [])):
                    sequences[origins[bound]] = rows
                    write(args.csv, sequences)


if __name__ == "__main__":
    main()
