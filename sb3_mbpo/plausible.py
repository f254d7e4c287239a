"""What an imagined value may be: the range that the real transitions span, and a margin."""

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mbpo.dynamics import DynamicsModel, KnownReward, Progress

# A range this small beside the magnitude is rounding of float32: such a dimension counts as constant ...
ROUNDING = 1e-6
# ... and gets this share of its magnitude, or of 1 near zero, for a range: its scale is not known yet, and the noise of an
# ensemble around a constant (a hundredth of that) is not worth counting.
CONSTANT_RANGE = 0.01


class Plausible:
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
        self._clipped = 0

    def hold(self, next_obs: th.Tensor, rewards: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param next_obs: ``(B, obs_dim)``
        :param rewards: ``(B,)``
        :return: both within the bounds
        """
        self.rows += len(rewards)
        held_obs, held_rewards = next_obs.clamp(*self.obs_bounds), rewards.clamp(*self.reward_bounds)
        # The usual case must cost next to nothing.
        if th.equal(held_obs, next_obs) and th.equal(held_rewards, rewards):
            return next_obs, rewards
        moved, paid = (held_obs != next_obs) & next_obs.isfinite(), (held_rewards != rewards) & rewards.isfinite()
        self._clipped += int((moved.any(dim=1) | paid).sum())
        return th.where(moved, held_obs, next_obs), th.where(paid, held_rewards, rewards)

    @property
    def clipped(self) -> float:
        """Share of the rows with a finite value beyond its bounds."""
        return self._clipped / max(self.rows, 1)

    def within(self, dynamics: DynamicsModel) -> DynamicsModel:
        """
        :param dynamics: a known reward in it is asked about the observation as it is kept, and is not bounded itself
        :return: the same, held
        """
        if isinstance(dynamics, KnownReward):
            return KnownReward(self.within(dynamics.dynamics), dynamics.reward_fn)
        return _Held(dynamics, self)


class _Held(DynamicsModel):
    """Another dynamics model whose predictions go through ``Plausible.hold``."""

    def __init__(self, dynamics: DynamicsModel, plausible: Plausible) -> None:
        nn.Module.__init__(self)
        self.obs_dim, self.action_dim = dynamics.obs_dim, dynamics.action_dim
        self.generator = dynamics.generator
        self.min_transitions = dynamics.min_transitions
        self.dynamics, self.plausible = dynamics, plausible

    def fit(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        return self.dynamics.fit(transitions, progress)

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.plausible.hold(*self.dynamics.sample(obs, actions))

    def finish(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        return self.plausible.hold(*self.dynamics.finish(obs, actions, next_obs, rewards))


def bounds(parts: list[th.Tensor], margin: float | None) -> tuple[th.Tensor, th.Tensor]:
    """
    Lowest and highest plausible value of each dimension.

    :param parts: real values, each ``(N, size)``
    :param margin: see :class:`Plausible`
    :return: low and high, each ``(size,)``, float32; infinite where the data or float32 know no bound
    """
    least = th.stack([part.amin(dim=0) for part in parts]).amin(dim=0).double()
    most = th.stack([part.amax(dim=0) for part in parts]).amax(dim=0).double()
    if margin is None:
        return th.full_like(least, -th.inf).float(), th.full_like(most, th.inf).float()
    spread, magnitude = most - least, th.maximum(least.abs(), most.abs())
    spread = th.where(spread <= ROUNDING * magnitude, CONSTANT_RANGE * magnitude.clamp(min=1.0), spread)
    low, high = (least - margin * spread).float(), (most + margin * spread).float()
    return low.nan_to_num(nan=-th.inf, neginf=-th.inf), high.nan_to_num(nan=th.inf, posinf=th.inf)
