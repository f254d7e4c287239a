"""A callback that measures the accuracy of the dynamics on new episodes during learning."""

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbpo.diagnostics.diagnosis import Diagnosis, diagnose
from sb3_mbpo.diagnostics.metrics import root_mean_square
from sb3_mbpo.diagnostics.open_loop import own_env, untouched
from sb3_mbpo.diagnostics.policy_shift import policy_shift, snapshot
from sb3_mbpo.rollout_schedule import MOST_STEPS
from sb3_mbpo.theory import optimal_rollout_length
from sb3_mbpo.validation.rules import ArgumentCheck, is_whole, whole

# Maximum number of earlier policies kept for eps_pi.
MOST_SNAPSHOTS = 20
HORIZONS = ArgumentCheck(
    lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(is_whole(k, 1, MOST_STEPS) for k in value),
    "a list of numbers of steps, such as [1, 5, 20]",
)


class ModelErrorCallback(BaseCallback):
    """
    Regularly plays new episodes with the current policy in a separate env, and logs the accuracy of the dynamics on them.

    The agent is not changed: its parameters, counters and random generators are the same as without the callback. A diagnosis
    is made after the first fit, and then every ``every`` env transitions.

    Logged under ``model_error/``: errors, R^2 and coverage of intervals after each number of steps in ``horizons``; precision
    and recall of terminations; the rank correlation of the members' disagreement with the error; eps_m', eps_pi and k* of
    Theorem 4.3. Logged under ``model_error_by_dimension/``: the error of each dimension of the observation, in its own units.
    docs/guide/diagnosis.md explains each key. What is undefined is not logged.

    Use a new callback for each agent, because it stores earlier policies.

    :param env: Env of the episodes: an id, a function that makes an env, an env, or a VecEnv with one env; ``None``: a new env
        like the agent's first one. A ``VecNormalize`` around the agent's envs is used, but not updated
    :param every: Number of the agent's env transitions between two diagnoses
    :param n_episodes: Number of episodes per diagnosis
    :param horizons: Numbers of steps after which predictions are compared with the real outcome; 1 is always included
    :param max_episode_steps: Maximum length of an episode
    :param seed: Seed of the first episode, to which the agent's env transitions are added
    :param verbose: 1: print a line per diagnosis
    :raises ValueError: an argument is out of range, the agent is from another package, or the env does not match the agent
    """

    #: Attributes that a checkpoint does not need.
    not_saved = ("diagnosis",)

    def __init__(
        self,
        env: Any = None,
        *,
        every: int = 5000,
        n_episodes: int = 5,
        horizons: Sequence[int] = (1, 5, 20),
        max_episode_steps: int = 1000,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value in (("every", every), ("n_episodes", n_episodes), ("max_episode_steps", max_episode_steps)):
            whole(1).check(name, value)
        whole(0, 2**31).check("seed", seed)
        HORIZONS.check("horizons", horizons)
        self.env, self.every, self.n_episodes = env, every, n_episodes
        self.horizons, self.max_episode_steps, self.seed = sorted({1, *horizons}), max_episode_steps, seed
        #: The latest diagnosis. A run that is resumed has none until its next one.
        self.diagnosis: Diagnosis | None = None
        #: Number of env steps of all diagnoses. The agent does not count them.
        self.env_steps = 0
        self.diagnosed_at: int | None = None
        self.snapshots: deque[dict[str, Any]] = deque(maxlen=MOST_SNAPSHOTS)
        self.model: Any

    def _init_callback(self) -> None:
        if not hasattr(self.model, "imagined_dynamics"):
            raise ValueError(f"ModelErrorCallback works with agents of sb3_mbpo, not with {type(self.model).__name__}")
        if self.model.real_ratio == 1:
            warnings.warn("ModelErrorCallback has no dynamics to measure, because real_ratio=1", stacklevel=2)
        with untouched(self.model):
            self._own_env = own_env(self.model, self.env)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # This runs after the agent's own callback, and so after its fit.
        agent = self.model
        steps = agent.lifetime_timesteps
        if self.diagnosed_at is not None and steps < self.diagnosed_at:
            # Fewer steps than before, so this is another agent with other policies.
            self.diagnosed_at = None
            self.snapshots.clear()
        if self.diagnosed_at is not None and steps // self.every <= self.diagnosed_at // self.every:
            return
        # The dynamics may be fitted in another process.
        agent.catch_up()
        if agent.dynamics_fitted_at is None or not agent.dynamics.usable:
            return
        self.diagnosed_at = steps
        with untouched(agent):
            self._own_env.seed((self.seed + steps) % 2**31)
            self.diagnosis = diagnose(agent, self._own_env, self.n_episodes, max(self.horizons), self.max_episode_steps)
            self._record(self.diagnosis)
        # Dump as EvalCallback does, so that the values are logged at their own step.
        self.logger.record("time/total_timesteps", agent.num_timesteps, exclude="tensorboard")
        self.logger.dump(agent.num_timesteps)

    def _record(self, diagnosis: Diagnosis) -> None:
        numbers: dict[str, float] = {"dropped": diagnosis.dropped, "disagreement_rank": diagnosis.disagreement_rank()}
        for k in self.horizons:
            numbers |= {f"{name}_{k}": value for name, value in diagnosis.numbers(k).items()}
            for i, error in enumerate(root_mean_square(diagnosis.errors(k)[:, 1:])):
                if math.isfinite(error):
                    # Too many values for a table.
                    self.logger.record(f"model_error_by_dimension/error_{k}_obs_{i:03d}", error, exclude=("stdout", "log"))
        numbers["termination_precision"], numbers["termination_recall"] = diagnosis.termination()
        numbers |= self._lengths(diagnosis)
        self.env_steps += len(diagnosis.steps.starts)
        for name, value in (numbers | {"env_steps": self.env_steps}).items():
            if math.isfinite(value):
                self.logger.record(f"model_error/{name}", value)
        if self.verbose >= 1:
            print(
                f"Dynamics after {self.diagnosed_at:,} steps: R^2 of one step compared with no change "
                f"{numbers['r2_no_change_1']:.3f}, on {len(diagnosis.steps.starts):,} new steps"
            )

    def _lengths(self, diagnosis: Diagnosis) -> dict[str, float]:
        """:return: eps_m', eps_pi, the optimal rollout length for them, and the current one"""
        agent = self.model
        found = {"model_error_tv": diagnosis.model_error(), "rollout_length": agent.rollout_length}
        if self.snapshots:
            shift = found["policy_shift_tv"] = policy_shift(agent, self.snapshots, diagnosis.steps.starts)
            if agent.gamma < 1:
                found["optimal_rollout_length"] = optimal_rollout_length(
                    policy_shift=shift, model_error=found["model_error_tv"], gamma=agent.gamma
                )
        if (now := snapshot(agent)) is not None:
            self.snapshots.append(now)
        return found
