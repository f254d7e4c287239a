"""
How fast: each row alternates ours with a peer on the same work, and reports the ratio in each round and absolute figures.

    python benchmarks/speed.py                                 # all rows; with `loop` and `growth`, over an hour
    python benchmarks/speed.py updates sbx                     # some rows
    python benchmarks/speed.py updates --threads 2 --rounds 20
    python benchmarks/speed.py growth --steps 500              # shorter runs (growth, loop, overhead)
    python benchmarks/speed.py batches --profile               # where our side's time goes, instead of a comparison

Everything has Hopper's sizes: 11 observations, 3 actions, batches of 256, nets 256-256, ensembles of 7 times 200-200-200-200.
Each row is a process of its own on as many cores as it has threads, and so are SBX and mbrl-lib, whose environments are made
in .peers/ when first needed; without a network their rows are skipped. Results go to docs/benchmarks/speed.csv, in place of
the row's old ones. Figures mean nothing while other work runs on the same cores.
"""

import argparse
import copy
import csv
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import stable_baselines3
import torch as th
from peers import Peer, Stopwatch, period, seconds
from rounds import Comparison, Figures, measure, report
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbpo import DHMBPO, MBPO, ProbabilisticEnsemble, __version__
from sb3_mbpo.dhmbpo.training_rollout import TrainingRollout, training_rollout
from sb3_mbpo.dynamics import probabilistic_ensemble
from sb3_mbpo.dynamics.fused_nll import LikelihoodGradient
from sb3_mbpo.dynamics.input_gradient import InputGradient
from sb3_mbpo.runtime.denormals import flush_denormals

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "speed.csv"
PROFILES = RESULTS.with_name("profiles.csv")

OBS, ACT, BATCH, NET = 11, 3, 256, [256, 256]
REFILL = 100_000
CALL = 40  # updates in one call of train()


@cache
def real_transitions(n: int) -> ReplayBuffer:
    """A plain replay buffer with random Hopper transitions."""
    return plain_agent(learning_starts=n).learn(n).replay_buffer  # type: ignore[return-value]


def plain_agent(**settings: Any) -> SAC:
    agent = SAC("MlpPolicy", "Hopper-v5", seed=0, policy_kwargs={"net_arch": NET}, **settings)
    agent.set_logger(Logger(None, []))
    return agent


def mixed_agent(n_real: int, **settings: Any) -> MBPO:
    """An agent in the midst of a run: real transitions, four refills of imagined ones, a dynamics model not yet fitted."""
    agent = MBPO("MlpPolicy", "Hopper-v5", seed=0, policy_kwargs={"net_arch": NET}, **settings)
    agent.set_logger(Logger(None, []))
    agent.replay_buffer.adopt(real_transitions(n_real))
    transitions = agent.replay_buffer.real_transitions()[:5]
    for _ in range(agent.retained_rollouts):
        rows = th.randint(n_real, (REFILL,))
        agent.replay_buffer.model_buffer.begin_refill()
        agent.replay_buffer.model_buffer.add(ReplayBufferSamples(*(part[rows] for part in transitions)))
    agent.dynamics_fitted_at = 0
    assert agent._is_fast()
    return agent


def per_second(name: str, amount: float, function: Callable[..., object], *args: object) -> Figures:
    return {name: amount / seconds(function, *args)}


def updates(steps: int) -> Iterator[Comparison]:
    """SAC updates: MBPO.train on mixed batches; SAC.train of Stable-Baselines3 on real ones."""
    plain = plain_agent()
    plain.replay_buffer = real_transitions(10_000)
    ours = partial(per_second, "updates/s", CALL, mixed_agent(10_000).train, CALL, BATCH)
    yield Comparison(ours, partial(per_second, "updates/s", CALL, plain.train, CALL, BATCH), ">= 1.7")


