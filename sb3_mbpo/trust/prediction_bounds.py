"""What an imagined value may be: the range that the real transitions span, and a margin."""

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel, DynamicsWrapper, KnownReward
from sb3_mbpo.rewards.learned import TransitionReward

# A range this small beside the magnitude is rounding of float32: such a dimension counts as constant ...
ROUNDING = 1e-6
# ... and gets this share of its magnitude, or of 1 near zero, for a range: its scale is not known yet, and the noise of an
# ensemble around a constant (a hundredth of that) is not worth counting.
CONSTANT_RANGE = 0.01


class PredictionBounds:
    """
    Holds what a dynamics model predicts within the range of the real data, and counts.

    In each dimension, [min - margin * range, max + margin * range] with range = max - min over the real transitions.
    Beyond it a value is set to the nearer bound. A branch does not end there: a policy that drives the model out of what it
    knows would then get no transitions that tell the critic so, and the rows (and random numbers) of all others would change.
    What is not finite is left as it is, for :func:`.rollouts.branched_rollout` to drop.

    :param transitions: real, raw, flat; observations and next observations count alike
    :param margin: ranges left on either side; ``None``: no bounds
    """

    def __init__(self, transitions: ReplayBufferSamples, margin: float | None) -> None:
        #: Predicted transitions so far.
        self.rows = 0
        columns = [[transitions.rewards], [transitions.observations, transitions.next_observations]]
        #: Bounds of rewards ``(1,)`` and next observations ``(obs_dim,)``.
        self.reward_bounds, self.obs_bounds = (bounds(parts, margin) for parts in columns)
        ended = transitions.dones.squeeze(1) > 0.5
        going, ending = transitions.rewards[~ended], transitions.rewards[ended]
        #: Bounds of rewards of transitions that go on and that end, ``(1,)`` each. What varies by so much on the way may vary
        #: as much at the end, of which there may have been one.
        self.going_bounds = bounds([going], margin) if len(going) else self.reward_bounds
        spread = going.aminmax() if len(going) else (0.0, 0.0)
        self.ending_bounds = bounds([ending], margin, float(spread[1] - spread[0])) if len(ending) else self.going_bounds
        self._clipped = 0
        # Rows of the latest prediction whose observation was out of bounds; ``None``: none of them.
        self._moved: th.Tensor | None = None

    def numbers(self) -> list[float]:
        """:return: all bounds, to make the same again; an infinite one is the largest number of float32"""
        largest = th.finfo(th.float32).max
        parts = [*self.reward_bounds, *self.going_bounds, *self.ending_bounds, *self.obs_bounds]
        return th.cat(parts).clamp(-largest, largest).tolist()  # type: ignore[no-any-return]

    @classmethod
    def of_numbers(cls, numbers: list[float], device: th.device) -> "PredictionBounds":
        """:return: what had these :meth:`numbers`, with nothing counted"""
        made = cls.__new__(cls)
        made.rows, made._clipped, made._moved = 0, 0, None
        values = th.tensor(numbers, device=device)
        rewards, obs = values[:6].unsqueeze(1), values[6:].chunk(2)
        made.reward_bounds, made.going_bounds, made.ending_bounds = (tuple(rewards[i : i + 2]) for i in (0, 2, 4))
        made.obs_bounds = obs[0], obs[1]
        return made

    def clip(self, next_obs: th.Tensor, rewards: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param next_obs: ``(B, obs_dim)``
        :param rewards: ``(B,)``
        :return: both within the bounds
        """
        return self.clip_obs(next_obs), self._count_clipped_rewards(rewards, rewards.clamp(*self.reward_bounds))

    def clip_obs(self, next_obs: th.Tensor) -> th.Tensor:
        """:return: next observations ``(B, obs_dim)`` within the bounds; a prediction begins with them"""
        self.rows += len(next_obs)
        clipped, self._moved = next_obs.clamp(*self.obs_bounds), None
        # The usual case must cost next to nothing.
        if th.equal(clipped, next_obs):
            return next_obs
        moved = (clipped != next_obs) & next_obs.isfinite()
        self._moved = moved.any(dim=1)
        self._clipped += int(self._moved.sum())
        return th.where(moved, clipped, next_obs)

    def clip_rewards(self, rewards: th.Tensor, ended: th.Tensor) -> th.Tensor:
        """
        :param rewards: of the latest prediction, ``(B,)``
        :param ended: whether they come with the end of an episode, bool ``(B,)``
        :return: within the bounds of such rewards
        """
        return self._count_clipped_rewards(rewards, self.clamp_rewards(rewards, ended))

    def _count_clipped_rewards(self, rewards: th.Tensor, clipped: th.Tensor) -> th.Tensor:
        if th.equal(clipped, rewards):
            return rewards
        moved = (clipped != rewards) & rewards.isfinite()
        self._clipped += int((moved if self._moved is None else moved & ~self._moved).sum())
        return th.where(moved, clipped, rewards)

    def wrap_obs(self, dynamics: DynamicsModel) -> DynamicsModel:
        """:return: the same dynamics, whose observations are clipped and whose rewards are left as they are"""
        return ClippedDynamics(dynamics, self, rewards=False)

    def clamp_rewards(self, rewards: th.Tensor, ended: th.Tensor) -> th.Tensor:
        """See :meth:`clip_rewards`; without counting, and what is not finite stays."""
        return th.where(ended, rewards.clamp(*self.ending_bounds), rewards.clamp(*self.going_bounds))

    @property
    def clipped(self) -> float:
        """Share of the rows with a finite value beyond its bounds."""
        return self._clipped / max(self.rows, 1)

    def wrap(self, dynamics: DynamicsModel) -> DynamicsModel:
        """
        :param dynamics: a reward that is known, or learned as a function of the transition, is asked about the observation as
            it is kept; a known one is not bounded itself
        :return: the same, clipped
        """
        if isinstance(dynamics, KnownReward):
            return KnownReward(ClippedDynamics(dynamics.dynamics, self, rewards=False), dynamics.reward_fn)
        if isinstance(dynamics, TransitionReward):
            clipped = ClippedDynamics(dynamics.dynamics, self, rewards=False)
            return TransitionReward(clipped, dynamics.reward, dynamics.termination, self.clip_rewards)
        return ClippedDynamics(dynamics, self)


class ClippedDynamics(DynamicsWrapper):
    """Another dynamics model with its predictions clipped; without ``rewards``, only its observations."""

    def __init__(self, dynamics: DynamicsModel, bounds: PredictionBounds, rewards: bool = True) -> None:
        super().__init__(dynamics)
        self.bounds, self.rewards = bounds, rewards

    def adjust(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        return self.bounds.clip(next_obs, rewards) if self.rewards else (self.bounds.clip_obs(next_obs), rewards)


def bounds(parts: list[th.Tensor], margin: float | None, least_spread: float = 0.0) -> tuple[th.Tensor, th.Tensor]:
    """
    Lowest and highest plausible value of each dimension.

    :param parts: real values, each ``(N, size)``
    :param margin: see :class:`PredictionBounds`
    :param least_spread: a range that is assumed at least
    :return: low and high, each ``(size,)``, float32; infinite where the data or float32 know no bound
    """
    least = th.stack([part.amin(dim=0) for part in parts]).amin(dim=0).double()
    most = th.stack([part.amax(dim=0) for part in parts]).amax(dim=0).double()
    if margin is None:
        return th.full_like(least, -th.inf).float(), th.full_like(most, th.inf).float()
    spread, magnitude = (most - least).clamp(min=least_spread), th.maximum(least.abs(), most.abs())
    spread = th.where(spread <= ROUNDING * magnitude, CONSTANT_RANGE * magnitude.clamp(min=1.0), spread)
    low, high = (least - margin * spread).float(), (most + margin * spread).float()
    return low.nan_to_num(nan=-th.inf, neginf=-th.inf), high.nan_to_num(nan=th.inf, posinf=th.inf)
