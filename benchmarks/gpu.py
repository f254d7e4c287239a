"""
How fast on a GPU: SAC's update next to Stable-Baselines3's, the ensemble's fit, imagined rollouts, and a stretch of Hopper-v5.

    python benchmarks/gpu.py updates     # ours and SB3's SAC.train in turns, on the same GPU; a minute
    python benchmarks/gpu.py profile     # what takes the time of one of our updates; ten seconds
    python benchmarks/gpu.py fit         # seconds a pass over 10,000 and 50,000 transitions; half a minute
    python benchmarks/gpu.py rollout     # one imagined step from 100,000 states; ten seconds
    python benchmarks/gpu.py hopper      # 10,000 steps with the settings of hyperparams/mbpo.yml; a minute and a half

Sizes are Hopper's: 11 observations, 3 actions, batches of 256, nets 256-256, seven networks of 200-200-200-200. Every call
adds its rows to docs/benchmarks/gpu.csv. `hopper` needs gymnasium[mujoco] and PyYAML. Measure on an idle machine: what is not
captured in a CUDA graph goes by how fast the CPU launches it, SB3's update above all.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo import MBPO, ProbabilisticEnsemble
from sb3_mbpo.dynamics.probabilistic_ensemble import FIRST_FIT
from sb3_mbpo.fast_sac import cuda_graph as cuda_update
from sb3_mbpo.rollout_schedule import rollout_length

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "date measure round value unit gpu cpu torch cuda stable_baselines3".split()
OBS_DIM, ACTION_DIM = 11, 3
Row = tuple[str, int | str, float, str]


class Still(gym.Env):
    """Only its spaces matter."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(OBS_DIM), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(OBS_DIM), 0.0, False, False, {}


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long it takes, the GPU's part included."""
    return timed(work, device)[0]


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """How long it takes, the GPU's part included, and what it returns."""
    if device == "cuda":
        th.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if device == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - started, result


def transitions(n: int, device: str) -> ReplayBufferSamples:
    """Smooth made-up dynamics, so that a fit has something to learn."""
    generator = th.Generator().manual_seed(0)
    obs, actions = th.randn(n, OBS_DIM, generator=generator), th.rand(n, ACTION_DIM, generator=generator) * 2 - 1
    next_obs = obs + 0.1 * th.tanh(obs.roll(1, 1) + actions.sum(1, keepdim=True))
    fields = (obs, actions, next_obs, th.zeros(n, 1), obs[:, :1] - actions.square().sum(1, keepdim=True))
    return ReplayBufferSamples(*(field.to(device) for field in fields))


def make_agent(cls: type[SAC], device: str, **kwargs: Any) -> Any:
    """An agent with 10,000 real transitions, and as many imagined ones if it is a model-based one."""
    agent: Any = cls("MlpPolicy", Still(), buffer_size=10_000, device=device, seed=0, **kwargs)
    agent.set_logger(configure(None, []))
    data, buffer = transitions(10_000, "cpu"), agent.replay_buffer
    buffer.observations[:, 0], buffer.next_observations[:, 0] = data.observations.numpy(), data.next_observations.numpy()
    buffer.actions[:, 0], buffer.rewards[:], buffer.full = data.actions.numpy(), data.rewards.numpy(), True
    if cls is MBPO:
        buffer.model_buffer.begin_refill()
        buffer.model_buffer.add(transitions(10_000, device))
    return agent


