"""Where a result comes from: versions, hardware, commit."""

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
    """:return: of Python and of the packages that training depends on, as far as they are installed"""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """:return: operating system, processor, number of cores, and graphics cards if there are any"""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        # Where Python knows the architecture only.
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    cards = [th.cuda.get_device_name(i) for i in range(th.cuda.device_count())]
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu, "cores": os.cpu_count(), "gpus": cards}


def commit(folder: Path) -> str | None:
    """
    :param folder: maybe the root of a git checkout
    :return: its commit, with ``+`` where files differ from it; ``None``: it is no checkout, or there is no git
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
    """:return: all of that for this process"""
    checkout = Path(__file__).resolve().parents[2]
    return {"versions": versions(), "hardware": hardware(), "commit": commit(checkout)}


def merged(items: Iterable[Any]) -> Any:
    """
    What several runs have in common and where they differ.

    :param items: values of one kind; mappings are merged key by key
    :return: the value, if all agree; else the list of the different ones, in order of appearance
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
