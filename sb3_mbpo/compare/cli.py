"""
Compare algorithms: train each with several seeds and the RL Zoo's settings, and write a report.

    sb3_mbpo compare --env Hopper-v5 --algo mbpo sac sac:gradient_steps=20 tqc --seeds 5 --steps 50000

An algorithm is one of the Zoo or of this package, optionally with settings, such as sac:gradient_steps=20,gamma=0.98. Each run
has its own process. The folder gets results.csv (a row per evaluation episode), fits.csv (a row per fit of a dynamics),
manifest.json, a figure per env, and report.html.
Finished runs are not repeated, so the same command resumes an interrupted comparison.
"""

import argparse
import importlib
import json
import os
import shlex
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sb3_mbpo.compare.run import EVALUATIONS, Run, as_file_name, put, record
from sb3_mbpo.compare.specs import read_spec
from sb3_mbpo.compare.workers import LocalWorkers, RayWorkers
from sb3_mbpo.runtime.extras import needs
from sb3_mbpo.runtime.provenance import merged
from sb3_mbpo.validation.rules import did_you_mean

with needs("compare", "sb3_mbpo compare"):
    import gymnasium as gym
    import pandas as pd

    from sb3_mbpo.compare import plots
    from sb3_mbpo.compare.evaluation import FITS
    from sb3_mbpo.compare.progress import RunProgress
    from sb3_mbpo.compare.report import default_thresholds, markdown, summarise, write_report
    from sb3_mbpo.zoo import cli as zoo
    from sb3_mbpo.zoo.experiment import read_settings, settings_file