def run_often(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


def train_often(agent: SAC, calls: int, batch_size: int) -> None:
    run_often(partial(agent.train, 20, batch_size), calls)


def updates(device: str, tiny: bool) -> Iterator[Row]:
    """Updates a second in calls of 20, as MBPO makes them: ours (5 % real, 95 % imagined rows) and SB3's (all real)."""
    ours, theirs = make_agent(MBPO, device, termination_fn="never", fast_update=True), make_agent(SAC, device)
    rounds, batch_size = (2, 16) if tiny else (10, 256)
    calls = {"ours": (ours, 1 if tiny else 100), "SB3": (theirs, 1 if tiny else 10)}
    for agent in (ours, theirs):
        train_often(agent, 3, batch_size)
    ratios = []
    for i in range(rounds):
        rates = {}
        # Each is first in every other round.
        for side in sorted(calls, reverse=i % 2 == 0):
            agent, n = calls[side]
            rates[side] = 20 * n / seconds(partial(train_often, agent, n, batch_size), device)
            yield f"updates, {side}", i, rates[side], "1/s"
        ratios.append(rates["ours"] / rates["SB3"])
        yield "updates, ours / SB3", i, ratios[-1], "1"
    print(f"ours / SB3: min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}")


def profile(device: str, tiny: bool) -> Iterator[Row]:
    """Microseconds of an update in each kernel, and how often it runs: the top 25, all, unwatched, and what is captured."""
    agent, calls, batch_size = make_agent(MBPO, device, termination_fn="never", fast_update=True), 2 if tiny else 20, 256
    train_often(agent, 3, batch_size)
    whole = seconds(partial(train_often, agent, calls, batch_size), device)
    activity = th.profiler.ProfilerActivity
    with th.profiler.profile(activities=[activity.CPU if tiny else activity.CUDA]) as profiler:
        seconds(partial(train_often, agent, calls, batch_size), device)
    events, n = profiler.key_averages(), 20 * calls
    times = {event.key: (event.self_cpu_time_total if tiny else event.self_device_time_total, event.count) for event in events}
    for name, (taken, count) in sorted(times.items(), key=lambda item: -item[1][0])[:25]:
        yield f"profile, {name[:100]}", f"{count / n:.3g} an update", taken / n, "us"
    taken, count = (sum(numbers) for numbers in zip(*times.values(), strict=True))
    yield "profile, all kernels", f"{count / n:.3g} an update", taken / n, "us"
    yield "profile, an update without the profiler", n, whole / n * 1e6, "us"
    if not tiny:
        captured = cuda_update._UPDATES[agent][1]
        assert captured is not None
        alone = seconds(partial(run_often, captured.run, n), device)
        yield "profile, what is captured of it, over and over", n, alone / n * 1e6, "us"


def fit(device: str, tiny: bool) -> Iterator[Row]:
    """Seconds of a pass over the data in batches of 256, its share of everything else in a fit included."""
    for n in (300,) if tiny else (10_000, 50_000):
        data, batches = transitions(n, device), -(-max(n * 4 // 5, n - 1000) // 256)
        limits: dict[str, Any] = {"patience": 10**6, "max_updates": 5 * batches, "batch_size": 256}
        ensemble = ProbabilisticEnsemble(OBS_DIM, ACTION_DIM, seed=0, device=device, **limits)
        ensemble.fit(data)
        for i in range(2 if tiny else 5):
            taken, metrics = timed(partial(ensemble.fit, data), device)
            yield f"fit, {n} transitions", i, taken / metrics["epochs"], "s/epoch"


def rollout(device: str, tiny: bool) -> Iterator[Row]:
    """Imagined steps a second, in a refill as training makes it: start states, policy, ensemble, bounds, storing."""
    n = 1000 if tiny else 100_000
    agent = make_agent(MBPO, device, termination_fn="never", rollout_batch_size=n, dynamics_kwargs={"max_updates": 20})
    agent.fit_dynamics()
    for i in range(-3, 2 if tiny else 10):
        rate = n / seconds(agent.generate_rollouts, device)
        if i >= 0:
            yield f"refill, {n} states, one step", i, rate, "1/s"


class Deadline(BaseCallback):
    """Ends training when the time is up, and counts the gradient steps of the fits."""

    def __init__(self, minutes: float) -> None:
        super().__init__()
        self.end = time.perf_counter() + 60 * minutes
        self.fit_steps = 0.0
        self.fitted_at: int | None = None

    def _on_step(self) -> bool:
        return time.perf_counter() < self.end

    def _on_rollout_end(self) -> None:
        # MBPO's own callback comes before this one.
        agent: Any = self.model
        if agent.dynamics_fitted_at != self.fitted_at:
            self.fitted_at = agent.dynamics_fitted_at
            self.fit_steps += self.logger.name_to_value["dynamics/updates"]


@contextmanager
def clocks(device: str, methods: dict[str, tuple[type, str]]) -> Iterator[dict[str, list[float]]]:
    """The seconds of each call of some methods, by the names given."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    originals = {name: getattr(cls, method) for name, (cls, method) in methods.items()}

    def clocked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            taken, result = timed(partial(originals[name], *args, **kwargs), device)
            found[name].append(taken)
            return result

        return call

    for name, (cls, method) in methods.items():
        setattr(cls, method, clocked(name))
    try:
        yield found
    finally:
        for name, (cls, method) in methods.items():
            setattr(cls, method, originals[name])


def hopper(device: str, tiny: bool) -> Iterator[Row]:
    """Where the time goes in the first steps of Hopper-v5, and what that means for the paper's 125,000 + 5,000 steps."""
    import yaml

    settings = dict(yaml.safe_load((ROOT / "hyperparams" / "mbpo.yml").read_text())["Hopper-v5"])
    whole, steps, frequency = int(settings.pop("n_timesteps")), 10_000, 250
    if tiny:
        settings |= {"learning_starts": 100, "gradient_steps": 2, "batch_size": 16, "rollout_batch_size": 500}
        # Networks this small would not be let in.
        settings["min_explained_variance"] = None
        settings["dynamics_kwargs"], steps = {"net_arch": [16], "max_updates": 5}, 300
    agent = MBPO(env="Hopper-v5", device=device, seed=0, **settings)
    phases: dict[str, tuple[type, str]] = {"fits": (MBPO, "fit_dynamics"), "rollouts": (MBPO, "generate_rollouts")}
    with clocks(device, {"updates": (MBPO, "train"), **phases}) as spent:
        deadline = Deadline(7)
        total = seconds(lambda: agent.learn(steps, callback=deadline), device)
    steps, n_updates = agent.num_timesteps, agent._n_updates
    sums = {name: sum(taken) for name, taken in spent.items()}
    sums["env and all else"] = total - sum(sums.values())
    for name, value in sums.items():
        yield f"hopper, {name}", steps, value, "s"
    yield "hopper, all", steps, total, "s"
    yield "hopper, updates a second", n_updates, n_updates / sums["updates"], "1/s"
    if not spent["fits"]:
        return
    # An upper end: a refill costs in proportion to k, each fit goes to its bound, and random steps cost nothing.
    # The first fit comes with the first step after the random ones, the others at each multiple.
    first, steps_after = agent.learning_starts + 1, whole - agent.learning_starts
    at_fits = [first, *range(first - first % frequency + frequency, whole + 1, frequency)]
    assert isinstance(agent.dynamics, ProbabilisticEnsemble) and agent.dynamics.max_updates is not None
    most = agent.dynamics.max_updates * (len(at_fits) - 1 + FIRST_FIT)
    hours = {
        "updates": sums["updates"] / n_updates * agent.gradient_steps * steps_after,
        "fits": sums["fits"] / deadline.fit_steps * most,
        "rollouts": statistics.median(spent["rollouts"]) * sum(rollout_length(agent.rollout_schedule, at) for at in at_fits),
        "env and all else": sums["env and all else"] / (steps - agent.learning_starts) * steps_after,
    }
    for name, value in {**hours, "all": sum(hours.values())}.items():
        yield f"hopper, {name}, EXTRAPOLATED to {whole} steps", whole, value / 3600, "h"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


MEASURES = {"updates": updates, "profile": profile, "fit": fit, "rollout": rollout, "hopper": hopper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--csv", type=Path, help="default: docs/benchmarks/gpu.csv")
    # A tiny version that writes nothing unless --csv is given: to try the script.
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tiny = args.device == "cpu"
    if not tiny and not th.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch sees no CUDA GPU here, so there is nothing to measure")
    gpu = "none" if tiny else th.cuda.get_device_name()
    versions = [th.__version__, str(th.version.cuda), stable_baselines3.__version__]
    print(f"GPU {gpu}, torch {versions[0]}, CUDA {versions[1]}, stable-baselines3 {versions[2]}", flush=True)
    path = args.csv or (None if tiny else ROOT / "docs" / "benchmarks" / "gpu.csv")
    for measure, round_, value, unit in MEASURES[args.measure](args.device, tiny):
        print(f"{measure:100} {round_:>15} {value:12.5g} {unit}", flush=True)
        if path is not None:
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(COLUMNS)
                row = [measure, round_, f"{value:.5g}", unit, gpu, cpu_name(), *versions]
                writer.writerow([date.today().isoformat(), *row])


if __name__ == "__main__":
    main()
