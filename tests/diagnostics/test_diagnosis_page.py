"""The page: what it says of good and bad dynamics, and that it needs no other file."""

import dataclasses
import re
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("matplotlib") is None:
    pytest.skip("needs sb3_mbpo[plots]", allow_module_level=True)

from test_diagnosis_figures import made

from sb3_mbpo.diagnostics.report_page import Findings, of_prediction, of_trust, share, table, tiles, write_page


def findings(**changes) -> Findings:
    return Findings(
        **{
            "diagnosis": made(),
            "imagined_returns": np.full((19, 1), 100.0),
            "rollout_length": 3,
            "gamma": 0.99,
            "shifts": [],
            "video": "the env does not render pictures",
            **changes,
        }
    )


def constant(found: Findings, value: float) -> Findings:
    """The same with every prediction a constant."""
    of = found.diagnosis
    changed = {name: np.full_like(getattr(of, name), value) for name in ("step_samples", "further_samples")}
    return dataclasses.replace(found, diagnosis=dataclasses.replace(of, **changed))


def test_page_needs_no_other_file(tmp_path):
    write_page(tmp_path / "page.html", findings(video=b"frames"), {"env": "Walk-v0", "command": "python <x>"})
    html = (tmp_path / "page.html").read_text()
    assert "How accurate is this model? Walk-v0" in html and "python &lt;x&gt;" in html
    assert len(re.findall(r'src="data:image/png;base64,', html)) == 6
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "http" not in html and "@import" not in html
    assert "data:image/webp;base64,ZnJhbWVz" in html


def test_words_about_good_predictions():
    said = " ".join(of_prediction(findings()))
    assert "One step ahead, the dynamics explains 100.0 % of what changes." in said
    assert "stays below half a standard deviation for all 8 steps" in said
    # The samples are spread around what happened.
    assert "After 8 steps, its 90 % intervals contain 100.0 % of the real values: too cautious." in said
    assert "not finite" not in said


def test_words_about_bad_predictions():
    said = " ".join(of_prediction(constant(findings(), 100.0)))
    assert "worse than predicting no change</b>" in said and "exceeds half a standard deviation after 1 step." in said


def test_words_about_trust():
    said = " ".join(of_trust(findings()))
    assert (
        f"imagined episodes is 100, that of the real ones {made().episodes[0].rewards.sum():.2f}".replace(
            "-", "\N{MINUS SIGN}"
        )
        in said
    )
    assert "By Theorem 4.3, the current rollout length of 3 is useful if the policy shift is larger than" in said
    assert "the optimal rollout length of Theorem 4.3 is k* = " in " ".join(of_trust(findings(shifts=[0.5, 0.7])))
    assert "Theorem" not in " ".join(of_trust(findings(gamma=1.0, shifts=[0.5])))
    assert "is useful for no policy shift" in " ".join(of_trust(constant(findings(), 100.0)))


def test_optimal_length_is_that_of_the_mean_shift():
    found = findings(shifts=[0.2, 0.6])
    error = found.diagnosis.model_error()
    assert 0 < error < 0.4
    assert found.optimal == int(np.ceil(np.log(error / 0.4) / np.log(0.99)))
    assert f">{found.optimal}</b>" in tiles(found) and found.optimal is not None and findings().optimal is None


def test_table():
    html = table(findings())
    assert html.count("<tr>") == 5 and "<td>reward</td>" in html and "<td>obs 2</td>" in html
    assert "worst predicted of 61 columns" in table(findings(diagnosis=made(obs_dim=60)))


def test_episodes_shorter_than_the_horizon(tmp_path):
    found = findings(diagnosis=made(n_steps=4, horizon=9))
    assert found.reach == 4
    write_page(tmp_path / "page.html", found, {"env": "x"})
    html = (tmp_path / "page.html").read_text()
    assert "4 steps" in html and "No video: the env does not render pictures." in html


def test_nothing_finite(tmp_path):
    write_page(tmp_path / "page.html", constant(findings(), np.nan), {"env": "x"})
    assert "No prediction of this dynamics is finite" in (tmp_path / "page.html").read_text()


def test_shares():
    assert [share(x) for x in (0.973, 0.5, np.nan)] == ["97.3 %", "50 %", "\N{EN DASH}"]
