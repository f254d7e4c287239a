"""The number of PyTorch threads in ``learn``: one, unless the user has set it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch as th

# Each of them sets PyTorch's number of threads when it is loaded.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# "1" if two logical cores may share one physical core; Linux only.
HYPER_THREADING = Path("/sys/devices/system/cpu/smt/active")


def available_cores() -> int:
    """:return: number of cores that this process may use"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_counts(cores: int) -> set[int]:
    """
    :param cores: number of logical cores
    :return: possible defaults of PyTorch's number of threads: one per core, or one per physical core with MKL
    """
    if HYPER_THREADING.exists() and HYPER_THREADING.read_text().strip() != "1":
        return {cores}
    return {cores, cores // 2}


def user_choice() -> str | None:
    """
    Find out whether the user has set the number of threads.

    PyTorch does not record who set the number, so ``torch.set_num_threads`` with the default value is not recognized.

    :return: name of the variable or function that set it; ``None`` if it is PyTorch's default
    """
    for name in VARIABLES:
        if os.environ.get(name):
            return name
    count = th.get_num_threads()
    return None if count > 1 and count in default_counts(available_cores()) else "torch.set_num_threads"


@contextmanager
def chosen(count: int) -> Iterator[None]:
    """
    In this context, the number of threads counts as set by the user. It is not changed.

    :param count: number of threads
    """
    name = VARIABLES[0]
    before = os.environ.get(name)
    os.environ[name] = str(count)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def describe(count: int, choice: str | None) -> str:
    """
    Describe the threads of a run.

    :param count: number of threads
    :param choice: result of :func:`user_choice`
    :return: one line for the log
    """
    cores = available_cores()
    line = f"CPU threads: {count} of {cores} core{'s' if cores > 1 else ''}"
    if choice is None:
        return f"{line} (OMP_NUM_THREADS={cores} uses all, see the guide on speed)"
    line += f" ({choice})" if cores > 1 else ""
    if count == 1 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return line
    return line + ". If other programs run, they can be many times slower than one, unless OMP_WAIT_POLICY=PASSIVE is also set"


@contextmanager
def one_thread_by_default() -> Iterator[str]:
    """
    In this context, PyTorch uses one thread, unless the user has set a number. Afterwards, the previous number is restored.

    Several threads wait for each other at each of the many small operations of an update, and OpenMP's threads are busy while
    they wait. If other processes need the same cores, each wait lasts until the operating system schedules the other thread.

    A number that is set inside this context is kept. Other threads of this process keep their number.

    :yield: one line for the log
    """
    before, choice = th.get_num_threads(), user_choice()
    if choice is not None:
        yield describe(before, choice)
        return
    th.set_num_threads(1)
    try:
        yield describe(1, None)
    finally:
        if th.get_num_threads() == 1:
            th.set_num_threads(before)