def updates_2_threads(steps: int) -> Iterator[Comparison]:
    """The same with two threads."""
    for comparison in updates(steps):
        comparison.target = ">= 2.0"
        yield comparison


def sbx(steps: int) -> Iterator[Comparison]:
    """SAC updates: MBPO.train; the train of SBX's SAC, compiled by JAX."""
    peer = Peer("sbx")
    ours = partial(per_second, "updates/s", CALL, mixed_agent(10_000).train, CALL, BATCH)
    yield Comparison(
        ours, lambda: {"updates/s": CALL / peer.ask("updates", CALL)["seconds"]}, ">= 0.85", versions=peer.versions
    )


def update_flop() -> float:
    """Floating-point operations of the matrix products that one SAC update needs; each multiply-add counts two."""

    def products(sizes: list[int]) -> int:
        return sum(n_in * n_out for n_in, n_out in pairwise(sizes))

    actor, critic = [OBS, *NET, 2 * ACT], [OBS + ACT, *NET, 1]
    # Forward on s and s'; backward by the weights, and by the inputs of all layers but the first.
    for_actor = 2 * products(actor) + products(actor) + products(actor[1:])
    # Forward on (s', a'), (s, a) and (s, pi(s)); backward likewise on (s, a); by pi(s) on (s, pi(s)).
    for_critic = 3 * products(critic) + products(critic) + products(critic[1:]) + products([ACT, *critic[1:]])
    return 2 * BATCH * (for_actor + 2 * for_critic)


def flops(steps: int) -> Iterator[Comparison]:
    """Useful floating-point operations of our updates; those of torch.mm on square matrices of 256."""
    a, b, out = (th.rand(256, 256) for _ in range(3))

    def multiply(n: int) -> None:
        for _ in range(n):
            th.mm(a, b, out=out)

    ours = partial(per_second, "GFLOP/s", CALL * update_flop() / 1e9, mixed_agent(10_000).train, CALL, BATCH)
    yield Comparison(ours, partial(per_second, "GFLOP/s", 1000 * 2 * 256**3 / 1e9, multiply, 1000), ">= 0.6")


