"""Files that a policy is exported to: their actions are those of predict, and they run without this package."""

import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from stable_baselines3.sac.policies import Actor, SACPolicy
from tiny import FAST, equal_agents

import sb3_mbpo
from sb3_mbpo import DHMBPO, MBPO, MBTD3
from sb3_mbpo.saving import export as exporting

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "deploy.md"
ALGORITHMS = ["MBPO", "DHMBPO", "MBTD3"] + ["MBTQC", "MBCrossQ"] * (find_spec("sb3_contrib") is not None)
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
ONNX = pytest.mark.skipif(any(find_spec(name) is None for name in ("onnxruntime", "onnxscript")), reason="needs onnxruntime")
SUFFIXES = [".pt", pytest.param(".onnx", marks=ONNX)]


class Plant(gym.Env):
    """Observations of two kinds of sensors, of which some are far from 0; actions of several units, float64."""

    observation_space = spaces.Box(-np.inf, np.inf, (2, 3))
    action_space = spaces.Box(np.array([[-0.1, 0.0], [20.0, -3.0]]), np.array([[0.3, 1e-3], [400.0, -1.0]]), dtype=np.float64)
    metadata: dict = {}  # noqa: RUF012

    def _observe(self):
        noise = self.np_random.normal(size=(2, 3))
        return (noise * [[1, 10, 0.1], [1e-3, 1e3, 1]] + [[0, 300, 1013], [0, -2e4, 5]]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), float(np.sum(action)) / 100, False, self.steps == 20, {}


def make_agent(name="MBPO", env=Plant, normalized=False, steps=25, **settings):
    venv = make_vec_env(env)
    venv = VecNormalize(venv) if normalized else venv
    # What these few steps teach is not used.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(sb3_mbpo, name)("MlpPolicy", venv, **{**FAST, "termination_fn": "never", **settings}).learn(steps)


def observe(agent, n=50):
    """Of the env, not those that export tries."""
    env = agent.env.unwrapped.envs[0].unwrapped
    env.reset(seed=7)
    return np.stack([env._observe() for _ in range(n)])


def run(path, observations):
    """The actions of a file, from the runtime that it is for."""
    if path.suffix == ".pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return th.jit.load(path)(th.as_tensor(observations)).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert [port.name for port in (*session.get_inputs(), *session.get_outputs())] == ["observations", "actions"]
    return session.run(None, {"observations": observations})[0]


def predict(agent, observations, statistics=None):
    seen = observations if statistics is None else statistics.normalize_obs(observations)
    return agent.predict(seen, deterministic=True)[0]


def assert_alike(actions, expected, space):
    """To 1e-5 of an action's half range."""
    assert actions.dtype == np.float32 and actions.shape == expected.shape
    assert np.max(np.abs(actions - expected) / (space.high - space.low) * 2) < 1e-5


# ONNX takes seconds: what differs by the algorithm is tried with statistics alone.
CASES = [
    *((name, normalized, ".pt") for name in ALGORITHMS for normalized in (False, True)),
    *(pytest.param(name, True, ".onnx", marks=ONNX) for name in ALGORITHMS),
    pytest.param("MBPO", False, ".onnx", marks=ONNX),
]


@pytest.mark.parametrize(("name", "normalized", "suffix"), CASES)
def test_a_file_acts_as_predict_does(tmp_path, name, normalized, suffix):
    agent = make_agent(name, normalized=normalized)
    path = tmp_path / f"policy{suffix}"
    agent.export(path)
    observations = observe(agent)
    expected = predict(agent, observations, agent.env if normalized else None)
    actions = run(path, observations)
    # Raw sensors far from 0 saturate a small network; normalized ones do not.
    assert not normalized or np.ptp(actions, axis=0).min() > 0
    assert_alike(actions, expected, agent.action_space)
    # Any number of rows.
    assert np.allclose(run(path, observations[:1]), actions[:1], rtol=1e-5)
    # As the env compares them, with float64.
    assert np.all((actions >= agent.action_space.low) & (actions <= agent.action_space.high))


