"""Detects diverged fits of an ensemble and restores the state before the fit."""

import copy
import warnings
from typing import Any

import torch as th

from sb3_mbpo.dynamics.layers import EnsembleMLP

# A member has diverged if its squared error exceeds this multiple of the targets' variance (10 standard deviations).
FAR = 100.0
# Added to that variance, in squared units of the targets, because all targets may be constant.
LEAST_VARIANCE = 0.01


class LastGood:
    """
    The state of an ensemble before a fit: weights, optimizer, standardizers, hold-out errors. Calls :func:`revive` first.

    :param ensemble: a ``ProbabilisticEnsemble``
    """

    def __init__(self, ensemble: Any) -> None:
        revive(ensemble)
        self.ensemble = ensemble
        self.state = copy.deepcopy((ensemble.state_dict(), ensemble.optimizer.state_dict()))
        self.random_state = ensemble.generator.get_state()

    def sound_enough(self, y_train: th.Tensor, x: th.Tensor, y: th.Tensor) -> bool:
        """:return: whether at least ``n_elites`` members are sound now; for the arguments, see :meth:`settle`"""
        finite = all(parameter.isfinite().all() for parameter in self.ensemble.parameters())
        return finite and int(self._sound(y_train, x, y).sum()) >= self.ensemble.n_elites

    def settle(self, sound_before: bool, y_train: th.Tensor, x: th.Tensor, y: th.Tensor) -> bool:
        """
        Check the result of a fit. If fewer than ``n_elites`` members are sound, restore the state before the fit and warn.
        Otherwise, exclude unsound members from the elites.

        :param sound_before: result of :meth:`sound_enough` at the end of training, before the best weights were restored
        :param y_train: targets of the fit ``(N, 1 + obs_dim)``
        :param x: standardized hold-out inputs ``(B, obs_dim + action_dim)``
        :param y: their targets ``(B, 1 + obs_dim)``
        :return: whether the state before the fit was restored
        """
        ensemble = self.ensemble
        sound = self._sound(y_train, x, y)
        if sound_before and sound.sum() >= ensemble.n_elites:
            ensemble.holdout_errors[~sound] = float("inf")
            return False
        self.restore()
        kept = "keeps its previous weights" if ensemble.usable else "never had a good fit, and is not used until it has one"
        warnings.warn(f"The fit of the dynamics diverged; it {kept}. Lower dynamics_kwargs: learning_rate", stacklevel=3)
        return True

    def restore(self) -> None:
        """Restore the ensemble, except its random generator."""
        self.ensemble.load_state_dict(self.state[0])
        self.ensemble.optimizer.load_state_dict(self.state[1])

    def undo(self) -> None:
        """Restore the ensemble and its random generator, as if there had been no fit."""
        self.restore()
        self.ensemble.generator.set_state(self.random_state)

    def _sound(self, y_train: th.Tensor, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        Members whose error is at most ``FAR`` times the variance of the targets, or not larger than before the fit.

        A short fit of raw, small targets may start above that limit and improve, which is not a divergence.

        :return: bool ``(members,)``
        """
        mean = y_train.mean(dim=0)
        variance = ((y_train - mean) ** 2).mean() + ((y - mean) ** 2).mean() + LEAST_VARIANCE
        # A comparison with NaN is False.
        sound = draw_errors(self.ensemble, x, y) <= FAR * variance
        if not sound.all():
            after = copy.deepcopy(self.ensemble.state_dict())
            now = draw_errors(self.ensemble, x, y)
            self.ensemble.load_state_dict(self.state[0])
            sound |= now <= draw_errors(self.ensemble, x, y)
            self.ensemble.load_state_dict(after)
        return sound


@th.no_grad()
def draw_errors(ensemble: Any, x: th.Tensor, y: th.Tensor) -> th.Tensor:
    """
    Expected squared error of each member's draws, (mu - y)^2 + variance, averaged over rows and the dimensions that vary.

    :param ensemble: a ``ProbabilisticEnsemble``
    :param x: standardized inputs ``(B, obs_dim + action_dim)``
    :param y: standardized targets ``(B, 1 + obs_dim)``
    :return: ``(members,)``
    """
    total, varies = th.zeros_like(ensemble.holdout_errors), ensemble.target_standardizer.varies
    # In blocks that fit a CPU's caches.
    for inputs, targets in zip(x.split(1000), y.split(1000), strict=True):
        mean, log_variance = ensemble._distribution(inputs.expand(len(total), -1, -1))
        total += (((mean - targets) ** 2 + log_variance.exp()) * varies).sum(dim=(1, 2))
    return total / (len(y) * varies.sum().clamp(min=1))


@th.no_grad()
def revive(ensemble: Any) -> None:
    """
    Re-initialize members that have a non-finite weight, because they would make the loss of all members non-finite.

    If there are none, no random numbers are drawn. Otherwise, Adam's moments are reset as well.

    :param ensemble: a ``ProbabilisticEnsemble``
    """
    weights = list(ensemble.mlp.parameters())
    lost = ~th.stack([weight.flatten(1).isfinite().all(dim=1) for weight in weights]).all(dim=0)
    limits = (ensemble.min_log_variance, ensemble.max_log_variance)
    if not lost.any() and all(limit.isfinite().all() for limit in limits):
        return
    seed = int(th.randint(2**31, (), generator=ensemble.generator, device=ensemble.generator.device))
    sizes = [layer.weight.shape[1] for layer in ensemble.mlp.layers] + [ensemble.mlp.layers[-1].weight.shape[2]]
    fresh = EnsembleMLP(len(lost), sizes[0], sizes[-1], sizes[1:-1], th.Generator().manual_seed(seed))
    for weight, new in zip(weights, fresh.parameters(), strict=True):
        weight[lost] = new.to(weight.device)[lost]
    for limit, start in zip(limits, ensemble.initial_log_variance, strict=True):
        limit.copy_(th.where(limit.isfinite(), limit, start))
    ensemble.holdout_errors[lost] = float("inf")
    ensemble.optimizer.state.clear()
