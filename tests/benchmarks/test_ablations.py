"""benchmarks/ablations.py: arms that the algorithm takes, and the table made of runs that ended and those that were cut."""

import ablations
import evidence
import pytest
from test_evidence import leave

from sb3_mbpo import DHMBPO


@pytest.mark.parametrize("arm", ablations.ARMS)
def test_arms_are_settings_of_the_algorithm(arm: str) -> None:
    from torch import nn

    given = {name: eval(value, {"nn": nn}) if isinstance(value, str) else value for name, value in ablations.ARMS[arm].items()}
    agent = DHMBPO("MlpPolicy", "Pendulum-v1", **given)
    for name, value in given.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(agent, name) == expected or name in ("policy_kwargs", "dynamics_kwargs")
    assert len(agent.critic.q_networks) == (5 if arm in ("critics_5", "published_networks") else 2)


def test_collect_and_table(tmp_path) -> None:
    path, logs = tmp_path / "ablations.csv", tmp_path / "logs"
    first, cut = ablations.runs(["default", "critics_5"], ["Hopper-v5"], [0], 15_000)
    leave(first, logs, 15_000, finished=True)
    leave(cut, logs, 4_000)
    rows = ablations.collect([first, cut], logs, path)
    assert [(row["arm"], row["step"]) for row in rows if row["step"] in ("15000", "4000")] == [
        ("default", "4000"),
        ("default", "15000"),
        ("critics_5", "4000"),
    ]
    last = next(row for row in rows if row["step"] == "15000")
    # The means of three episodes; seconds without those of the evaluations.
    assert (last["return"], last["length"], last["cpu_seconds"], last["commit"]) == ("15000", "10", "750", "1a2b")
    default, other = ablations.table(rows).splitlines()[2:]
    assert default == "| Hopper-v5, default | 1 | 5,000 | 10,000 | 15,000 | 13,000 | 11,000 | 50 |"
    assert other.startswith("| Hopper-v5, critics_5 | 1 |  |  |  | 2,000 | 0 |")
    # A shorter log does not replace what was collected; other runs stay.
    leave(first, logs, 2_000)
    assert ablations.collect([first], logs, path) == rows == evidence.read(path)
