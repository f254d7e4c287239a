"""How many threads PyTorch computes with inside ``learn``: one, unless the user has chosen."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch as th

# Either one sets PyTorch's number of threads when it is loaded.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# "1" where two logical cores may share one physical core; Linux only.
HYPER_THREADING = Path("/sys/devices/system/cpu/smt/active")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_counts(cores: int) -> set[int]:
    """
    :param cores: logical cores
    :return: numbers of threads that PyTorch takes by itself: one per core, with MKL one per physical core
    """
    if HYPER_THREADING.exists() and HYPER_THREADING.read_text().strip() != "1":
        return {cores}
    return {cores, cores // 2}


def user_choice() -> str | None:
    """
    What shows that the user has chosen the number of threads; ``None``: it is PyTorch's default.

    PyTorch does not record who set the number. So ``torch.set_num_threads`` with the default itself is not recognized.
    """
    for name in VARIABLES:
        if os.environ.get(name):
            return name
    count = th.get_num_threads()
    return None if count > 1 and count in default_counts(available_cores()) else "torch.set_num_threads"


@contextmanager
def chosen(count: int) -> Iterator[None]:
    """
    Within, the number of threads counts as chosen by the user. Does not set it.

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
    One line about the threads of a run.

    :param count: number of threads
    :param choice: as of :func:`user_choice`
    """
    cores = available_cores()
    line = f"CPU threads: {count} of {cores} core{'s' if cores > 1 else ''}"
    if choice is None:
        return f"{line} (OMP_NUM_THREADS={cores} uses all, see the guide on speed)"
    line += f" ({choice})" if cores > 1 else ""
    if count == 1 or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return line
    return line + ". Beside other work they can be many times slower than one, unless OMP_WAIT_POLICY=PASSIVE is set as well"


@contextmanager
def one_thread_by_default() -> Iterator[str]:
    """
    Within, PyTorch computes with one thread, unless the user has chosen a number; afterwards with as many as before.

    Several threads wait for each other at each of the many small operations of an update, and OpenMP's threads compute
    while they wait. On cores that other processes need as well, each wait then lasts until the operating system gives
    the other thread its turn.

    A number that is set within is kept. Other threads of this process keep theirs.

    :yield: one line about the threads
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
