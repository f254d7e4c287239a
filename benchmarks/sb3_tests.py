"""
Stable-Baselines3's own tests with MBPO and DHMBPO in SAC's place: what SAC passes and these do not, and why.

    git clone --depth 1 --branch v2.9.2 https://github.com/DLR-RM/stable-baselines3
    python benchmarks/sb3_tests.py stable-baselines3/tests

Take the tag of the installed version. What follows the folder goes to pytest: ``-k "run or spaces"``.
"""

import functools
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mbpo import DHMBPO, MBPO

# What is refused, by the words of its errors. Any other failure is a difference that nobody wanted.
REFUSAL = (
    r"ValueError: (?:env: the (\w+ space \w+)|(replay_buffer_class|n_steps|optimize_memory_usage)=.* is not supported"
    r"|(use_sde|policy|gamma)=.* must be )"
)


class Watcher:
    """A pytest plugin that selects the cases and notes how they end."""

    def __init__(self, algorithm: type, cases: set[str] | None) -> None:
        self.algorithm, self.cases = algorithm, cases
        self.errors: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = filter(self._wanted, items)

    def _wanted(self, item: Any) -> bool:
        if self.cases is not None:
            return item.nodeid in self.cases
        # Whatever may make a SAC: no other algorithm is its parameter.
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        others = [v for v in values if isinstance(v, type) and issubclass(v, BaseAlgorithm) and v is not self.algorithm]
        return not others and any(value is self.algorithm for value in vars(item.module).values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.errors[report.nodeid] = "" if report.passed else f"{report.outcome}: {report.longreprtext}"


def run(tests: Path, algorithm: type, cases: set[str] | None, options: list[str]) -> dict[str, str]:
    """
    :param cases: what to run; ``None``: whatever makes a SAC
    :return: for each case its error, empty if it passed
    """
    watcher, makers, init = Watcher(algorithm, cases), set(), SAC.__init__

    @functools.wraps(init)
    def noted(*args: Any, **kwargs: Any) -> None:
        makers.add(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
        init(*args, **kwargs)

    SAC.__init__ = noted  # type: ignore[method-assign]
    # Cases and log folders are called after it.
    algorithm.__name__ = "SAC"
    for module in (stable_baselines3, stable_baselines3.sac, stable_baselines3.sac.sac):
        module.SAC = algorithm  # type: ignore[attr-defined]
    # The tests write into the current folder, and some of their files need what may not be installed.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        options = ["--rootdir", str(tests.parent), "--continue-on-collection-errors", *options]
        pytest.main([str(tests), *options], plugins=[watcher])
        os.chdir(tests)
    return {case: error for case, error in watcher.errors.items() if case in (makers if cases is None else cases)}


def main(tests: str, *options: str) -> None:
    os.environ["PYTHONHASHSEED"] = "0"
    results: list[dict[str, str]] = []
    for algorithm in (SAC, MBPO, DHMBPO):
        passed = {case for case, error in results[0].items() if not error} if results else None
        # A process for each: what one has replaced, the other must not see.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            results.append(pool.submit(run, Path(tests).resolve(), algorithm, passed, list(options)).result())
    sac, *others = results
    print(f"Stable-Baselines3 {stable_baselines3.__version__}: {len(sac)} cases make a SAC")
    unwanted = [tell(name, result) for name, result in zip(("MBPO", "DHMBPO"), others, strict=True)]
    sys.exit(any(unwanted))


def tell(name: str, result: dict[str, str]) -> bool:
    """
    Print which cases do not pass, and why.

    :param name: of the algorithm
    :param result: of the cases that SAC passes, the error or nothing
    :return: whether there is one that is no refusal
    """
    found = {case: re.search(REFUSAL, error) for case, error in result.items() if error}
    reasons = {case: next(filter(None, match.groups())) if match else "NOT A REFUSAL" for case, match in found.items()}
    for case, reason in sorted(reasons.items()):
        print(f"{reason:32}{case}")
    print(f"{len(result)} pass with SAC, {len(result) - len(reasons)} with {name}; others: {dict(Counter(reasons.values()))}")
    return "NOT A REFUSAL" in reasons.values()


if __name__ == "__main__":
    main(*sys.argv[1:])
