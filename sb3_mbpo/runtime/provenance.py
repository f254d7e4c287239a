"""Information about the origin of a result: versions, hardware, commit."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch as th

PACKAGES = ("sb3_mbpo", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "mujoco", "torch", "numpy")


def versions() -> dict[str, str]:
    """:return: versions of Python and of the installed packages that training depends on"""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """:return: operating system, processor, number of cores, and GPUs if there are any"""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        # Python may know only the architecture.
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    cards = [th.cuda.get_device_name(i) for i in range(th.cuda.device_count())]
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu, "cores": os.cpu_count(), "gpus": cards}


def commit(folder: Path) -> str | None:
    """
    :param folder: a folder
    :return: its commit, with ``+`` if files differ from it; ``None`` without git, or if it is not the root of a checkout
    """
    if not (folder / ".git").exists():
        return None
    try:
        run = ("git", "-C", str(folder))
        head = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def provenance() -> dict[str, Any]:
    """:return: versions, hardware and commit of this process"""
    checkout = Path(__file__).resolve().parents[2]
    return {"versions": versions(), "hardware": hardware(), "commit": commit(checkout)}


def merged(items: Iterable[Any]) -> Any:
    """
    Merge the values of several runs.

    :param items: values of the same kind; mappings are merged key by key
    :return: the value if all are equal; otherwise the list of different values, in order of appearance
    """
    items = list(items)
    if items and all(isinstance(item, dict) for item in items):
        keys = dict.fromkeys(key for item in items for key in item)
        return {key: merged(item[key] for item in items if key in item) for key in keys}
    different: list[Any] = []
    for item in items:
        if item not in different:
            different.append(item)
    return different[0] if len(different) == 1 else different
