"""The page: what it says of good and bad dynamics, and that it needs no other file."""

import dataclasses
import re
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("matplotlib") is None:
    pytest.skip("needs sb3_mbpo[plots]", allow_module_level=True)

from test_diagnosis_figures import made

from sb3_mbpo.diagnostics.report_page import (
    Findings,
    of_prediction,
    of_returns,
    of_trust,
    share,
    table_of_dimensions,
    tiles,
    write_page,
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longest, and are tested in test_diagnosis_figures.py."""
    monkeypatch.setattr("sb3_mbpo.diagnostics.report_figures.png", lambda figure: b"PNG")


def findings(**changes) -> Findings:
    return Findings(
        **{
            "diagnosis": made(),
            "imagined_returns": np.full((19, 1), 100.0),
            "deterministic_returns": [7.0, 8.0],
            "averaged_actor": False,
            "explained": [0.98765, 0.5],
            "termination": "learned",
            "rollout_length": 3,
            "theorem": True,
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
    assert "the R\N{SUPERSCRIPT TWO} of the dynamics compared with no change is 1.00." in said
    assert "stays below half a standard deviation for all 8 steps" in said
    # The samples are spread around what happened.
    assert "After 8 steps, its 90 % intervals contain 100.0 % of the real values: too cautious." in said
    assert "not finite" not in said


def test_words_about_bad_predictions():
    said = " ".join(of_prediction(constant(findings(), 100.0)))
    assert "worse than predicting no change</b>" in said and "exceeds half a standard deviation after 1 step." in said


def test_words_about_what_the_log_says():
    """The two numbers as SB3's logger prints them."""
    said = " ".join(of_prediction(findings()))
    assert "<code>dynamics/explained_obs</code> was 0.5 at the last fit" in said
    assert "<code>dynamics/explained_reward</code> was 0.988." in said
    assert ">0.988</b>" in tiles(findings()) and ">0.5</b>" in tiles(findings())
    assert "explained_obs" not in " ".join(of_prediction(findings(explained=[np.nan, np.nan])))


def test_words_about_returns():
    sampled = f"{made().episodes[0].rewards.sum():.2f}".replace("-", "\N{MINUS SIGN}")
    said = " ".join(of_returns(findings()))
    assert "deterministic actions is 7.50, as <code>evaluate_policy</code> shows it, and that of" in said
    assert f"sampled actions {sampled}, as in model rollouts." in said
    assert "Imagined episodes with sampled actions from the same first states have a mean return of 100." in said
    assert "as in model rollouts; deterministic actions come from an av" in " ".join(of_returns(findings(averaged_actor=True)))
    assert "Imagined" not in " ".join(of_returns(findings(imagined_returns=np.full((19, 1), np.nan))))


@pytest.mark.parametrize(("termination", "words"), [("known", "the env's own rule"), ("given", "<code>termination_fn</code>")])
def test_a_rule_that_was_not_learned_gets_no_verdict(termination, words):
    of = made()
    ended = [episode._replace(terminated=True) for episode in of.episodes]
    missed = findings(diagnosis=dataclasses.replace(of, episodes=ended), termination="learned")
    assert "The learned termination predicts 0 % of the ends" in " ".join(of_trust(missed))
    said = " ".join(of_trust(dataclasses.replace(missed, termination=termination)))
    assert words in said and "predicts 0 %" not in said


def test_words_about_trust():
    said = " ".join(of_trust(findings()))
    assert "By Theorem 4.3, the current rollout length of 3 is useful if the policy shift is larger than" in said
    assert "the optimal rollout length of Theorem 4.3 is k* = " in " ".join(of_trust(findings(shifts=[0.5, 0.7])))
    assert "Theorem" not in " ".join(of_trust(findings(gamma=1.0, shifts=[0.5])))
    assert "is useful for no policy shift" in " ".join(of_trust(constant(findings(), 100.0)))


def test_optimal_length_is_that_of_the_mean_shift():
    found = findings(shifts=[0.2, 0.6])
    error = found.diagnosis.model_error()
    assert 0 < error < 0.4
    assert found.optimal == int(np.ceil(np.log(error / 0.4) / np.log(0.99)))
    assert f">{found.optimal}</b>" in tiles(found) and found.optimal is not None
    assert findings().optimal is None and "k*" not in tiles(findings())


def test_an_algorithm_that_the_theorem_is_not_about(tmp_path):
    write_page(tmp_path / "page.html", findings(theorem=False, shifts=[0.2]), {"env": "x"})
    page = (tmp_path / "page.html").read_text()
    assert "Theorem" not in page and "k*" not in page and "How long should rollouts be" not in page
    assert page.count("data:image/png") == 5


def test_table():
    html = table_of_dimensions(findings())
    assert html.count("<tr>") == 5 and "<td>reward</td>" in html and "<td>obs 2</td>" in html
    named = findings(diagnosis=dataclasses.replace(made(), names=["reward", "x", "y", "<z>"]))
    assert "<td>x</td>" in table_of_dimensions(named) and "<td>&lt;z&gt;</td>" in table_of_dimensions(named)
    assert "worst predicted of 61 columns" in table_of_dimensions(findings(diagnosis=made(obs_dim=60)))


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
