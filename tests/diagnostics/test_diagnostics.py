"""The command: a page for what can be looked at, one sentence for what cannot."""

import copy
import html
import re
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST, TruePendulum

if find_spec("matplotlib") is None:
    pytest.skip("needs sb3_mbpo[plots]", allow_module_level=True)
pytest.importorskip("pygame")

from test_model_error_callback import same, state_of

from sb3_mbpo import DHMBPO, MBPO, MBTD3, write_report
from sb3_mbpo.diagnostics.report import main


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an agent, another at an earlier time, and one that is none."""
    folder = tmp_path_factory.mktemp("agents")
    agent = MBPO("MlpPolicy", "Pendulum-v1", verbose=1, **copy.deepcopy(FAST)).learn(25)
    agent.save(folder / "early.zip")
    agent.learn(40, reset_num_timesteps=False).save(folder / "late.zip")
    MBPO("MlpPolicy", "Pendulum-v1", **copy.deepcopy({**FAST, "policy_kwargs": {"net_arch": [9]}})).save(folder / "wide.zip")
    SAC("MlpPolicy", "Pendulum-v1").save(folder / "sac.zip")
    (folder / "text.zip").write_text("no zip")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short videos, and no pictures of the figures, which have tests of their own."""
    monkeypatch.setattr("sb3_mbpo.diagnostics.report.MOST_FILMED", 5)
    monkeypatch.setattr("sb3_mbpo.diagnostics.report_figures.png", lambda figure: b"PNG")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@pytest.mark.parametrize("safe", [[], ["--safe"]])
def test_report(agents, tmp_path, capsys, safe):
    out = tmp_path / "page.html"
    options = [str(agents / "late.zip"), "--env", "Pendulum-v1", "--earlier", str(agents / "early.zip"), "--out", str(out)]
    main([*options, "--episodes", "1", "--horizon", "10", *safe])
    page = out.read_text()
    assert capsys.readouterr().out.strip() == str(out)
    assert "MBPO after 65 steps" in page and "1 new episode, 200 steps, seed 0" in page
    assert "the optimal rollout length of Theorem 4.3 is k*" in page and "python -m sb3_mbpo report" in page
    assert page.count("data:image/png") == 6 and page.count("data:image/webp") == 1
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert len(page) < 3_000_000


def test_the_same_report_twice_and_another_agent(tmp_path):
    agent = MBTD3("MlpPolicy", "Pendulum-v1", **FAST).learn(25)
    options = {"n_episodes": 1, "horizon": 3, "max_episode_steps": 30}
    first, second = (write_report(agent, tmp_path / "page.html", **options).findings for _ in range(2))
    assert first.diagnosis.numbers(3) == pytest.approx(second.diagnosis.numbers(3), nan_ok=True)
    np.testing.assert_array_equal(first.imagined_returns, second.imagined_returns)
    assert first.optimal is None


DOUBLE = {**FAST, "policy_kwargs": {"net_arch": [8]}, "gradient_steps": 1, "training_horizon": 2, "rollout_batch_size": 8}


@pytest.mark.parametrize(("make", "settings"), [(MBPO, FAST), (DHMBPO, DOUBLE), (MBTD3, FAST)], ids=lambda part: "")
def test_the_page_says_what_the_user_sees(tmp_path, make, settings):
    """The return of evaluate_policy, and the numbers in the log; of a loaded agent, too."""
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    agent = make("MlpPolicy", env, **settings, verbose=1).learn(60)
    written = write_report(agent, tmp_path / "page.html", n_episodes=2, horizon=2, seed=7)
    of_user = VecNormalize(make_vec_env("Pendulum-v1", 1), training=False, norm_reward=False)
    of_user.obs_rms = env.obs_rms
    of_user.seed(7)
    # Monitor rounds returns.
    returns, _ = evaluate_policy(agent, of_user, 2, return_episode_rewards=True)
    assert written.findings.deterministic_returns == pytest.approx(returns, abs=1e-5)
    assert written.findings.deterministic_returns != written.findings.sampled_returns
    logged = agent.logger.name_to_value
    explained = [logged[f"dynamics/explained_{of}"] for of in ("reward", "obs")]
    page = (tmp_path / "page.html").read_text()
    assert f"<code>dynamics/explained_obs</code> was {explained[1]:.3g} at the last fit" in page
    assert ("average of the actor's weights" in page) == (make is DHMBPO)
    agent.save(tmp_path / "agent.zip")
    env.save(str(tmp_path / "statistics.pkl"))
    again = ["--env", "Pendulum-v1", "--normalize", str(tmp_path / "statistics.pkl"), "--episodes", "1", "--horizon", "2"]
    main([str(tmp_path / "agent.zip"), *again])
    assert f"<code>dynamics/explained_obs</code> was {explained[1]:.3g} at" in (tmp_path / "agent.html").read_text()


def test_what_write_report_returns(tmp_path, monkeypatch):
    """One short line in a terminal, the page in a notebook, and a path."""
    # Without a display, MuJoCo's renderer leaves a warning behind.
    monkeypatch.setattr("sb3_mbpo.diagnostics.report.video", lambda *args: b"frames")
    agent = MBPO("MlpPolicy", "InvertedPendulum-v5", **FAST).learn(40)
    written = write_report(agent, tmp_path / "page.html", n_episodes=1, horizon=2)
    assert "page.html" in repr(written) and len(repr(written)) < 200 and "\n" not in repr(written)
    with open(written) as file:
        page = file.read()
    shown = re.fullmatch(r'<iframe srcdoc="([^"]*)"[^<>]*></iframe>', written._repr_html_())
    assert shown is not None and html.unescape(shown[1]) == page
    assert "<td>hinge velocity</td>" in page and "Imagined episodes end by the env's own rule" in page


