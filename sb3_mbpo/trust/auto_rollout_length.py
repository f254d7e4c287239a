"""
The rollout length k of ``rollout_schedule="auto"``.

How far predictions drift from real trajectories under the same actions, and how many steps that leaves.
"""

from collections.abc import Sequence

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.explained_variance import ROUNDING

# Mean squared error after k steps that is small beside the variance of the observations.
NEGLIGIBLE = 0.01


@th.no_grad()
def drift(
    dynamics: DynamicsModel, steps: ReplayBufferSamples, length: int, fewest: int = 1, untold: th.Tensor | None = None
) -> list[th.Tensor]:
    """
    Mean squared error of the observation after 1, 2, ... ``length`` predicted steps, from every real step on.

    Each prediction is fed with the one before it and with the real action; it ends where the real episode does.

    :param dynamics: draws the next observations, see ``DynamicsModel.sample``
    :param steps: consecutive real steps of some envs, ``(T, n_envs, dim)``; dones of any kind
    :param length: most steps
    :param fewest: starts that a number of steps must leave room for, to be measured
    :param untold: steps whose outcome is not known, bool ``(T, n_envs)``: trajectories end before them; ``None``: none
    :return: of each number of steps ``(obs_dim,)``
    """
    n_steps, n_envs = steps.dones.shape[:2]
    # SB3 stores the observation after a reset as the next step's, and so does a dataset whose rows are joined.
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
    k: the most steps over which every prediction errs by little, its mean squared error over the dimensions that vary, each at
    most 1, below ``NEGLIGIBLE`` of their variance.

    :param errors: mean squared errors after 1, 2, ... steps, each ``(obs_dim,)``, see :func:`drift`
    :param obs: the real observations ``(B, obs_dim)``
    :return: at least 1; 1 where nothing varies
    """
    variance = obs.var(dim=0)
    varies = variance.sqrt() > ROUNDING * obs.abs().amax(dim=0)
    length = 0
    for error in errors:
        # A comparison with nan says no.
        if not (error / variance)[varies].clamp(max=1).mean() <= NEGLIGIBLE:
            break
        length += 1
    return max(length, 1)
