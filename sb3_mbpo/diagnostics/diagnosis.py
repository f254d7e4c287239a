"""Compares an agent's dynamics with real episodes, and computes metrics of its accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.diagnostics import metrics
from sb3_mbpo.diagnostics.metrics import N_SAMPLES, distance, scale_of
from sb3_mbpo.diagnostics.observation_names import observation_names
from sb3_mbpo.diagnostics.open_loop import Episode, Segments, member_disagreement, on_policy_episodes, open_loop, segments

# Maximum number of start states of predictions over several steps.
MOST_SEGMENTS = 200
NOMINAL = (0.5, 0.9)


@dataclass(frozen=True)
class Diagnosis:
    """
    Real episodes with sampled actions, and the predictions of the dynamics. Columns are the reward, then the dimensions of the
    next observation. ``horizon`` is a number of steps after which predictions are compared with the real outcome.

    A prediction is the mean of 19 samples of ``DynamicsModel.sample``. Each sample is a trajectory of its own. Predictions are
    not clipped (``prediction_clip_margin``). A prediction with a non-finite sample is left out, and counted in ``dropped``.
    """

    episodes: list[Episode]
    #: One step from each state, ``(T, 1, ...)``, and samples ``(19, T, 1, 1 + obs_dim)``.
    steps: Segments
    step_samples: np.ndarray
    #: ``horizon`` steps from some states, ``(N, horizon, ...)``, and samples ``(19, N, horizon, 1 + obs_dim)``.
    further: Segments
    further_samples: np.ndarray
    #: Whether each one-step sample is terminal according to the agent's termination rule, bool ``(19, T)``.
    ends: np.ndarray
    #: Standard deviation of the members' means ``(T, obs_dim)``; ``None`` if the dynamics has no members.
    disagreement: np.ndarray | None
    #: Names of the columns: ``"reward"``, then see :func:`.observation_names.observation_names`.
    names: Sequence[str]

    @cached_property
    def spread(self) -> np.ndarray:
        """Standard deviation of each column over the real episodes, ``(1 + obs_dim,)``; NaN if it is constant."""
        return scale_of(metrics.deviations(self.steps.outcomes[:, 0]))

    @cached_property
    def change(self) -> np.ndarray:
        """Root mean square change per step of each column, or standard deviation for the reward; shape as ``spread``."""
        apart = self.steps.outcomes[:, 0, 1:] - self.steps.starts
        return np.concatenate([self.spread[:1], np.where(np.isnan(self.spread[1:]), np.nan, scale_of(apart))])

    def _at(self, horizon: int) -> tuple[Segments, np.ndarray, int]:
        if horizon == 1:
            return self.steps, self.step_samples[:, :, 0], 0
        return self.further, self.further_samples[:, :, horizon - 1], horizon - 1

    def known(self, horizon: int) -> np.ndarray:
        """:return: rows that can be evaluated, bool ``(rows,)``: the episode did not end before, and all samples are finite"""
        of, samples, h = self._at(horizon)
        return np.isfinite(of.outcomes[:, h]).all(axis=1) & np.isfinite(samples).all(axis=(0, 2))

    def errors(self, horizon: int) -> np.ndarray:
        """:return: predicted minus real values, ``(rows, 1 + obs_dim)``; NaN for rows that cannot be evaluated"""
        of, samples, h = self._at(horizon)
        return np.where(self.known(horizon)[:, None], samples.mean(axis=0) - of.outcomes[:, h], np.nan)

    def r_squared(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """
        :return: R^2 of each column compared with the mean over the real episodes, ``(1 + obs_dim,)``, and of each dimension of
            the observation compared with no change, ``(obs_dim,)``
        """
        of, _, h = self._at(horizon)
        errors, mean = self.errors(horizon), self.steps.outcomes[:, 0].mean(axis=0)
        from_mean = np.where(np.isnan(self.spread), 0.0, of.outcomes[:, h] - mean)
        return metrics.r_squared(errors, from_mean), metrics.r_squared(errors[:, 1:], of.outcomes[:, h, 1:] - of.starts)

    def overall_r_squared(self, horizon: int) -> tuple[float, float]:
        """:return: both R^2 of the whole observation, with each dimension in units of its standard deviation"""
        of, _, h = self._at(horizon)
        moves = ~np.isnan(self.spread[1:])
        scale, mean = self.spread[1:][moves], self.steps.outcomes[:, 0, 1:].mean(axis=0)
        columns = (self.errors(horizon)[:, 1:], of.outcomes[:, h, 1:] - mean, of.outcomes[:, h, 1:] - of.starts)
        errors, from_mean, from_start = ((column[:, moves] / scale).reshape(-1, 1) for column in columns)
        return float(metrics.r_squared(errors, from_mean)[0]), float(metrics.r_squared(errors, from_start)[0])

    def coverage(self, horizon: int, nominal: float) -> np.ndarray:
        """:return: fraction of rows inside the central interval of this probability, for each column, ``(1 + obs_dim,)``"""
        of, samples, h = self._at(horizon)
        rows = self.known(horizon)
        # Constant columns are not evaluated: their intervals have no width, apart from rounding.
        if not rows.any():
            return np.full(len(self.spread), np.nan)
        return np.where(np.isnan(self.spread), np.nan, metrics.coverage(samples[:, rows], of.outcomes[rows, h], nominal))

    @cached_property
    def one_step_distance(self) -> np.ndarray:
        """Error of each one-step prediction of the observation, in standard deviations, ``(T,)``; NaN if it was dropped."""
        return distance(self.errors(1)[:, 1:], self.spread[1:])

    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Errors of the longer predictions of the observation and of predicting no change, in standard deviations.

        :return: each ``(horizon, N)``; NaN for predictions that cannot be evaluated
        """
        predicted = distance((self.further_samples.mean(axis=0) - self.further.outcomes)[..., 1:], self.spread[1:])
        still = distance(self.further.starts[:, None] - self.further.outcomes[..., 1:], self.spread[1:])
        return np.where(np.isfinite(predicted), predicted, np.nan).T, still.T

    @property
    def dropped(self) -> float:
        """Fraction of the one-step predictions with a non-finite sample."""
        return 1 - float(self.known(1).mean())

    def model_error(self) -> float:
        """
        A proxy of eps_m', the total variation between the real and the predicted (reward, next observation), as a mean over
        the episodes (the theorems take the maximum over time).

        The total variation between a deterministic simulator and any continuous model is 1. So Gaussian noise as large as
        ``change`` is added to both; constant columns are ignored. This unit is a convention, and k* inherits it. The result is
        E over samples x of D_TV( N(x, S), N(y, S) ), which is at least the blurred distributions' own, and 0 for a perfect
        model of a deterministic env.
        """
        rows = self.known(1)
        if not rows.any():
            return 1.0
        return float(
            metrics.blurred_total_variation((self.step_samples - self.steps.outcomes)[:, rows, 0], self.change).mean()
        )

    def termination(self) -> tuple[float, float]:
        """:return: precision and recall of the terminations in one-step predictions; NaN if there are none"""
        lengths = [len(episode.rewards) for episode in self.episodes]
        actual = np.zeros(sum(lengths), dtype=bool)
        actual[np.cumsum(lengths) - 1] = [episode.terminated for episode in self.episodes]
        return metrics.precision_and_recall(
            self.ends[:, self.known(1)].ravel(), np.tile(actual[self.known(1)], len(self.ends))
        )

    def disagreement_rank(self) -> float:
        """:return: rank correlation of the members' disagreement with the one-step error; NaN without members"""
        rows = self.known(1)
        if self.disagreement is None or not rows.any():
            return float("nan")
        return metrics.rank_correlation(distance(self.disagreement[rows], self.spread[1:]), self.one_step_distance[rows])

    def numbers(self, horizon: int) -> dict[str, float]:
        """:return: metrics of the whole observation and of the reward after ``horizon`` steps; NaN if a metric is undefined"""
        errors = self.errors(horizon)
        against_mean, against_no_change = self.overall_r_squared(horizon)
        found = {
            "error": float(metrics.root_mean_square(distance(errors[:, 1:], self.spread[1:])[:, None])[0]),
            "r2_mean": against_mean,
            "r2_no_change": against_no_change,
            "reward_error": float(metrics.root_mean_square(errors[:, :1])[0]),
            "reward_r2_mean": float(self.r_squared(horizon)[0][0]),
        }
        for nominal in NOMINAL:
            inside = self.coverage(horizon, nominal)[1:]
            known = inside[~np.isnan(inside)]
            found[f"coverage_{100 * nominal:.0f}"] = float(known.mean()) if len(known) else float("nan")
        return found