class Halves(BaseFeaturesExtractor):
    """An extractor of a user's, with statistics of its own."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 6)
        self.norm = th.nn.BatchNorm1d(6)

    def forward(self, observations):
        return self.norm(observations.view(observations.shape[0], -1) / 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_sde": True},
        {"policy_kwargs": {"net_arch": [8], "features_extractor_class": Halves}},
        {"policy_kwargs": {"net_arch": []}},
    ],
    ids=["gSDE", "extractor", "linear"],
)
def test_policies_of_other_shapes(tmp_path, settings, suffix):
    agent = make_agent(normalized=True, **settings)
    path = tmp_path / f"policy{suffix}"
    agent.export(path)
    observations = observe(agent)
    assert_alike(run(path, observations), predict(agent, observations, agent.env), agent.action_space)


def test_frames_are_stacked_outside(tmp_path):
    venv = VecNormalize(VecFrameStack(DummyVecEnv([Plant]), 2, "first"))
    agent = MBPO("MlpPolicy", venv, **FAST, termination_fn="never").learn(3)
    agent.export(tmp_path / "policy.pt")
    observations = np.random.default_rng(0).normal(size=(4, *agent.observation_space.shape)).astype(np.float32)
    assert_alike(run(tmp_path / "policy.pt", observations), predict(agent, observations, venv), agent.action_space)


def test_learning_goes_on_as_if_nothing_was_exported(tmp_path):
    agents = []
    for path in (None, tmp_path / "policy.pt"):
        agents.append(make_agent(normalized=True, use_sde=True))
        if path is not None:
            agents[-1].export(path)
        agents[-1].learn(10, reset_num_timesteps=False)
    assert equal_agents(*agents)


@pytest.mark.parametrize("safe", [False, True])
def test_a_loaded_agent_needs_its_statistics(tmp_path, safe):
    agent = make_agent(normalized=True)
    agent.save(tmp_path / "agent")
    agent.env.save(tmp_path / "vecnormalize.pkl")
    loaded = MBPO.load(tmp_path / "agent", safe=safe)
    with pytest.raises(ValueError, match=r"the statistics are missing\. Pass vec_normalize=VecNormalize\.load\(path, env\)"):
        loaded.export(tmp_path / "policy.pt")
    assert not (tmp_path / "policy.pt").exists()
    statistics = VecNormalize.load(tmp_path / "vecnormalize.pkl", DummyVecEnv([Plant]))
    loaded.export(tmp_path / "policy.pt", vec_normalize=statistics)
    observations = observe(agent)
    assert_alike(run(tmp_path / "policy.pt", observations), predict(agent, observations, agent.env), agent.action_space)


@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: VecNormalize(env, norm_obs=False)], ids=["raw", "rewards only"])
def test_a_loaded_agent_of_raw_observations_needs_nothing(tmp_path, wrap):
    MBPO("MlpPolicy", wrap(DummyVecEnv([Plant])), **FAST, termination_fn="never").learn(3).save(tmp_path / "agent")
    agent = MBPO.load(tmp_path / "agent")
    agent.export(str(tmp_path / "new folder" / "policy.pt"))
    observations = np.zeros((1, 2, 3), np.float32)
    assert_alike(run(tmp_path / "new folder" / "policy.pt", observations), predict(agent, observations), agent.action_space)


def test_refused(tmp_path, monkeypatch):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    for name in ("policy", "policy.zip", "policy.ONNX"):
        with pytest.raises(ValueError, match=rf"path='.*{name}' must end in \.onnx, or in \.pt for TorchScript"):
            agent.export(tmp_path / name)
    with pytest.raises(ValueError, match="vec_normalize='statistics' must be a VecNormalize"):
        agent.export(tmp_path / "policy.pt", vec_normalize="statistics")
    with pytest.raises(ValueError, match=r"of shape \(2, 3\), observations of \(3,\); pass the VecNormalize that"):
        agent.export(tmp_path / "policy.pt", vec_normalize=VecNormalize(DummyVecEnv([Plant])))
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs onnx and onnxscript: .*pip install "\.\[export\]"\. One that ends in \.pt'):
        agent.export(tmp_path / "policy.onnx")
    agent.policy.actor.mu.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="Learning has diverged"):
        agent.export(tmp_path / "policy.pt")
    agent.observation_space = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    with pytest.raises(ValueError, match="images are not supported"):
        agent.export(tmp_path / "policy.pt")
    assert list(tmp_path.iterdir()) == []


class BoldActor(Actor):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic).sign()


class OwnPolicy(SACPolicy):
    def make_actor(self, features_extractor=None):
        return BoldActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)


def test_a_policy_that_computes_something_else_is_refused(tmp_path):
    agent = MBPO(OwnPolicy, "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match=r"would differ from those of predict by .* OwnPolicy computes them in another way"):
        agent.export(tmp_path / "policy.pt")
    del agent.policy.actor.mu
    with pytest.raises(ValueError, match="the actor BoldActor has no features_extractor and mu"):
        agent.export(tmp_path / "policy.pt")


def test_all_algorithms_have_it():
    assert all(issubclass(kind, exporting.Exporting) for kind in (MBPO, DHMBPO, MBTD3))


@ONNX
def test_the_guides_code_runs_without_this_package(tmp_path):
    export, with_onnx, with_torch, _ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(export.replace("2_000", "2"), names)
    env = gym.make("Pendulum-v1")
    (observation, _), done, total = env.reset(seed=0), False, 0.0
    while not done:
        observation, reward, terminated, truncated, _ = env.step(names["agent"].predict(observation, deterministic=True)[0])
        done, total = terminated or truncated, total + float(reward)
    blocked = "import sys; sys.modules['sb3_mbpo'] = sys.modules['stable_baselines3'] = None\n"
    for code in (with_onnx, with_torch):
        assert len(code.strip().splitlines()) <= 12
        result = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) == pytest.approx(total, abs=0.1)