# Number of evaluations per run, without --eval-freq.
EVALUATIONS_PER_RUN = 20


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "sb3_mbpo compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", nargs="+", required=True, help="environments")
    parser.add_argument("--algo", nargs="+", required=True, metavar="ALGO[:KEY=VALUE,...]", help="algorithms")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each, with seeds 0, 1, ... (default: 5)")
    parser.add_argument("--steps", type=int, required=True, help="number of env steps of each run")
    parser.add_argument("--eval-freq", type=int, help="env steps between evaluations (default: a twentieth of --steps)")
    parser.add_argument("--eval-episodes", type=int, default=5, help="number of episodes of an evaluation (default: 5)")
    parser.add_argument("--baseline", help="algorithm to compare the others with (default: sac, or the first sac:...)")
    parser.add_argument(
        "--threshold",
        nargs="+",
        type=float,
        help="return to reach, one for each env (default: the baseline's final return)",
    )
    parser.add_argument("--folder", type=Path, help="folder for all files (default: logs/compare/ENV)")
    parser.add_argument("--workers", type=int, help="parallel runs (default: number of cores; on Ray: as many as possible)")
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch threads of a run (default: 1)")
    parser.add_argument("--device", default="auto", help="device of the agents (default: auto)")
    parser.add_argument("--ray-address", help="use a Ray cluster: auto, local or host:port")
    parser.add_argument(
        "--conf-file", nargs="+", default=[], metavar="ALGO=FILE", help="settings to use instead of the packaged ones"
    )
    parser.add_argument("--env-kwargs", nargs="+", default=[], metavar="KEY:VALUE", help="as in the Zoo")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments, as in the Zoo")
    args = parser.parse_args(arguments)
    for name in ("seeds", "steps", "eval_freq", "eval_episodes", "workers", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.eval_freq = args.eval_freq or max(args.steps // EVALUATIONS_PER_RUN, 1)
    args.folder = args.folder or Path("logs") / "compare" / "_".join(map(as_file_name, args.env))
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """
    Check the arguments that are not numbers, and parse them in place.

    :raises ValueError: with an argument, all runs or the report would fail
    """
    zoo.register()
    args.specs = [read_spec(text, zoo.ALGOS) for text in args.algo]
    if len({as_file_name(spec.label) for spec in args.specs}) < len(args.specs):
        raise ValueError("--algo: two of them would share a folder; write one of them differently")
    if len(set(args.env)) < len(args.env):
        raise ValueError("--env names an environment twice")
    for package in args.gym_packages:
        importlib.import_module(package)
    for env in args.env:
        # Envs of dm_control are registered when needed.
        if env not in gym.registry and not env.startswith("dm_control/"):
            raise ValueError(f"there is no environment {env!r}{did_you_mean(env, gym.registry)}")
    if args.baseline is None:
        # SAC without settings, otherwise the first one with settings.
        labels = (spec.label for spec in args.specs if spec.algo == "sac")
        args.baseline = min(labels, key=lambda label: ":" in label, default=None)
    if args.baseline not in (None, *args.algo):
        raise ValueError(f"--baseline {args.baseline} is not among --algo {' '.join(args.algo)}")
    if args.threshold is not None and len(args.threshold) != len(args.env):
        raise ValueError(f"--threshold needs a number for each of the {len(args.env)} environments")
    args.conf_files = {}
    for item in args.conf_file:
        algo, _, file = item.partition("=")
        if algo not in {spec.algo for spec in args.specs} or not file:
            raise ValueError(f"--conf-file {item}: write ALGO=FILE, with an algorithm of --algo")
        check_settings(item, settings_file(file, algo) or file, args.env)
        # Processes of a cluster have other working directories.
        args.conf_files[algo] = str(Path(file).resolve()) if Path(file).exists() else file


def check_settings(item: str, file: str, envs: Sequence[str]) -> None:
    """:raises ValueError: a settings file cannot be read, or has no settings for one of the envs"""
    try:
        entries = read_settings(file)
    except Exception as error:
        # The user's file may raise any exception.
        raise ValueError(f"--conf-file {item} cannot be read: {error}") from error
    for env in envs:
        entry = entries.get(env, entries.get("default")) if isinstance(entries, dict) else None
        # The Zoo requires n_timesteps, although --steps overrides it.
        if not isinstance(entry, dict) or "n_timesteps" not in entry:
            raise ValueError(f"--conf-file {item} has no settings for {env} with n_timesteps, and no such default")


def grid(args: argparse.Namespace) -> list[Run]:
    """:return: all runs, ordered by seed, so that an interrupted comparison has the same seeds of each algorithm"""
    return [
        Run(
            *(env, spec.label, spec.algo, spec.settings, seed, args.steps, args.eval_freq, args.eval_episodes),
            threads=args.threads,
            device=args.device,
            conf_file=args.conf_files.get(spec.algo),
            env_kwargs=args.env_kwargs,
            gym_packages=args.gym_packages,
            command=args.command,
        )
        for seed in range(args.seeds)
        for env in args.env
        for spec in args.specs
    ]


def make(runs: Sequence[Run], workers: LocalWorkers, progress: RunProgress) -> dict[str, str]:
    """
    Make runs.

    :return: error messages of failed runs, by run
    """
    waiting, failures = deque(runs), {}
    try:
        while waiting or workers.active:
            while waiting and workers.has_room():
                workers.start(waiting.popleft())
            progress.show(workers.active.values())
            for run, failure in workers.collect():
                progress.ended(run, failure)
                if failure is not None:
                    failures[str(run)] = failure
    finally:
        workers.stop()
    return failures


def merge_csv(runs: Sequence[Run], root: Path) -> pd.DataFrame:
    """
    Write ``results.csv`` and, if there were fits, ``fits.csv``, from the files of finished runs.

    :return: the results, a row per evaluation episode
    """
    # As text, so that numbers stay as they are.
    episodes = pd.concat([pd.read_csv(root / run.folder / EVALUATIONS, dtype=str) for run in runs])
    put(root / "results.csv", episodes.to_csv(index=False).encode())
    fits = [
        pd.read_csv(root / run.folder / FITS, names=["step", "name", "value"]).assign(
            env=run.env, algorithm=run.label, seed=run.seed
        )
        for run in runs
        if (root / run.folder / FITS).exists()
    ]
    if fits:
        # A column per logged value.
        by_fit = pd.concat(fits).pivot_table("value", ["env", "algorithm", "seed", "step"], "name", sort=False)
        put(root / FITS, by_fit.reset_index().to_csv(index=False).encode())
    return pd.read_csv(root / "results.csv")


def write_results(runs: Sequence[Run], root: Path, args: argparse.Namespace, failures: Sequence[str]) -> None:
    """Write results, manifest, figures and report of finished runs, at least one."""
    runs = sorted(runs, key=lambda run: (args.env.index(run.env), args.algo.index(run.label), run.seed))
    rows = merge_csv(runs, root)
    thresholds = default_thresholds(rows, args.baseline)
    if args.threshold is not None:
        thresholds = {env: value for env, value in zip(args.env, args.threshold, strict=True) if env in thresholds}
    manifest = describe(runs, root, args, failures, thresholds)
    put(root / "manifest.json", json.dumps(manifest, indent=1).encode())
    pictures = plots.save_figures(rows, root, thresholds)
    write_report(root / "report.html", rows, manifest, pictures, thresholds)
    for env in pictures:
        print(f"\n{env}\n{markdown(summarise(rows[rows['env'] == env], thresholds[env]), args.baseline, thresholds[env])}")


def describe(
    runs: Sequence[Run], root: Path, args: argparse.Namespace, failures: Sequence[str], thresholds: dict[str, float]
) -> dict[str, Any]:
    """:return: the manifest; values that differ between the runs are lists"""
    records = [record(root / run.folder) for run in runs]
    named = ("env", "algo", "seeds", "steps", "eval_freq", "eval_episodes", "threads", "workers", "ray_address", "device")
    settings: dict[str, dict[str, Any]] = {}
    for run, one in zip(runs, records, strict=True):
        settings.setdefault(run.env, {}).setdefault(run.label, one["settings"])
    return {
        "command": args.command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: getattr(args, name) for name in (*named, "baseline", "threshold")},
        "thresholds": thresholds,
        **{key: merged(one[key] for one in records) for key in ("versions", "hardware", "commit")},
        "settings": settings,
        "runs": [
            {"folder": run.folder.as_posix(), **{key: one.get(key) for key in ("finished", "seconds", "cpu_seconds")}}
            for run, one in zip(runs, records, strict=True)
        ],
        "failed": list(failures),
    }


def main(options: Sequence[str]) -> None:
    """
    Run the command.

    :raises SystemExit: a run failed, or the command was interrupted
    """
    args = parse(options)
    args.command = shlex.join(["sb3_mbpo", "compare", *options])
    if args.ray_address is None:
        args.workers = args.workers or os.cpu_count() or 1
    runs = grid(args)
    failures: dict[str, str] = {}
    try:
        open_runs = [run for run in runs if not run.is_finished(args.folder / run.folder)]
        on_ray = open_runs and args.ray_address is not None
        workers = (
            RayWorkers(args.folder, args.ray_address, args.workers) if on_ray else LocalWorkers(args.folder, args.workers)
        )
    except (ValueError, ImportError, ConnectionError) as error:
        raise SystemExit(f"sb3_mbpo compare: {error}") from None
    try:
        if open_runs:
            with RunProgress(len(runs), len(runs) - len(open_runs), args.folder) as progress:
                failures = make(open_runs, workers, progress)
        else:
            print(f"all {len(runs)} runs were finished before")
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. Finished runs are kept; the same command resumes the comparison") from None
    finished = [run for run in runs if str(run) not in failures]
    if finished:
        write_results(finished, args.folder, args, list(failures))
        print(f"\n{len(finished)} of {len(runs)} runs -> {args.folder / 'report.html'}")
    if failures:
        print(f"\n{len(failures)} failed; the same command tries them again")
        print("\n".join(f"{run}: {failure}" for run, failure in failures.items()))
        raise SystemExit(1)
