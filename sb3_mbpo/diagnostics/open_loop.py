"""New episodes of an agent, and open-loop predictions of its dynamics for the same actions. The agent is not changed."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, is_vecenv_wrapped

from sb3_mbpo.codec import Observation
from sb3_mbpo.dynamics.base import DynamicsModel


class Episode(NamedTuple):
    """A real episode, raw and flat."""

    #: ``(T + 1, obs_dim)``, including the last one
    obs: np.ndarray
    #: ``(T, action_dim)``, in [-1, 1]
    actions: np.ndarray
    #: ``(T,)``
    rewards: np.ndarray
    #: Whether it ended by a termination, not by a limit.
    terminated: bool


class Segments(NamedTuple):
    """Pieces of real episodes, for open-loop predictions."""

    #: ``(N, obs_dim)``
    starts: np.ndarray
    #: ``(N, horizon, action_dim)``, in [-1, 1]; zero beyond the episode's end
    actions: np.ndarray
    #: Reward and next observation after each action, ``(N, horizon, 1 + obs_dim)``; NaN beyond the episode's end
    outcomes: np.ndarray


@contextmanager
def untouched(agent: Any) -> Iterator[None]:
    """
    Restore all random states after this context: the global generators of PyTorch, NumPy and Python, the generators of the
    agent's dynamics, learned reward and termination, and the noise of gSDE.
    """
    python, numpy = random.getstate(), np.random.get_state()
    parts = [part for name in ("dynamics", "learned_reward", "learned_termination") for part in getattr(agent, name).modules()]
    generators = [value for part in parts for value in vars(part).values() if isinstance(value, th.Generator)]
    states = [generator.get_state() for generator in generators]
    action_dist = getattr(agent.policy.actor, "action_dist", None)
    noise = dict(vars(action_dist)) if action_dist is not None else {}
    try:
        with th.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if action_dist is not None:
            vars(action_dist).clear()
            vars(action_dist).update(noise)


def own_env(agent: Any, env: Any = None) -> VecEnv:
    """
    :param agent: a ModelBased algorithm
    :param env: an id, a function that makes an env, an env, or a VecEnv with one env; ``None``: a new env like the agent's
        first one
    :return: a VecEnv with one env, for diagnoses
    :raises ValueError: the agent's env cannot be made again; or ``env`` is the agent's own, has other spaces, has several
        envs, or uses VecNormalize
    """
    if env is None:
        try:
            env = another(None if agent.env is None else agent.env.get_attr("spec")[0])
        except ValueError as error:
            raise ValueError(
                f"env=None: the agent's env cannot be made again ({error}). Pass a function that makes one as env"
            ) from error
    if isinstance(env, str):
        env = gym.make(env)
    elif callable(env) and not isinstance(env, gym.Env):
        env = env()
    if not isinstance(env, VecEnv):
        made = env
        env = DummyVecEnv([lambda: made])
    if env.num_envs != 1 or is_vecenv_wrapped(env, VecNormalize):
        raise ValueError(
            f"env must be one env without VecNormalize (the agent's own statistics are used), not {env.num_envs} in a "
            f"{type(env).__name__}. Pass an id, a function that makes one, or a DummyVecEnv of one"
        )
    # The envs of a SubprocVecEnv are in other processes.
    mine, theirs = ([one.unwrapped for one in getattr(of, "envs", [])] for of in (env, agent.env))
    if any(one is other for one in mine for other in theirs):
        raise ValueError("env is a training env of the agent: its episodes would be interrupted. Pass a new env")
    try:
        check_for_correct_spaces(env, agent.observation_space, agent.action_space)
    except ValueError as error:
        raise ValueError(f"env does not match the agent: {error}. Pass one with the wrappers of the agent's env") from error
    return env


def another(spec: Any, **kwargs: Any) -> gym.Env:
    """
    :param spec: spec of an env, or ``None``
    :param kwargs: additional arguments of ``gymnasium.make``
    :return: a new env like that of the spec
    :raises ValueError: there is no spec, or Gymnasium cannot make a wrapper again
    """
    if spec is None:
        raise ValueError("it has no spec of Gymnasium's")
    # The arguments of Monitor are not recorded, and it is not needed.
    wrappers = tuple(one for one in spec.additional_wrappers if not one.entry_point.endswith("monitor:Monitor"))
    lost = [one.name for one in wrappers if one.kwargs is None]
    if lost:
        raise ValueError(f"the arguments of {', '.join(lost)} are not recorded")
    return gym.make(replace(spec, additional_wrappers=wrappers), **kwargs)


@th.no_grad()
def on_policy_episodes(agent: Any, env: Any, n_episodes: int, max_steps: int, deterministic: bool = False) -> list[Episode]:
    """
    Play episodes with the agent's current policy.

    :param agent: a ModelBased algorithm; the statistics of its VecNormalize are used, but not updated
    :param env: see :func:`own_env`
    :param n_episodes: number of episodes
    :param max_steps: maximum length of an episode
    :param deterministic: whether actions are those of ``predict(deterministic=True)``, as in an evaluation; otherwise they are
        sampled, as in training and in model rollouts
    :return: the episodes
    """
    episodes = []
    statistics = agent._vec_normalize_env
    with agent.imagining() as policy:

        def act(obs: Observation) -> tuple[np.ndarray, np.ndarray]:
            """:return: the action in [-1, 1] ``(action_dim,)``, and in the env's units for ``step``"""
            if deterministic:
                raw, _ = agent.predict(obs if statistics is None else statistics.normalize_obs(obs), deterministic=True)
                return agent.codec.encode_actions(raw).ravel(), raw
            rows = th.as_tensor(agent.codec.flatten(obs), dtype=th.float32, device=agent.device)
            action = policy(rows).cpu().numpy()
            return action[0], agent.codec.decode_actions(action)

        now = env.reset()
        for _ in range(n_episodes):
            obs, terminated, done = [agent.codec.flatten(now)[0].astype(float)], False, [False]
            actions: list[np.ndarray] = []
            rewards: list[float] = []
            while len(rewards) < max_steps and not done[0]:
                action, raw = act(now)
                now, reward, done, infos = env.step(raw)
                # After the end of an episode, a VecEnv returns the first observation of the next one.
                last = agent.codec.flatten(infos[0]["terminal_observation"] if done[0] else now)
                obs.append(last.reshape(-1).astype(float))
                actions.append(action)
                rewards.append(float(reward[0]))
                terminated = bool(done[0]) and not infos[0].get("TimeLimit.truncated", False)
            now = now if done[0] else env.reset()
            episodes.append(Episode(np.array(obs), np.array(actions, dtype=float), np.array(rewards), terminated))
    return episodes


