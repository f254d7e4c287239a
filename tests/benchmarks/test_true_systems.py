"""benchmarks/true_systems.py against the environments themselves."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from true_systems import TRUE_SYSTEMS

# Steps from starts of episodes, and of what random actions lead to; a push to the right to get to the flag.
POLICIES: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {
    "random": lambda space, obs: space.sample(),
    "with the velocity": lambda space, obs: np.sign(obs[1:2]).astype(np.float32),
}


def transitions(name: str, policy: str, n: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]]:
    """Of the env: observation, action in [-1, 1], next observation, reward, whether it ends."""
    env = gym.make(name)
    env.action_space.seed(0)
    assert isinstance(env.action_space, gym.spaces.Box)
    obs, _ = env.reset(seed=0)
    rows = []
    for _ in range(n):
        action = POLICIES[policy](env.action_space, obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs.copy(), action / env.action_space.high, next_obs.copy(), float(reward), terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return rows


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["Pendulum-v1", "MountainCarContinuous-v0"])
def test_next_observation_reward_and_end_are_those_of_the_env(name: str, policy: str) -> None:
    rows = transitions(name, policy, 1200)
    obs, actions, next_obs, rewards, ended = (th.as_tensor(np.array(part)) for part in zip(*rows, strict=True))
    system, termination = TRUE_SYSTEMS[name]
    predicted, predicted_rewards = system(obs.shape[1], 1, seed=0).sample(obs.float(), actions.float())
    assert th.allclose(predicted, next_obs.float(), atol=2e-5)
    assert th.allclose(predicted_rewards, rewards.float(), atol=2e-4)
    if callable(termination):
        assert th.equal(termination(obs, actions, predicted), ended)
        # The car with the velocity gets to the flag, and both reach the wall.
        assert ended.any() == (policy == "with the velocity") and (next_obs[:, 0] <= -1.199).any() == ended.any()
    else:
        assert termination == "never" and not ended.any()


def test_no_past() -> None:
    """The reward is the env's; the next observation is a draw that covers the box, and owes nothing to the last one."""
    rows = transitions("NoPast-v0", "random", 200)
    obs, actions, _, rewards, _ = (th.as_tensor(np.array(part)).float() for part in zip(*rows, strict=True))
    dynamics = TRUE_SYSTEMS["NoPast-v0"][0](3, 2, seed=0)
    drawn, predicted_rewards = dynamics.sample(obs, actions)
    assert th.allclose(predicted_rewards, rewards, atol=1e-5)
    drawn = th.cat([drawn, *(dynamics.sample(obs, actions)[0] for _ in range(20))])
    assert drawn.abs().max() <= 1 and th.allclose(drawn.mean(dim=0), th.zeros(3), atol=0.05)
    assert th.allclose(drawn.std(dim=0), th.full((3,), 3**-0.5), atol=0.02)


@pytest.mark.parametrize("name", ["Reacher-v5", "InvertedDoublePendulum-v5", "Hopper-v5"])
def test_simulated_transitions_are_those_of_the_env(name: str) -> None:
    rows = transitions(name, "random", 300)
    obs, actions, next_obs, rewards, _ = (th.as_tensor(np.array(part)).float() for part in zip(*rows, strict=True))
    predicted, predicted_rewards = TRUE_SYSTEMS[name][0](obs.shape[1], actions.shape[1], seed=0).sample(obs, actions)
    # What is not in the observation: how the solver starts, speeds beyond 10, float64.
    inside = (obs.abs() != 10).all(dim=1)
    assert inside.float().mean() > 0.9
    errors = (predicted[inside] - next_obs[inside]).abs()
    assert errors.max() < 2e-2 and errors.median() < 1e-5
    assert th.allclose(predicted_rewards[inside], rewards[inside], atol=1e-2)