def ensemble(steps: int) -> Iterator[Comparison]:
    """As many gradient steps as an epoch has, batches of 256, then validation; an epoch of mbrl-lib's ModelTrainer."""
    peer = Peer("mbrl")

    def ours(n: int, epochs: int) -> Figures:
        rows = n * 5 // 4
        sizes = (OBS, ACT, OBS, 1, 1)
        transitions = ReplayBufferSamples(*(th.randn(rows, size) for size in sizes))
        epoch = -(-n // BATCH)
        limits: dict[str, Any] = {"patience": 10**6, "max_holdout": rows, "max_updates": epochs * epoch}
        dynamics = ProbabilisticEnsemble(OBS, ACT, seed=0, batch_size=BATCH, **limits)
        # Validation as often as theirs: ours counts gradient steps, whatever the number of transitions.
        with mock.patch.object(probabilistic_ensemble, "LOOK_EVERY", epoch):
            return {f"s/epoch, {n:,} transitions": period(partial(dynamics.fit, transitions))}

    def theirs(n: int, epochs: int) -> Figures:
        return {f"s/epoch, {n:,} transitions": peer.ask("fit", n, epochs)["seconds"]}

    for n, epochs in ((10_000, 4), (50_000, 2)):
        yield Comparison(partial(ours, n, epochs), partial(theirs, n, epochs), ">= 1.2", times=True, versions=peer.versions)


def all_members_sample(dynamics: ProbabilisticEnsemble, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """``sample`` as the paper's code does it: every member predicts and draws every row, then one elite's draw is taken."""
    mean, var = dynamics.predict(obs, actions)
    draws = mean + var.sqrt() * th.randn(mean.shape, generator=dynamics.generator)
    choice = dynamics.elites[th.randint(dynamics.n_elites, (len(obs),), generator=dynamics.generator)]
    prediction = draws[choice, th.arange(len(obs))]
    return prediction[:, 1:], prediction[:, 0]


def rollouts(steps: int) -> Iterator[Comparison]:
    """A refill of the model buffer, 100,000 branches of one step; mbrl-lib's; ours with every member on every row."""
    peer = Peer("mbrl")
    agent = mixed_agent(10_000, dynamics_kwargs={"max_updates": 20})
    agent.fit_dynamics()
    dynamics = agent.dynamics
    assert isinstance(dynamics, ProbabilisticEnsemble)

    def all_members(name: str) -> Figures:
        with mock.patch.object(dynamics, "sample", partial(all_members_sample, dynamics)):
            return per_second(name, REFILL, agent.generate_rollouts)

    name = "states/s, against mbrl-lib"
    theirs = partial(lambda name: {name: REFILL / peer.ask("rollout", REFILL)["seconds"]}, name)
    yield Comparison(partial(per_second, name, REFILL, agent.generate_rollouts), theirs, ">= 2.0", versions=peer.versions)
    name = "states/s, against all members"
    yield Comparison(partial(per_second, name, REFILL, agent.generate_rollouts), partial(all_members, name), ">= 4.5")


def repeated(buffer: ReplayBuffer, times: int) -> ReplayBuffer:
    """A full plain replay buffer that holds the transitions of another so many times."""
    result: Any = plain_agent(buffer_size=buffer.size() * times).replay_buffer
    for name in ("observations", "actions", "next_observations", "dones", "rewards", "timeouts"):
        filled = getattr(buffer, name)[: buffer.size()]
        setattr(result, name, np.concatenate([filled] * times))
    result.full = True
    return result


def batches(steps: int) -> Iterator[Comparison]:
    """Drawing the mixed batches of one train() of 20 updates; as many calls of ReplayBuffer.sample."""
    mixed, small = mixed_agent(10_000).replay_buffer, real_transitions(10_000)

    def ours() -> None:
        for _ in range(50):
            for _ in mixed.batches(20, BATCH):
                pass

    def theirs(plain: ReplayBuffer) -> None:
        for _ in range(1000):
            plain.sample(BATCH)

    # Ours draws from 10,000 real and 400,000 imagined transitions: no cache holds them.
    for plain, target in ((small, ">= 10"), (repeated(small, 41), "")):
        name = f"batches/s, SB3's from {plain.size():,}"
        yield Comparison(partial(per_second, name, 1000, ours), partial(per_second, name, 1000, theirs, plain), target)


def run(agent: MBPO, steps: int) -> Figures:
    """``learn``: its seconds in all and by phase, then the number of gradient steps of the fits and of SAC."""
    watch = Stopwatch()
    phases: dict[str, list[tuple[object, str]]] = {
        "SAC updates": [(MBPO, "train")],
        "fits": [(MBPO, "fit_dynamics")],
        "rollouts": [(MBPO, "generate_rollouts")],
        "env and policy": [(DummyVecEnv, "step"), (MBPO, "_sample_action")],
        "fit steps": [(LikelihoodGradient, "__call__")],
    }
    with watch.timing(phases):
        total = seconds(agent.learn, steps)
    figures = {**watch.seconds, "fit steps": watch.calls["fit steps"], "updates": agent._n_updates}
    return {"whole loop": total, **figures, "rest": total - sum(watch.seconds[phase] for phase in [*phases][:4])}


def loop(steps: int) -> Iterator[Comparison]:
    """1,000 random and 1,000 real steps; mbrl-lib's MBPO, whose first fit and updates come 250 steps after the random ones."""
    peer = Peer("mbrl")

    def ours() -> Figures:
        return run(MBPO("MlpPolicy", "Hopper-v5", seed=0, learning_starts=1249), 1000 + steps)

    def theirs() -> Figures:
        figures = peer.ask("loop", steps)
        rest = figures["whole loop"] - sum(figures[phase] for phase in ("SAC updates", "fits", "rollouts", "env and policy"))
        return {**figures, "rest": rest}

    yield Comparison(ours, theirs, ">= 1.5", times=True, versions=peer.versions)


def overhead(steps: int) -> Iterator[Comparison]:
    """What is neither update, fit, rollout, env nor policy; the whole loop."""
    whole = {"rest": 1.0, "SAC updates": 1.0, "fits": 1.0, "rollouts": 1.0, "env and policy": 1.0}

    def ours() -> Figures:
        figures = run(MBPO("MlpPolicy", "Hopper-v5", seed=0, learning_starts=steps // 5), 2 * (steps // 5))
        return {phase: figures[phase] / figures["whole loop"] for phase in whole}

    yield Comparison(ours, whole.copy, "<= 0.03")


class PlainDHMBPO(DHMBPO):
    """DHMBPO as it is written down: every member's rows and every step's rewards one after the other, all by autograd."""

    def _imagine(self, roots: th.Tensor) -> TrainingRollout:
        dynamics = self.bounds_of_fit.wrap(self.imagined_dynamics)
        with mock.patch.object(InputGradient, "covers", return_value=False):
            return training_rollout(dynamics, self._action_and_log_prob, self.terminates, roots, self.training_horizon)


def dhmbpo(steps: int) -> Iterator[Comparison]:
    """Updates of DHMBPO at its defaults; the same by autograd, a member and a step at a time, Adam a tensor at a time."""

    def made(kind: type[DHMBPO], **policy: Any) -> DHMBPO:
        settings: dict[str, Any] = {"learning_starts": 600, "dynamics_kwargs": {"max_updates": 100}, "policy_kwargs": policy}
        agent = kind("MlpPolicy", "Hopper-v5", seed=0, min_explained_variance=None, **settings).learn(602)
        assert agent.expands_values
        return agent

    def ours(agent: DHMBPO) -> Figures:
        with flush_denormals():
            return per_second("updates/s", 20, agent.train, 20, agent.batch_size)

    sides = made(DHMBPO), made(PlainDHMBPO, optimizer_kwargs={"fused": False})
    yield Comparison(partial(ours, sides[0]), partial(ours, sides[1]), ">= 1.6")


def experienced_agent(n_real: int) -> MBPO:
    """A mixed agent whose dynamics has had twenty fits, as bounded as ever, each to a twentieth more of the data."""
    agent = mixed_agent(n_real, learning_starts=0)
    transitions = agent.replay_buffer.real_transitions()[:5]
    for part in range(1, 21):
        agent.dynamics.fit(ReplayBufferSamples(*(rows[: n_real * part // 20] for rows in transitions)))
    return agent


def growth(steps: int) -> Iterator[Comparison]:
    """The next ``steps`` real steps with 100,000 real transitions; with 10,000."""

    def after(agent: MBPO) -> Figures:
        return run(copy.deepcopy(agent), steps)

    much, little = experienced_agent(100_000), experienced_agent(10_000)
    yield Comparison(partial(after, much), partial(after, little), "<= 1.3")


@dataclass
class Row:
    """How a row is measured unless the command says otherwise."""

    compare: Callable[[int], Iterator[Comparison]]
    rounds: int = 10
    threads: int = 1
    warm_ups: int = 1


ROWS = {
    "updates": Row(updates),
    "updates_2_threads": Row(updates_2_threads, threads=2),
    "sbx": Row(sbx),
    "flops": Row(flops),
    "ensemble": Row(ensemble, rounds=5),
    "rollouts": Row(rollouts, rounds=5),
    "batches": Row(batches),
    "loop": Row(loop, rounds=2, warm_ups=0),
    "overhead": Row(overhead, rounds=5, warm_ups=0),
    "growth": Row(growth, rounds=5, warm_ups=0),
    "dhmbpo": Row(dhmbpo),
}


def save(row: str, lines: list[dict[str, object]], path: Path = RESULTS) -> None:
    """Put a row's lines in place of its old ones."""
    kept: list[dict[str, object]] = []
    if path.exists():
        with path.open() as file:
            kept = [{**line} for line in csv.DictReader(file) if line["row"] in ROWS and line["row"] != row]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(kept or lines)[0]])
        writer.writeheader()
        writer.writerows(sorted([*kept, *lines], key=lambda line: [*ROWS].index(str(line["row"]))))


def profile(row: str, side: Callable[[], object]) -> list[dict[str, object]]:
    """The operations that take most of a round's time, by themselves, in torch's profiler, after a round without it."""
    side()
    with th.profiler.profile(activities=[th.profiler.ProfilerActivity.CPU]) as profiler:
        side()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    lines: list[dict[str, object]] = []
    for event in events[:12]:
        share = event.self_cpu_time_total / total
        lines.append({"row": row, "operation": event.key, "calls": event.count, "share": f"{share:.3f}"})
        print(f"  {event.key:45} {event.count:9,} calls {100 * share:5.1f} %", flush=True)
    return lines


def machine() -> str:
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def run_row(name: str, rounds: int | None, threads: int, steps: int, at_least: float | None, profiled: bool) -> None:
    """Measure one row in this process; with a bound, only hold its first ratio against that; or only see what takes time."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    th.set_num_threads(threads)
    row = ROWS[name]
    ours = f"sb3_mbpo {__version__}, Python {platform.python_version()}, torch {th.__version__}"
    ours += f", stable_baselines3 {stable_baselines3.__version__}"
    print(f"{name}: {row.compare.__doc__} {date.today()}, {machine()}, {threads} thread(s)", flush=True)
    lines = []
    try:
        for comparison in row.compare(steps):
            if profiled:
                return save(name, profile(name, comparison.ours), PROFILES)
            found = measure(comparison, rounds or row.rounds, row.warm_ups)
            versions = "; ".join(filter(None, [ours, comparison.versions]))
            origin = {"row": name, "threads": threads, "date": date.today(), "machine": machine(), "versions": versions}
            lines += [{**origin, **line} for line in found]
            report(found)
    except subprocess.CalledProcessError as error:
        print(f"  skipped: the peer's environment could not be made ({error})", flush=True)
        return
    print(f"  {lines[0]['versions']}", flush=True)
    if at_least is None:
        return save(name, lines)
    ratio = statistics.median(float(str(line["ratio"])) for line in lines if line["measure"] == lines[0]["measure"])
    if ratio < at_least:
        sys.exit(f"{name}: the median ratio {ratio:.3g} is below {at_least}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; default: all")
    parser.add_argument("--rounds", type=int, help="default: the row's own")
    parser.add_argument("--threads", type=int, help="default: the row's own, one for most")
    parser.add_argument("--steps", type=int, default=1000, help="real steps of loop and growth (overhead: a fifth)")
    parser.add_argument("--at-least", type=float, help="fail below this median ratio, and leave the CSV alone")
    parser.add_argument(
        "--profile", action="store_true", help="see what takes our side's time (profiles.csv); compare nothing"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not set(args.rows) <= set(ROWS):
        parser.error(f"rows are {', '.join(ROWS)}")
    if args.here:
        return run_row(args.rows[0], args.rounds, args.threads, args.steps, args.at_least, args.profile)
    failed = []
    for name in args.rows or ROWS:
        threads = args.threads or ROWS[name].threads
        command = [sys.executable, __file__, name, "--here", "--threads", str(threads), "--steps", str(args.steps)]
        for option in ("rounds", "at_least"):
            value = getattr(args, option)
            command += [] if value is None else ["--" + option.replace("_", "-"), str(value)]
        command += ["--profile"] if args.profile else []
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if subprocess.run(command, env=environment).returncode != 0:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
