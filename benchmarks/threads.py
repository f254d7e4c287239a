"""
How many threads, and how they wait: updates, fits and rollouts with each choice in turns, alone and beside a busy process.

    python benchmarks/threads.py                       # all arms, alone and beside a process that this script starts
    python benchmarks/threads.py --rounds 9 --minutes 9
    python benchmarks/threads.py --arms 1 2 --kinds update --beside 0 --append

Each arm is a process of its own, because libgomp reads how its threads wait when it is loaded; between two measurements it
sleeps. Everything has Hopper's sizes, as in speed.py. ``others`` is how many cores other processes of the machine used during
a measurement (from /proc/stat, so Linux only), the busy process not counted; the first table leaves out what was measured with
more than ``--quiet``. The CPU seconds of the main thread depend less on others: with passive waiting it does not compute
while it waits, so one thread's seconds over the main thread's of two are about the most that the second thread can save.
Results go to docs/benchmarks/threads.csv.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "threads.csv"
# What is set before torch is loaded. Unset, libgomp spins 300,000 times, some milliseconds, before a thread sleeps.
ARMS = {
    "1": {"OMP_NUM_THREADS": "1"},
    "2": {"OMP_NUM_THREADS": "2"},
    "2, short spin": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "5000"},
    "2, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
KINDS = {"update": 40, "fit": 18, "rollout": 50_000}  # amount of one measurement, in updates, gradient steps, states
CLOCKS = (time.perf_counter, time.process_time, time.thread_time)
# Ends with the process that started it.
BUSY = [sys.executable, "-c", "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"]


def workload() -> dict[str, Callable[[], object]]:
    """One measurement of each kind."""
    from speed import BATCH, mixed_agent

    from sb3_mbpo import ProbabilisticEnsemble
    from sb3_mbpo.dynamics.probabilistic_ensemble import FIRST_FIT

    agent = mixed_agent(5_000, dynamics_kwargs={"max_updates": 20})
    agent.rollout_batch_size = KINDS["rollout"]
    agent.fit_dynamics()
    transitions = agent.replay_buffer.real_transitions()

    def fit() -> None:
        most = round(KINDS["fit"] / FIRST_FIT)
        ProbabilisticEnsemble(11, 3, seed=0, batch_size=BATCH, max_updates=most).fit(transitions)

    return {"update": lambda: agent.train(KINDS["update"], BATCH), "fit": fit, "rollout": agent.generate_rollouts}


def work(kinds: list[str]) -> None:
    """A worker: reads a kind from each line of standard input, and answers with its seconds by ``CLOCKS``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runs = workload()
    for kind in kinds:
        runs[kind]()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        before = [clock() for clock in CLOCKS]
        runs[line.strip()]()
        print(json.dumps([clock() - start for clock, start in zip(CLOCKS, before, strict=True)]), file=answers, flush=True)


class Worker:
    """The other end of :func:`work`."""

    def __init__(self, arm: str, kinds: list[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
        command = [sys.executable, __file__, "--work", "--kinds", *kinds]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment | ARMS[arm], **pipes)
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, kind: str) -> list[float]:
        """:return: seconds of one measurement: of the wall clock, of all threads, of the main thread"""
        assert self.process.stdin is not None
        print(kind, file=self.process.stdin, flush=True)
        return self.answer()


@contextmanager
def busy(count: int) -> Iterator[list[int]]:
    """Within, so many processes compute without a pause; their process ids."""
    processes = [subprocess.Popen(BUSY) for _ in range(count)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def machine_seconds() -> float:
    """CPU seconds that all processes of this machine have used, and those that its host has taken away."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def others_use(interval: float = 0.2) -> float:
    """Cores that the machine's processes use, while this script and its workers sleep."""
    before, started = machine_seconds(), time.perf_counter()
    time.sleep(interval)
    return (machine_seconds() - before) / (time.perf_counter() - started)


def wait_until_quiet(quiet: float, deadline: float) -> bool:
    """:return: whether the machine was quiet before ``deadline``, by ``time.monotonic``"""
    while others_use() > quiet:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def measure(workers: dict[str, Worker], arm: str, kind: str, beside: int) -> dict[str, object]:
    """One line of the results."""
    with busy(beside) as pids:
        own = [*pids, workers[arm].process.pid, os.getpid()]
        before, mine, started = machine_seconds(), sum(map(process_seconds, own)), time.perf_counter()
        wall, cpu, main = workers[arm].ask(kind)
        elapsed, mine = time.perf_counter() - started, sum(map(process_seconds, own)) - mine
        others = max(0.0, machine_seconds() - before - mine) / elapsed
    line: dict[str, object] = {"kind": kind, "arm": arm, "beside": beside, "per_second": f"{KINDS[kind] / wall:.5g}"}
    seconds = {"seconds": wall, "cpu_seconds": cpu, "main_thread_seconds": main}
    return line | {name: f"{value:.4f}" for name, value in seconds.items()} | {"others": f"{others:.2f}"}


def table(lines: list[dict[str, object]], column: str) -> None:
    """Medians of one column, range and number of lines: a row for each kind and number of busy processes."""
    arms = [arm for arm in ARMS if any(line["arm"] == arm for line in lines)]
    print(f"\n| {column} | busy processes | " + " | ".join(arms) + " |\n" + "|---" * (2 + len(arms)) + "|")
    for kind, beside in dict.fromkeys((str(line["kind"]), line["beside"]) for line in lines):
        cells = []
        for arm in arms:
            mine = [line for line in lines if (line["kind"], line["beside"], line["arm"]) == (kind, beside, arm)]
            values = [float(str(line[column])) for line in mine]
            spread = f"{statistics.median(values):,.4g} ({min(values):,.4g} - {max(values):,.4g})" if values else "-"
            cells.append(f"{spread}, {len(values)}")
        print(f"| {kind} | {beside} | " + " | ".join(cells) + " |")


def save(lines: list[dict[str, object]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0]])
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no round after so many")
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--beside", nargs="+", type=int, default=[0, 1], help="numbers of busy processes")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may have used in a line that counts")
    parser.add_argument("--wait", action="store_true", help="before each measurement, wait until the machine is quiet")
    parser.add_argument("--append", action="store_true", help="keep the lines that are in the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.kinds)
    import torch as th

    deadline = time.monotonic() + 60 * args.minutes
    workers = {arm: Worker(arm, args.kinds) for arm in args.arms}
    origin = {"date": date.today(), "cores": os.cpu_count(), "torch": th.__version__}
    lines: list[dict[str, object]] = []
    if args.append and args.results.exists():
        with args.results.open() as file:
            lines += [{**line, "beside": int(line["beside"])} for line in csv.DictReader(file)]
    for i in range(1, args.rounds + 1):
        if time.monotonic() > deadline:
            break
        for kind in args.kinds:
            for beside in args.beside:
                for arm in args.arms[:: 1 if i % 2 else -1]:
                    if args.wait and not wait_until_quiet(args.quiet, deadline):
                        break
                    lines.append({**origin, "round": i, **measure(workers, arm, kind, beside)})
                    save(lines, args.results)
                    print(*lines[-1].values(), flush=True)
    for worker in workers.values():
        worker.process.kill()
    counted = [line for line in lines if float(str(line["others"])) <= args.quiet]
    print(f"\n{len(counted)} of {len(lines)} lines were measured on a quiet machine")
    table(counted, "per_second")
    print("\nAll lines:")
    table(lines, "per_second")
    table(lines, "cpu_seconds")
    table(lines, "main_thread_seconds")


if __name__ == "__main__":
    main()
