"""
The rollout length k of ``rollout_schedule="auto"``.

k is the number of steps over which predictions stay close to real trajectories with the same actions.
"""

from collections.abc import Sequence

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.explained_variance import ROUNDING

# Maximum mean squared error after k steps, as a fraction of the variance of the observations.
NEGLIGIBLE = 0.01


@th.no_grad()
def drift(
    dynamics: DynamicsModel, steps: ReplayBufferSamples, length: int, fewest: int = 1, untold: th.Tensor | None = None
) -> list[th.Tensor]:
    """
    Mean squared error of the observation after 1, 2, ... ``length`` predicted steps, starting from every real step.

    Each prediction starts from the previous prediction and uses the real action. It ends with the real episode.

    :param dynamics: draws the next observations, see ``DynamicsModel.sample``
    :param steps: consecutive real steps of some envs, ``(T, n_envs, dim)``, with dones of any kind
    :param length: maximum number of steps
    :param fewest: minimum number of start states for an error to be measured
    :param untold: steps whose next observation is unknown, bool ``(T, n_envs)``; trajectories end before them; ``None``: none
    :return: errors ``(obs_dim,)`` after each number of steps
    """
    n_steps, n_envs = steps.dones.shape[:2]
    # The next step may start with the observation of a reset, in SB3 and in joined datasets.
    goes_on = (steps.dones[:-1, :, 0] < 0.5) & (steps.next_observations[:-1] == steps.observations[1:]).all(dim=2)
    known = goes_on.new_ones(n_steps, n_envs) if untold is None else ~untold
    goes_on = th.cat([goes_on & known[1:], goes_on.new_zeros(1, n_envs)]).flatten()
    obs, actions, truth = (part.flatten(0, 1) for part in (steps.observations, steps.actions, steps.next_observations))
    rows = known.flatten().nonzero().squeeze(1)
    obs = obs[rows]
    errors: list[th.Tensor] = []
    while len(errors) < length and len(rows) >= fewest:
        predicted, _ = dynamics.sample(obs, actions[rows])
        errors.append(((predicted - truth[rows]) ** 2).mean(dim=0))
        alive = goes_on[rows]
        obs, rows = predicted[alive], rows[alive] + n_envs
    return errors


def reliable_length(errors: Sequence[th.Tensor], obs: th.Tensor) -> int:
    """
    The largest k for which the error after each of 1, ..., k steps is small: the mean over the dimensions that vary of (mean
    squared error / variance, clipped to 1) is at most ``NEGLIGIBLE``.

    :param errors: mean squared errors after 1, 2, ... steps, each ``(obs_dim,)``, see :func:`drift`
    :param obs: the real observations ``(B, obs_dim)``
    :return: k, at least 1; 1 if no dimension varies
    """
    variance = obs.var(dim=0)
    varies = variance.sqrt() > ROUNDING * obs.abs().amax(dim=0)
    length = 0
    for error in errors:
        # A comparison with NaN is False.
        if not (error / variance)[varies].clamp(max=1).mean() <= NEGLIGIBLE:
            break
        length += 1
    return max(length, 1)
