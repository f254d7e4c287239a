"""Clips predictions to the range of the real transitions, extended by a margin."""

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel, DynamicsWrapper, KnownReward
from sb3_mbpo.rewards.learned import TransitionReward

# A dimension whose range is below this fraction of its magnitude counts as constant: it is float32 rounding.
ROUNDING = 1e-6
# Range of a constant dimension, as a fraction of its magnitude (at least 1), because its scale is unknown. The noise of an
# ensemble around a constant is a hundredth of that, so it is not clipped.
CONSTANT_RANGE = 0.01


class PredictionBounds:
    """
    Clips the predictions of a dynamics model, and counts the clipped ones.

    The bounds of each dimension are [min - margin * range, max + margin * range], with range = max - min over the real
    transitions. Clipping does not end a branch. Otherwise, if the policy leaves the known region, the critic would get no
    transitions from there, and the rows and random numbers of all other branches would change. Non-finite values are not
    changed; :func:`.rollouts.branched_rollout` drops them.

    :param transitions: Real transitions, raw and flat; observations and next observations are used
    :param margin: Margin on each side, in ranges; ``None``: no bounds
    """

    def __init__(self, transitions: ReplayBufferSamples, margin: float | None) -> None:
        #: Number of predicted transitions so far.
        self.rows = 0
        columns = [[transitions.rewards], [transitions.observations, transitions.next_observations]]
        #: Bounds of rewards ``(1,)`` and next observations ``(obs_dim,)``.
        self.reward_bounds, self.obs_bounds = (bounds(parts, margin) for parts in columns)
        ended = transitions.dones.squeeze(1) > 0.5
        going, ending = transitions.rewards[~ended], transitions.rewards[ended]
        #: Bounds of rewards of transitions that go on and of terminal ones, ``(1,)`` each. The range of the latter is at least
        #: that of the former, because there may have been only one end.
        self.going_bounds = bounds([going], margin) if len(going) else self.reward_bounds
        spread = going.aminmax() if len(going) else (0.0, 0.0)
        self.ending_bounds = bounds([ending], margin, float(spread[1] - spread[0])) if len(ending) else self.going_bounds
        self._clipped = 0
        # Rows of the latest prediction whose observation was clipped; ``None``: none.
        self._moved: th.Tensor | None = None

    def numbers(self) -> list[float]:
        """:return: all bounds, see :meth:`of_numbers`; infinite ones are replaced by the largest float32 number"""
        largest = th.finfo(th.float32).max
        parts = [*self.reward_bounds, *self.going_bounds, *self.ending_bounds, *self.obs_bounds]
        return th.cat(parts).clamp(-largest, largest).tolist()  # type: ignore[no-any-return]

    @classmethod
    def of_numbers(cls, numbers: list[float], device: th.device) -> "PredictionBounds":
        """
        :param numbers: result of :meth:`numbers`
        :param device: device of the bounds
        :return: the same bounds, with all counts 0
        """
        made = cls.__new__(cls)
        made.rows, made._clipped, made._moved = 0, 0, None
        values = th.tensor(numbers, device=device)
        rewards, obs = values[:6].unsqueeze(1), values[6:].chunk(2)
        made.reward_bounds, made.going_bounds, made.ending_bounds = (tuple(rewards[i : i + 2]) for i in (0, 2, 4))
        made.obs_bounds = obs[0], obs[1]
        return made

    def clip(self, next_obs: th.Tensor, rewards: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Clip a prediction.

        :param next_obs: predicted next observations ``(B, obs_dim)``
        :param rewards: predicted rewards ``(B,)``
        :return: both, clipped
        """
        return self.clip_obs(next_obs), self._count_clipped_rewards(rewards, rewards.clamp(*self.reward_bounds))

    def clip_obs(self, next_obs: th.Tensor) -> th.Tensor:
        """
        Clip next observations. Must be called before :meth:`clip_rewards` for the same prediction.

        :param next_obs: predicted next observations ``(B, obs_dim)``
        :return: clipped next observations
        """
        self.rows += len(next_obs)
        clipped, self._moved = next_obs.clamp(*self.obs_bounds), None
        # Usually nothing is clipped, and this must be fast.
        if th.equal(clipped, next_obs):
            return next_obs
        moved = (clipped != next_obs) & next_obs.isfinite()
        self._moved = moved.any(dim=1)
        self._clipped += int(self._moved.sum())
        return th.where(moved, clipped, next_obs)

    def clip_rewards(self, rewards: th.Tensor, ended: th.Tensor) -> th.Tensor:
        """
        Clip rewards by the bounds of transitions that go on or of terminal ones.

        :param rewards: rewards of the latest prediction ``(B,)``
        :param ended: whether the transitions are terminal, bool ``(B,)``
        :return: clipped rewards
        """
        return self._count_clipped_rewards(rewards, self.clamp_rewards(rewards, ended))

    def _count_clipped_rewards(self, rewards: th.Tensor, clipped: th.Tensor) -> th.Tensor:
        if th.equal(clipped, rewards):
            return rewards
        moved = (clipped != rewards) & rewards.isfinite()
        self._clipped += int((moved if self._moved is None else moved & ~self._moved).sum())
        return th.where(moved, clipped, rewards)

    def wrap_obs(self, dynamics: DynamicsModel) -> DynamicsModel:
        """
        :param dynamics: the dynamics
        :return: the dynamics with clipped observations and unchanged rewards
        """
        return ClippedDynamics(dynamics, self, rewards=False)

    def clamp_rewards(self, rewards: th.Tensor, ended: th.Tensor) -> th.Tensor:
        """Like :meth:`clip_rewards`, but clipped rewards are not counted, and infinite ones are clipped, too."""
        return th.where(ended, rewards.clamp(*self.ending_bounds), rewards.clamp(*self.going_bounds))

    @property
    def clipped(self) -> float:
        """Fraction of the predicted transitions with a clipped value."""
        return self._clipped / max(self.rows, 1)

    def wrap(self, dynamics: DynamicsModel) -> DynamicsModel:
        """
        Clip the predictions of a dynamics model.

        A known reward, or one learned as a function of the transition, is computed from the clipped observation. A known
        reward is not clipped.

        :param dynamics: the dynamics
        :return: the dynamics with clipped predictions
        """
        if isinstance(dynamics, KnownReward):
            return KnownReward(ClippedDynamics(dynamics.dynamics, self, rewards=False), dynamics.reward_fn)
        if isinstance(dynamics, TransitionReward):
            clipped = ClippedDynamics(dynamics.dynamics, self, rewards=False)
            return TransitionReward(clipped, dynamics.reward, dynamics.termination, self.clip_rewards)
        return ClippedDynamics(dynamics, self)


class ClippedDynamics(DynamicsWrapper):
    """
    Clips the predictions of another dynamics model.

    :param dynamics: The wrapped model
    :param bounds: The bounds
    :param rewards: Whether rewards are clipped, too
    """

    def __init__(self, dynamics: DynamicsModel, bounds: PredictionBounds, rewards: bool = True) -> None:
        super().__init__(dynamics)
        self.bounds, self.rewards = bounds, rewards

    def adjust(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        return self.bounds.clip(next_obs, rewards) if self.rewards else (self.bounds.clip_obs(next_obs), rewards)


def bounds(parts: list[th.Tensor], margin: float | None, least_spread: float = 0.0) -> tuple[th.Tensor, th.Tensor]:
    """
    Bounds of each dimension, see :class:`PredictionBounds`.

    :param parts: real values, each ``(N, size)``
    :param margin: see :class:`PredictionBounds`
    :param least_spread: minimum range of the real values
    :return: lower and upper bounds, each ``(size,)``, float32; infinite without a margin, for NaN data and beyond float32
    """
    least = th.stack([part.amin(dim=0) for part in parts]).amin(dim=0).double()
    most = th.stack([part.amax(dim=0) for part in parts]).amax(dim=0).double()
    if margin is None:
        return th.full_like(least, -th.inf).float(), th.full_like(most, th.inf).float()
    spread, magnitude = (most - least).clamp(min=least_spread), th.maximum(least.abs(), most.abs())
    spread = th.where(spread <= ROUNDING * magnitude, CONSTANT_RANGE * magnitude.clamp(min=1.0), spread)
    low, high = (least - margin * spread).float(), (most + margin * spread).float()
    return low.nan_to_num(nan=-th.inf, neginf=-th.inf), high.nan_to_num(nan=th.inf, posinf=th.inf)
