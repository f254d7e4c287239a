"""An agent's dynamics held against reality: what is measured, and the numbers it comes to."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.diagnostics.metrics import (
    N_SAMPLES,
    blurred_total_variation,
    coverage,
    deviations,
    distance,
    precision_and_recall,
    r_squared,
    rank_correlation,
    root_mean_square,
    scale_of,
)
from sb3_mbpo.diagnostics.open_loop import Episode, Segments, member_disagreement, on_policy_episodes, open_loop, segments

# Start states of predictions of more than one step.
MOST_SEGMENTS = 200
NOMINAL = (0.5, 0.9)


@dataclass(frozen=True)
class Diagnosis:
    """
    Real episodes and what the dynamics predicts. Columns are the reward, then the dimensions of the next observation.

    A prediction is the mean of 19 samples of ``DynamicsModel.sample``, each step from that sample's own last one. The dynamics
    is asked as it is: ``prediction_clip_margin`` does not hold it. A prediction with a sample that is not finite is left out,
    and counted in ``dropped``.
    """

    episodes: list[Episode]
    #: One step from each state, ``(T, 1, ...)``, and samples ``(19, T, 1, 1 + obs_dim)``.
    steps: Segments
    step_samples: np.ndarray
    #: ``horizon`` steps from some states, ``(N, horizon, ...)``, and samples ``(19, N, horizon, 1 + obs_dim)``.
    further: Segments
    further_samples: np.ndarray
    #: Whether each one-step sample is a terminal transition to the agent, bool ``(19, T)``.
    ends: np.ndarray
    #: Standard deviation of the members' means ``(T, obs_dim)``, if the dynamics has any.
    disagreement: np.ndarray | None

    @cached_property
    def spread(self) -> np.ndarray:
        """Standard deviation of each column over the real episodes, ``(1 + obs_dim,)``; NaN where constant."""
        return scale_of(deviations(self.steps.outcomes[:, 0]))

    @cached_property
    def change(self) -> np.ndarray:
        """Root mean square change of each column from step to step; of the reward, its standard deviation. As ``spread``."""
        apart = self.steps.outcomes[:, 0, 1:] - self.steps.starts
        return np.concatenate([self.spread[:1], np.where(np.isnan(self.spread[1:]), np.nan, scale_of(apart))])

    def _at(self, horizon: int) -> tuple[Segments, np.ndarray, int]:
        if horizon == 1:
            return self.steps, self.step_samples[:, :, 0], 0
        return self.further, self.further_samples[:, :, horizon - 1], horizon - 1

    def known(self, horizon: int) -> np.ndarray:
        """Rows that can be judged after so many steps, bool ``(rows,)``: the episode went on and all samples are finite."""
        of, samples, h = self._at(horizon)
        return np.isfinite(of.outcomes[:, h]).all(axis=1) & np.isfinite(samples).all(axis=(0, 2))

    def errors(self, horizon: int) -> np.ndarray:
        """Predicted less actual after so many steps, ``(rows, 1 + obs_dim)``; NaN where there is nothing to judge."""
        of, samples, h = self._at(horizon)
        return np.where(self.known(horizon)[:, None], samples.mean(axis=0) - of.outcomes[:, h], np.nan)

    def r_squared(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """R^2 of each column against the mean over the real episodes, and of the observation against no change."""
        of, _, h = self._at(horizon)
        errors, mean = self.errors(horizon), self.steps.outcomes[:, 0].mean(axis=0)
        from_mean = np.where(np.isnan(self.spread), 0.0, of.outcomes[:, h] - mean)
        return r_squared(errors, from_mean), r_squared(errors[:, 1:], of.outcomes[:, h, 1:] - of.starts)

    def overall_r_squared(self, horizon: int) -> tuple[float, float]:
        """The same of the whole observation, its columns in units of their spread."""
        of, _, h = self._at(horizon)
        moves = ~np.isnan(self.spread[1:])
        scale, mean = self.spread[1:][moves], self.steps.outcomes[:, 0, 1:].mean(axis=0)
        columns = (self.errors(horizon)[:, 1:], of.outcomes[:, h, 1:] - mean, of.outcomes[:, h, 1:] - of.starts)
        errors, from_mean, from_start = ((column[:, moves] / scale).reshape(-1, 1) for column in columns)
        return float(r_squared(errors, from_mean)[0]), float(r_squared(errors, from_start)[0])

    def coverage(self, horizon: int, nominal: float) -> np.ndarray:
        """Share of the rows that lie within the central interval, of each column, ``(1 + obs_dim,)``."""
        of, samples, h = self._at(horizon)
        rows = self.known(horizon)
        # No interval of width zero, and no rounding, is to be judged where the column is constant.
        inside = coverage(samples[:, rows], of.outcomes[rows, h], nominal) if rows.any() else np.full(len(self.spread), np.nan)
        return np.where(np.isnan(self.spread), np.nan, inside)

    @cached_property
    def one_step_distance(self) -> np.ndarray:
        """How wrong each one-step prediction of the observation is, in units of its spread, ``(T,)``; NaN where dropped."""
        return distance(self.errors(1)[:, 1:], self.spread[1:])

    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """
        How wrong the longer predictions of the observation are, and predicting no change, in units of its spread.

        :return: each ``(horizon, N)``; NaN where there is nothing to judge
        """
        predicted = distance((self.further_samples.mean(axis=0) - self.further.outcomes)[..., 1:], self.spread[1:])
        still = distance(self.further.starts[:, None] - self.further.outcomes[..., 1:], self.spread[1:])
        return np.where(np.isfinite(predicted), predicted, np.nan).T, still.T

    @property
    def dropped(self) -> float:
        """Share of the one-step predictions with a sample that is not finite."""
        return 1 - float(self.known(1).mean())

    def model_error(self) -> float:
        """
        A proxy of eps_m', the total variation between the real and the predicted (reward, next observation).

        Against a deterministic simulator the total variation of any continuous model is 1. So both are blurred by Gaussian
        noise as large as ``change``, the typical change of each column within one step (of the reward, its standard
        deviation), constant ones left out; what is left is estimated from samples: E over x ~ model of
        D_TV( N(x, S), N(y, S) ), which is at least the blurred distributions' own, and 0 for a perfect model of a
        deterministic env. The unit, ``change``, is a convention, and k* inherits it. The theorems take the maximum over time;
        this is the mean over the episodes.
        """
        rows = self.known(1)
        if not rows.any():
            return 1.0
        return float(blurred_total_variation((self.step_samples - self.steps.outcomes)[:, rows, 0], self.change).mean())

    def termination(self) -> tuple[float, float]:
        """
        Precision and recall of the terminations that the agent sees in one-step predictions; NaN where there were none.
        """
        lengths = [len(episode.rewards) for episode in self.episodes]
        actual = np.zeros(sum(lengths), dtype=bool)
        actual[np.cumsum(lengths) - 1] = [episode.terminated for episode in self.episodes]
        return precision_and_recall(self.ends[:, self.known(1)].ravel(), np.tile(actual[self.known(1)], len(self.ends)))

    def disagreement_rank(self) -> float:
        """Rank correlation of the members' disagreement with the error of one step; NaN without members."""
        rows = self.known(1)
        if self.disagreement is None or not rows.any():
            return float("nan")
        return rank_correlation(distance(self.disagreement[rows], self.spread[1:]), self.one_step_distance[rows])

    def numbers(self, horizon: int) -> dict[str, float]:
        """
        What a prediction of so many steps comes to, of the whole observation and of the reward; NaN: cannot be told.
        """
        errors = self.errors(horizon)
        against_mean, against_no_change = self.overall_r_squared(horizon)
        reward_r_squared = self.r_squared(horizon)[0][0]
        whole = {
            "error": float(root_mean_square(distance(errors[:, 1:], self.spread[1:])[:, None])[0]),
            "r2_mean": against_mean,
            "r2_no_change": against_no_change,
            "reward_error": float(root_mean_square(errors[:, :1])[0]),
            "reward_r2_mean": float(reward_r_squared),
        }
        inside = {n: self.coverage(horizon, n)[1:] for n in NOMINAL}
        return whole | {
            f"coverage_{100 * n:.0f}": float(share[~np.isnan(share)].mean()) if not np.isnan(share).all() else float("nan")
            for n, share in inside.items()
        }


def diagnose(agent: Any, env: VecEnv, n_episodes: int, horizon: int, max_steps: int) -> Diagnosis:
    """
    Fresh episodes, and the dynamics on them.

    :param agent: a ModelBased algorithm whose dynamics was fitted; see :func:`.open_loop.untouched`
    :param env: see :func:`.open_loop.own_env`
    :param n_episodes: real episodes
    :param horizon: steps of the longer predictions
    :param max_steps: where an episode is cut that has not ended by then
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
    )
