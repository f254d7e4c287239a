import subprocess
import sys

import pytest
import torch as th
from stable_baselines3 import TD3

import sb3_mbpo

KWARGS = {"batch_size": 16, "learning_starts": 20, "seed": 0}
OURS = {
    "min_explained_variance": None,
    "rollout_batch_size": 50,
    "model_train_freq": 5,
    "dynamics_kwargs": {"net_arch": [8], "max_updates": 3},
}


@pytest.mark.parametrize("name", ["MBTD3", "MBTQC", "MBCrossQ"])
def test_learns_saves_and_loads(name, tmp_path):
    cls = getattr(sb3_mbpo, name)
    model = cls("MlpPolicy", "Pendulum-v1", gradient_steps=2, policy_kwargs={"net_arch": [8]}, **OURS, **KWARGS).learn(30)
    # After steps 21, 25 and 30.
    assert len(model.replay_buffer.model_buffer) == 150 and model._n_updates == 20
    assert (model.replay_buffer.sample(16).observations.shape) == (16, 3)
    model.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent")
    assert th.equal(loaded.dynamics.holdout_errors, model.dynamics.holdout_errors)
    obs = model.observation_space.sample()
    assert (loaded.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]).all()


@pytest.mark.parametrize("name", ["MBTD3", "MBTQC", "MBCrossQ"])
def test_model_off_is_the_algorithm_itself(name):
    cls = getattr(sb3_mbpo, name)
    plain = next(base for base in cls.__mro__ if not base.__module__.startswith("sb3_mbpo"))
    agents = [
        make("MlpPolicy", "Pendulum-v1", gradient_steps=2, **KWARGS, **ours).learn(60)
        for make, ours in ((cls, {"real_ratio": 1}), (plain, {}))
    ]
    first, second = (list(agent.policy.state_dict().values()) for agent in agents)
    assert all(th.equal(a, b) for a, b in zip(first, second, strict=True))


def test_imagined_actions_of_td3_are_noisy():
    model = sb3_mbpo.MBTD3("MlpPolicy", "Pendulum-v1", **KWARGS)
    obs = th.zeros(5000, 3)
    with model.imagining() as policy, th.no_grad():
        noise = policy(obs) - model.actor(obs)
    assert noise.abs().max() <= model.target_noise_clip + 1e-6
    assert noise.std().item() == pytest.approx(model.target_policy_noise, rel=0.05)
    assert isinstance(model, TD3)


def test_without_sb3_contrib():
    """MBTD3 works, the others say what to install."""
    code = """
import sys
sys.modules["sb3_contrib"] = None
import sb3_mbpo
sb3_mbpo.MBTD3
for name in ("MBTQC", "MBCrossQ"):
    try:
        getattr(sb3_mbpo, name)
    except ImportError as error:
        assert 'pip install ".[contrib]"' in str(error) and name in str(error)
    else:
        raise SystemExit(f"no error for {name}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
