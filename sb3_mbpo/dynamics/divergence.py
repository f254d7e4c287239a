"""When a fit of an ensemble goes wrong: what was before, and whether to go back to it."""

import copy
import warnings
from typing import Any

import torch as th

from sb3_mbpo.dynamics.layers import EnsembleMLP

# So many times the variance of the targets is no prediction: ten standard deviations off in the root mean square.
FAR = 100.0
# Added to that variance, in squared units of the targets: all of them may be constant.
LEAST_VARIANCE = 0.01


class LastGood:
    """
    An ensemble as it was before a fit: weights, moments, standardisers, hold-out errors. What was lost is revived first.

    :param ensemble: a ``ProbabilisticEnsemble``
    """

    def __init__(self, ensemble: Any) -> None:
        revive(ensemble)
        self.ensemble = ensemble
        self.state = copy.deepcopy((ensemble.state_dict(), ensemble.optimizer.state_dict()))
        self.random_state = ensemble.generator.get_state()

    def sound_enough(self, y_train: th.Tensor, x: th.Tensor, y: th.Tensor) -> bool:
        """:return: whether enough members to predict are sound now; the arguments are those of :meth:`settle`"""
        finite = all(parameter.isfinite().all() for parameter in self.ensemble.parameters())
        return finite and int(self._sound(y_train, x, y).sum()) >= self.ensemble.n_elites

    def settle(self, sound_before: bool, y_train: th.Tensor, x: th.Tensor, y: th.Tensor) -> bool:
        """
        Go back to what was before, with a warning, if the fit left fewer sound members than the ensemble needs to predict;
        else let no unsound one be an elite.

        :param sound_before: whether training itself went well, before the best weights came back
        :param y_train: the targets of the fit ``(N, 1 + obs_dim)``
        :param x: standardised inputs held out ``(B, obs_dim + action_dim)``
        :param y: their targets ``(B, 1 + obs_dim)``
        :return: whether it went back
        """
        ensemble = self.ensemble
        sound = self._sound(y_train, x, y)
        if sound_before and sound.sum() >= ensemble.n_elites:
            ensemble.holdout_errors[~sound] = float("inf")
            return False
        self.restore()
        kept = "keeps what it had before" if ensemble.usable else "never had a good fit, and imagines nothing until it has one"
        warnings.warn(f"The fit of the dynamics diverged; it {kept}. Lower dynamics_kwargs: learning_rate", stacklevel=3)
        return True

    def restore(self) -> None:
        """Make the ensemble what it was."""
        self.ensemble.load_state_dict(self.state[0])
        self.ensemble.optimizer.load_state_dict(self.state[1])

    def undo(self) -> None:
        """Make the ensemble what it was, its random numbers included: the fit has not happened."""
        self.restore()
        self.ensemble.generator.set_state(self.random_state)

    def _sound(self, y_train: th.Tensor, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        Which members may predict: those no further off than ``FAR`` times the variance of the targets, or than before the fit.

        A short fit of raw, small targets starts beyond that limit and gets better; it is no divergence.

        :return: bool ``(members,)``
        """
        mean = y_train.mean(dim=0)
        variance = ((y_train - mean) ** 2).mean() + ((y - mean) ** 2).mean() + LEAST_VARIANCE
        # A comparison with nan says no.
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
    Expected squared error of each member's draws, (mu - y)^2 + variance, mean over rows and the dimensions that vary.

    :param x: standardised inputs ``(B, obs_dim + action_dim)``
    :param y: targets as the ensemble sees them ``(B, 1 + obs_dim)``
    :return: ``(members,)``
    """
    total, varies = th.zeros_like(ensemble.holdout_errors), ensemble.target_standardizer.varies
    # In pieces that stay in a CPU's caches.
    for inputs, targets in zip(x.split(1000), y.split(1000), strict=True):
        mean, log_variance = ensemble._distribution(inputs.expand(len(total), -1, -1))
        total += (((mean - targets) ** 2 + log_variance.exp()) * varies).sum(dim=(1, 2))
    return total / (len(y) * varies.sum().clamp(min=1))


@th.no_grad()
def revive(ensemble: Any) -> None:
    """
    Give members with a non-finite weight new ones, as a new ensemble has them: they would spoil the loss of all.

    Draws random numbers only if there are any; Adam's moments then start anew as well.

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