def segments(episodes: Sequence[Episode], horizon: int, most: int | None = None) -> Segments:
    """
    Cut episodes into overlapping segments.

    :param episodes: episodes with at least one step
    :param horizon: number of steps of a segment; segments that are cut by the end of an episode are filled with NaN
    :param most: maximum number of segments, evenly spaced over all steps; ``None``: one segment per step
    :return: the segments
    """
    places = [(episode, t) for episode in episodes for t in range(len(episode.rewards))]
    if most is not None and len(places) > most:
        places = [places[i * len(places) // most] for i in range(most)]
    first = episodes[0]
    obs_dim, action_dim = first.obs.shape[1], first.actions.shape[1]
    starts = np.array([episode.obs[t] for episode, t in places])
    actions, outcomes = np.zeros((len(places), horizon, action_dim)), np.full((len(places), horizon, 1 + obs_dim), np.nan)
    for i, (episode, t) in enumerate(places):
        n = min(horizon, len(episode.rewards) - t)
        actions[i, :n] = episode.actions[t : t + n]
        outcomes[i, :n, 0], outcomes[i, :n, 1:] = episode.rewards[t : t + n], episode.obs[t + 1 : t + n + 1]
    return Segments(starts, actions, outcomes)


@th.no_grad()
def open_loop(dynamics: DynamicsModel, of: Segments, n_samples: int) -> np.ndarray:
    """
    Predict segments, from the same start states and with the same actions. Each step starts from the previous prediction.

    :param dynamics: the dynamics, whose ``sample`` is called as in branched rollouts
    :param of: the segments
    :param n_samples: number of independent predictions
    :return: rewards and next observations ``(n_samples, N, horizon, 1 + obs_dim)``, like ``of.outcomes``
    """
    device = dynamics.generator.device
    starts, actions = (th.as_tensor(part, dtype=th.float32, device=device) for part in (of.starts, of.actions))
    samples = np.empty((n_samples, *of.outcomes.shape))
    for sample in samples:
        obs = starts
        for h in range(actions.shape[1]):
            obs, rewards = dynamics.sample(obs, actions[:, h])
            sample[:, h] = th.cat([rewards.unsqueeze(1), obs], dim=1).cpu().numpy()
    return samples


@th.no_grad()
def imagined_returns(agent: Any, starts: np.ndarray, n_samples: int, max_steps: int) -> np.ndarray:
    """
    Play imagined episodes with the current policy.

    :param agent: a ModelBased algorithm
    :param starts: first states ``(B, obs_dim)``
    :param n_samples: number of episodes per first state
    :param max_steps: maximum length of an episode
    :return: undiscounted returns ``(n_samples, B)``; NaN if a prediction was not finite
    """
    dynamics = agent.imagined_dynamics
    obs = th.as_tensor(starts, dtype=th.float32, device=agent.device).repeat(n_samples, 1)
    returns, alive = obs.new_zeros(len(obs), dtype=th.float64), th.arange(len(obs), device=obs.device)
    with agent.imagining() as policy:
        for _ in range(max_steps):
            actions = policy(obs)
            next_obs, rewards = dynamics.sample(obs, actions)
            returns[alive] += rewards.double()
            finite = next_obs.isfinite().all(dim=1) & rewards.isfinite()
            returns[alive[~finite]] = th.nan
            ended = agent.terminates(obs, actions, next_obs) | ~finite
            obs, alive = next_obs[~ended], alive[~ended]
            if len(alive) == 0:
                break
    return returns.reshape(n_samples, -1).cpu().numpy()


@th.no_grad()
def member_disagreement(dynamics: DynamicsModel, obs: np.ndarray, actions: np.ndarray) -> np.ndarray | None:
    """
    :param dynamics: the agent's dynamics
    :param obs: ``(B, obs_dim)``
    :param actions: ``(B, action_dim)``, in [-1, 1]
    :return: standard deviation of the mean next observations of all members ``(B, obs_dim)``; ``None`` without ``predict``
    """
    if not dynamics.offers_predict:
        return None
    device = dynamics.generator.device
    parts = (th.as_tensor(part, dtype=th.float32, device=device) for part in (obs, actions))
    mean, _ = dynamics.predict(*parts)
    return mean[..., 1:].double().std(dim=0, correction=0).cpu().numpy()
