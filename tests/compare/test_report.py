"""The table and the page: numbers worked out by hand, and nothing that another file would be needed for."""

# Dashes, minus signs and multiplication signs as a reader sees them.
# ruff: noqa: RUF001

import base64
import html
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
if find_spec("rliable") is None or find_spec("pandas") is None:
    pytest.skip("needs sb3_mbpo[compare]", allow_module_level=True)

import pandas as pd

from sb3_mbpo.compare import aggregates
from sb3_mbpo.compare.report import Summary, against, default_thresholds, markdown, summarise, table, write_report


def results(algorithm: str, finals: list[float], slowness: float = 6.0, env: str = "E-v0") -> pd.DataFrame:
    """One row per seed and step: half of the final return at step 10, all of it at step 20."""
    seconds = ("env_and_policy_seconds", "updates_seconds", "fits_seconds", "rollouts_seconds", "evaluation_seconds")
    return pd.DataFrame(
        [
            {"env": env, "algorithm": algorithm, "seed": seed, "step": step, "episode": 0, "return": final * step / 20}
            | {"seconds": slowness * step * (seed + 1)}
            | {name: (i + 1) * step * (seed + 1) / 20 for i, name in enumerate(seconds)}
            for seed, final in enumerate(finals)
            for step in (0, 10, 20)
        ]
    )


@pytest.fixture(autouse=True)
def fewer_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "REPETITIONS", 200)


ROWS = pd.concat([results("mbpo", [100, 200, 600]), results("sac", [40, 50, 60], slowness=3.0)])


def test_summary() -> None:
    mbpo, sac = summarise(ROWS, threshold=50)
    assert (mbpo.algorithm, mbpo.seeds, mbpo.final) == ("mbpo", 3, 300)
    assert mbpo.low == 100 and mbpo.high == 600
    # All have half of it, 50 and more, at step 10: after 60, 120 and 180 seconds.
    assert (mbpo.reached, mbpo.steps, mbpo.minutes) == (3, 10, 2)
    # In the end 120, 240 and 360 seconds.
    assert mbpo.total_minutes == 4
    assert mbpo.phases == [2, 4, 6, 8, 10]
    # 40 is too low, 50 just enough, at step 20, after 120 and 180 seconds.
    assert (sac.reached, sac.steps, sac.minutes, sac.total_minutes) == (2, 20, 3, 2)


def test_threshold_that_most_seeds_miss() -> None:
    _, sac = summarise(ROWS, threshold=55)
    assert sac.reached == 1 and sac.steps == sac.minutes == np.inf
    head, rows = table(summarise(ROWS, 55), "sac", 55)
    assert head[2] == "steps to 55"
    # Nothing to compare with.
    assert rows[0][2] == ("10", "3 of 3 seeds")
    assert rows[1][2] == ("\N{EN DASH}", "1 of 3 seeds")


def test_one_seed_has_no_interval() -> None:
    (one,) = summarise(results("a", [3]), 1)
    assert one.seeds == 1 and np.isnan(one.low)
    assert table([one], None, 1)[1][0][:2] == [("a", "1 seed"), ("3", "")]


@pytest.mark.parametrize(
    ("baseline", "value", "text"),
    [
        (10, 2, "5.0× less"),
        (2, 10, "5.0× more"),
        (3, 3, "1.0× less"),
        (np.inf, 3, ""),
        (3, np.inf, ""),
        (0, 3, ""),
        (3, 0, ""),
    ],
)
def test_ratio(baseline: float, value: float, text: str) -> None:
    assert against(baseline, value) == text


def test_table_against_the_baseline() -> None:
    phases = [2.0] * 5
    ours = Summary("mbpo", 5, -150, -160, -140, 5, 1000, 4, 20, phases)
    theirs = Summary("sac", 5, -1000, -1100, -900, 3, 5000, 1, 2, phases)
    _, rows = table([ours, theirs], "sac", -200)
    assert rows[0][:5] == [
        ("mbpo", "5 seeds"),
        ("−150", "−160 to −140"),
        ("1,000", "5 of 5 seeds; 5.0× less"),
        ("4", "4.0× more"),
        ("20", "10.0× more"),
    ]
    assert [small for _, small in rows[1][:5]] == ["5 seeds, baseline", "−1,100 to −900", "3 of 5 seeds", "", ""]
    lines = markdown([ours, theirs], "sac", -200).splitlines()
    assert lines[2].startswith("| mbpo (5 seeds) | −150 (−160 to −140) | 1,000 (5 of 5 seeds; 5.0× less) |")
    assert {line.count("|") for line in lines} == {11}


def test_default_threshold_is_the_baselines_end() -> None:
    rows = pd.concat([ROWS, results("mbpo", [7, 9], env="F-v0")])
    assert default_thresholds(rows, "sac") == {"E-v0": 50, "F-v0": 8}
    # Without a baseline, what all reach.
    assert default_thresholds(ROWS, None) == {"E-v0": 50}
    assert default_thresholds(ROWS, "mbpo") == {"E-v0": 300}


MANIFEST: dict[str, Any] = {
    "command": "sb3_mbpo compare --algo a<b",
    "created": "2030-01-02T03:04:05+00:00",
    "arguments": {
        **{"algo": ["a<b", "sac"], "steps": 20_000, "eval_freq": 1000, "eval_episodes": 5, "threads": 1, "workers": 2},
        **{"baseline": "sac", "threshold": None},
    },
    "versions": {"torch": ["2.12", "2.13"], "python": "3.12"},
    "hardware": {"cpu": "Fast", "cores": 8, "gpus": []},
    "commit": None,
    "settings": {"E-v0": {"a<b": {"gamma": 0.5}}},
    "failed": [],
}


def page(tmp_path: Path, rows: pd.DataFrame, **changes: Any) -> tuple[str, str]:
    """:return: the page, and its text without tags"""
    (tmp_path / "E.png").write_bytes(b"picture")
    write_report(tmp_path / "r.html", rows, MANIFEST | changes, {"E-v0": tmp_path / "E.png"}, {"E-v0": 50.0})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    return text, html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", "", text)))


def test_page(tmp_path: Path) -> None:
    source, said = page(tmp_path, pd.concat([results("a<b", [100, 200, 600]), results("sac", [40, 50, 60])]))
    picture = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    assert re.findall(r'(?:src|href)="([^"]*)"', source) == [picture]
    for words in (
        *("sb3_mbpo compare --algo a<b", "torch 2.12 or 2.13, python 3.12", "cpu: Fast, cores: 8", "not from a git checkout"),
        *("20,000 env steps, 5 episodes every 1,000 steps, 1 PyTorch thread, up to 2 runs", "a<b: {'gamma': 0.5}"),
        *("Threshold: 50, the final return of sac", "100 to 600", "3 seeds, baseline"),
    ):
        assert words in said
    assert "runs failed" not in said


def test_one_of_everything(tmp_path: Path) -> None:
    ones = dict.fromkeys(["steps", "eval_freq", "eval_episodes", "threads", "workers"], 1)
    _, said = page(tmp_path, results("sac", [1]), arguments={**ones, "algo": ["sac"], "baseline": None, "threshold": None})
    assert "1 algorithm on E-v0" in said and "1 env step, 1 episode every 1 step, 1 PyTorch thread, up to 1 run at" in said


def test_failed_runs_are_named(tmp_path: Path) -> None:
    _, said = page(tmp_path, results("sac", [1, 2]), failed=["E-v0, a<b, seed 3"])
    assert "These runs failed and are not included:E-v0, a<b, seed 3" in said