@pytest.mark.parametrize(("make", "settings"), [(MBPO, FAST), (DHMBPO, DOUBLE)], ids=lambda part: "")
def test_the_agent_is_only_looked_at(tmp_path, make, settings):
    states = []
    for look in (True, False):
        agent = make("MlpPolicy", "Pendulum-v1", **settings).learn(25)
        if look:
            write_report(agent, tmp_path / "page.html", n_episodes=1, horizon=3, max_episode_steps=30)
        states.append(state_of(agent))
    assert same(*states)


def test_the_true_simulator_returns_what_it_promises(tmp_path):
    """Imagined returns are those of other actions, so they agree in the mean only."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", dynamics_class=TruePendulum, **{**FAST, "dynamics_kwargs": {}}).learn(25)
    found = write_report(agent, tmp_path / "page.html", n_episodes=4, horizon=5, max_episode_steps=100).findings
    real = np.mean([episode.rewards.sum() for episode in found.diagnosis.episodes])
    assert found.imagined_returns.mean() == pytest.approx(real, rel=0.15)
    assert "compared with no change is 1.00." in (tmp_path / "page.html").read_text()


def test_env_without_a_spec(tmp_path):
    """There is no video, and imagined episodes are as long as real ones. The true system pays no less than -16.3 a step."""

    class Bare(gym.Wrapper):
        spec = None

    settings = {**FAST, "dynamics_kwargs": {}}
    agent = MBPO("MlpPolicy", "Pendulum-v1", dynamics_class=TruePendulum, **settings).learn(25)
    limited = lambda: gym.wrappers.TimeLimit(Bare(gym.make("Pendulum-v1").unwrapped), 7)  # noqa: E731
    found = write_report(agent, tmp_path / "page.html", env=limited, n_episodes=2, horizon=2).findings
    assert found.video == "it has no spec of Gymnasium's"
    assert [len(episode.rewards) for episode in found.diagnosis.episodes] == [7, 7]
    assert found.imagined_returns.min() > 7 * -16.3 and found.imagined_returns.max() < 0


def test_arguments_of_the_env(agents, tmp_path, capsys):
    """As those that the agent was trained with."""
    options = [str(agents / "late.zip"), "--env", "Pendulum-v1", "--episodes", "1", "--horizon", "2"]
    found = []
    with mock.patch("sb3_mbpo.diagnostics.report.write_page", lambda path, findings, about: found.append((findings, about))):
        for more in ([], ["--env-kwargs", "g:0.0"]):
            main([*options, *more, "--out", str(tmp_path / "page.html")])
    first, second = (findings.diagnosis.episodes[0] for findings, _ in found)
    assert np.array_equal(first.obs[0], second.obs[0]) and not np.allclose(first.obs, second.obs)
    assert found[1][1]["command"].endswith("--env-kwargs g:0.0 --out " + str(tmp_path / "page.html"))


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("nothing.zip", [], r"there is no file .*nothing\.zip$"),
        ("sac.zip", [], r"sac\.zip contains no dynamics: it was not saved by an algorithm of sb3_mbpo$"),
        ("text.zip", [], r"text\.zip is not an agent of sb3_mbpo: it is not a zip file, or is cut off$"),
        (
            "late.zip",
            ["--env", "MountainCarContinuous-v0"],
            r"late\.zip was trained in another env: Observation spaces do not",
        ),
        ("late.zip", ["--env", "Pendulun-v1"], r"--env Pendulun-v1: .*; did you mean 'Pendulum-v1'\?$"),
        ("late.zip", ["--env-kwargs", "g=1"], r"--env-kwargs g=1: write KEY:VALUE, and a string as KEY:\"'text'\"$"),
        (
            "late.zip",
            ["--env-kwargs", "gravity:1"],
            r"--env Pendulum-v1 cannot be made with these --env-kwargs: .*argument 'gravity'",
        ),
        ("late.zip", ["--normalize", "none.pkl"], r"there is no file none\.pkl$"),
        ("late.zip", ["--earlier", "none.zip"], r"there is no file none\.zip$"),
        ("late.zip", ["--earlier", "wide.zip"], r"an earlier policy has other networks than this one$"),
    ],
)
def test_one_sentence_each(agents, monkeypatch, agent, options, message):
    monkeypatch.chdir(agents)
    with pytest.raises(SystemExit, match=message) as caught:
        main([agent, "--env", "Pendulum-v1", "--episodes", "1", "--horizon", "2", *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["episodes", "horizon"])
def test_options_out_of_range(name, capsys):
    with pytest.raises(SystemExit):
        main(["x.zip", "--env", "x", f"--{name}", "0"])
    assert f"--{name} must be at least 1" in capsys.readouterr().err


def test_an_agent_that_has_fitted_nothing(tmp_path):
    with pytest.raises(ValueError, match="dynamics has had no good fit yet: there is nothing to report"):
        write_report(MBPO("MlpPolicy", "Pendulum-v1", **FAST), tmp_path / "page.html")