def diagnose(agent: Any, env: VecEnv, n_episodes: int, horizon: int, max_steps: int) -> Diagnosis:
    """
    Play new episodes and predict them with the dynamics.

    :param agent: a ModelBased algorithm with a fitted dynamics; see :func:`.open_loop.untouched`
    :param env: see :func:`.open_loop.own_env`
    :param n_episodes: number of real episodes
    :param horizon: number of steps of the longer predictions
    :param max_steps: maximum length of an episode
    :return: episodes and predictions
    """
    dynamics = agent.imagined_dynamics
    episodes = on_policy_episodes(agent, env, n_episodes, max_steps)
    steps, further = segments(episodes, 1), segments(episodes, horizon, MOST_SEGMENTS)
    step_samples = open_loop(dynamics, steps, N_SAMPLES)
    obs, actions = (th.as_tensor(part, dtype=th.float32, device=agent.device) for part in (steps.starts, steps.actions[:, 0]))
    next_obs = th.as_tensor(step_samples[:, :, 0, 1:], dtype=th.float32, device=agent.device)
    with th.no_grad():
        ends = np.stack([agent.terminates(obs, actions, one).cpu().numpy() for one in next_obs])
    return Diagnosis(
        episodes,
        steps,
        step_samples,
        further,
        open_loop(dynamics, further, N_SAMPLES),
        ends,
        member_disagreement(agent.dynamics, steps.starts, steps.actions[:, 0]),
        ["reward", *observation_names(env)],
    )
