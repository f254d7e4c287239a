"""The paper's dynamics: an ensemble of Gaussian networks over the reward and the change of the observation."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mbpo.dynamics.base import DynamicsModel, Progress
from sb3_mbpo.dynamics.divergence import LastGood
from sb3_mbpo.dynamics.early_stopping import FitSchedule
from sb3_mbpo.dynamics.explained_variance import constant_errors, explained, squared_errors
from sb3_mbpo.dynamics.fused_nll import Gradient, LikelihoodGradient, autograd_of, is_replaced
from sb3_mbpo.dynamics.holdout import held_out
from sb3_mbpo.dynamics.input_gradient import InputGradient
from sb3_mbpo.dynamics.layers import EnsembleMLP, Standardizer
from sb3_mbpo.validation.argument_table import check_ensemble
from sb3_mbpo.validation.class_registry import named

# Number of gradient steps between two evaluations on the hold-out set.
LOOK_EVERY = 50
# The first fit starts from random weights, and may take this many times as many gradient steps as later fits.
FIRST_FIT = 1.5
# Errors below a thousandth of a standard deviation do not count as improvements, so that the fit ends.
GOOD_ENOUGH = 1e-6
# Inputs are clipped to this many standard deviations: beyond them, networks predict worse than a constant.
FARTHEST_INPUT = 4.0
# Two variances are clearly different if they differ by this factor.
CLEARLY = 2.0
# Weight of the prior that the gain is 1, in hold-out rows.
GAIN_PRIOR = 3.0
# If the standard deviation of a dimension changes by more than this factor, its learned scale is not kept.
LARGEST_RESCALING = 10.0


class FitData(NamedTuple):
    """
    The standardized data of a fit.

    :param x: training inputs ``(N, obs_dim + action_dim)``
    :param y: training targets ``(N, 1 + obs_dim)``
    :param x_holdout: hold-out inputs
    :param y_holdout: hold-out targets
    :param held_out: which transitions are held out, bool
    """

    x: th.Tensor
    y: th.Tensor
    x_holdout: th.Tensor
    y_holdout: th.Tensor
    held_out: th.Tensor


@named
class ProbabilisticEnsemble(DynamicsModel):
    """
    The paper's model. Each member predicts a diagonal Gaussian and is trained by maximum likelihood. The ``n_elites`` members
    with the lowest error on a shared hold-out set make the predictions (Janner et al., 2019, appendix; Chua et al., 2018).

    A fit continues from the weights of the last one; members that it does not improve keep their weights. The optimizer is
    reset in each fit. Its learning rate is constant until the members' mean hold-out error has not improved for ``patience``
    gradient steps, then it decays to zero. Dimensions that are constant in the data are predicted as constant and ignored.

    :param n_members: Number of networks
    :param n_elites: Number of networks that make predictions
    :param net_arch: Sizes of the hidden layers
    :param layer_norm: Apply layer normalization to the input of each layer except the first
    :param learning_rate: Learning rate of Adam
    :param weight_decays: L2 factor of the weights of each layer, from input to output; ``None``: 2.5e-5 ... 1e-4 as in the
        original code, evenly spaced for another number of layers
    :param batch_size: Number of transitions per member and gradient step
    :param holdout_ratio: Fraction of the transitions held out, see :mod:`.holdout`
    :param max_holdout: Maximum number of transitions held out
    :param patience: Number of gradient steps without an improvement after which the learning rate decays
    :param min_improvement: Relative decrease of the hold-out error that counts as an improvement
    :param max_updates: Maximum number of gradient steps per fit, 1.5 times as many in the first; ``None``: no limit
    :param bootstrap: Train each member on rows drawn with replacement, as in the paper, so that it misses a third of the data.
        ``False``: train on all rows, so that members differ only by their initial weights and the order of their batches
    :param beta: The loss of a row and dimension is weighted by its predicted variance to this power. With 0, as in the paper,
        badly predicted values have less weight and are learned late (Seitzer et al., 2022, arXiv 2203.09168)
    :param target_mode: ``"delta"``: predict next_obs - obs, as in the paper. ``"next"``: predict next_obs. ``"auto"``: for
        each dimension, the one that varies less in the data
    :param normalize_targets: Standardize each target dimension, so that all have the same weight in loss and hold-out error.
        ``False``: use raw targets and their mean squared error, as in the paper
    """

    min_transitions = 10
    # Rewards at the end of an episode are learned better as a function of the transition (rewards/learned.py).
    own_reward = False
    # Initial learned bounds of the log-variance, in the units of the targets (original code).
    initial_log_variance = (-10.0, 0.5)

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        seed: int | None = None,
        device: th.device | str = "cpu",
        n_members: int = 7,
        n_elites: int = 5,
        net_arch: Sequence[int] = (200, 200, 200, 200),
        layer_norm: bool = False,
        learning_rate: float = 1e-3,
        weight_decays: Sequence[float] | None = None,
        batch_size: int = 64,
        holdout_ratio: float = 0.2,
        max_holdout: int = 1000,
        patience: int = 250,
        min_improvement: float = 0.01,
        max_updates: int | None = 1000,
        bootstrap: bool = False,
        beta: float = 0.5,
        target_mode: str = "auto",
        normalize_targets: bool = True,
    ) -> None:
        check_ensemble(locals())
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        self.n_elites, self.batch_size = n_elites, batch_size
        self.holdout_ratio, self.max_holdout = holdout_ratio, max_holdout
        self.patience, self.min_improvement = patience, min_improvement
        self.max_updates, self.bootstrap, self.beta = max_updates, bootstrap, beta
        self.target_mode, self.normalize_targets = target_mode, normalize_targets
        # The weights are drawn on the CPU, so that a seed gives the same network on every device.
        on_cpu = th.Generator().manual_seed(self.generator.initial_seed() % 2**63)
        out_dim, (low, high) = 1 + obs_dim, self.initial_log_variance
        self.input_standardizer = Standardizer(obs_dim + action_dim, limit=FARTHEST_INPUT)
        # Targets are never clipped: a rare large reward matters. Untrained networks add little noise to a constant one.
        self.target_standardizer = Standardizer(out_dim, limit=float("inf"), constant_std=1e-3)
        self.mlp = EnsembleMLP(n_members, obs_dim + action_dim, 2 * out_dim, list(net_arch), on_cpu, layer_norm)
        self.min_log_variance = nn.Parameter(th.full((out_dim,), low))
        self.max_log_variance = nn.Parameter(th.full((out_dim,), high))
        self.register_buffer("holdout_errors", th.full((n_members,), float("inf")))
        self.register_buffer("relative", th.full((obs_dim,), 0.0 if target_mode == "next" else 1.0))
        self.register_buffer("gain", th.ones(n_members, 1, out_dim))
        self.to(device)
        self._input_gradient = InputGradient(self.mlp)
        self.learning_rate, self.weight_decays = learning_rate, self._decay_per_layer(weight_decays)
        self.optimizer: th.optim.Adam = self._make_optimizer()

    holdout_errors: th.Tensor
    relative: th.Tensor  # per dimension of the observation: 1 if its change is predicted, 0 if its next value
    gain: th.Tensor  # factor of each member's standardized mean: below 1 if it exaggerates on the hold-out rows

    def _decay_per_layer(self, weight_decays: Sequence[float] | None) -> list[float]:
        if weight_decays is not None:
            return list(weight_decays)
        original, n_layers = [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4], len(self.mlp.layers)
        return original if n_layers == len(original) else th.linspace(original[0], original[-1], n_layers).tolist()

    def _make_optimizer(self) -> th.optim.Adam:
        decays = zip(self.mlp.layers, self.weight_decays, strict=True)
        groups = [{"params": [layer.weight], "weight_decay": decay} for layer, decay in decays]
        groups.append({"params": [layer.bias for layer in self.mlp.layers] + [self.min_log_variance, self.max_log_variance]})
        return th.optim.Adam(groups, lr=self.learning_rate, fused=True)

    def _renew_optimizer(self) -> None:
        """Reset Adam's moments of an earlier fit, and the settings of a loaded optimizer."""
        self.optimizer.state.clear()
        for group, decay in zip(self.optimizer.param_groups, [*self.weight_decays, 0.0], strict=True):
            group["lr"], group["weight_decay"] = self.learning_rate, decay

    @property
    def usable(self) -> bool:  # type: ignore[override]
        """Whether at least ``n_elites`` members had a good fit."""
        return int(self.holdout_errors.isfinite().sum()) >= self.n_elites

    @property
    def elites(self) -> th.Tensor:  # type: ignore[override]
        """Indices of the ``n_elites`` members with the lowest hold-out error, ``(n_elites,)``."""
        return self.holdout_errors.argsort(stable=True)[: self.n_elites]

    def _distribution(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param x: standardized inputs ``(members, B, obs_dim + action_dim)``
        :return: mean and log-variance of the standardized targets, each ``(members, B, 1 + obs_dim)``
        """
        return self._bounded(self.mlp(x))

    def _bounded(self, output: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: mean and log-variance, each ``(..., 1 + obs_dim)``, of the networks' ``output (..., 2 (1 + obs_dim))``"""
        mean, log_variance = output.chunk(2, dim=-1)
        # Soft bounds, so that the gradient does not vanish beyond them (Chua et al., 2018, appendix A.1).
        log_variance = self.max_log_variance - nn.functional.softplus(self.max_log_variance - log_variance)
        log_variance = self.min_log_variance + nn.functional.softplus(log_variance - self.min_log_variance)
        return mean, log_variance

    def _to_prediction(self, targets: th.Tensor, obs: th.Tensor) -> th.Tensor:
        """
        :param targets: standardized targets ``(..., 1 + obs_dim)``
        :return: reward and next observation in the environment's units, same shape
        """
        raw = self.target_standardizer.inverse(targets * self.target_standardizer.varies)
        return th.cat([raw[..., :1], raw[..., 1:] + self.relative * obs], dim=-1)

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The predicted distribution of every member, not only of the elites.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: mean and variance of (reward, next observation), each ``(members, B, 1 + obs_dim)``, in the env's units
        """
        x = self.input_standardizer(th.cat([obs, actions], dim=-1))
        mean, log_variance = self._distribution(x.expand(len(self.holdout_errors), -1, -1))
        mean = mean * self.gain
        scale = self.target_standardizer.std * self.target_standardizer.varies
        return self._to_prediction(mean, obs), log_variance.exp() * scale**2

    @th.no_grad()
    def predict_mean(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """See ``DynamicsModel.predict_mean``. Returns the mean of the elites' means."""
        parts = zip(obs.split(1000), actions.split(1000), strict=True)
        return th.cat([self.predict(*part)[0][self.elites].mean(dim=0) for part in parts])

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw each row from one elite. Rows are assigned at random in each call, equally many to each elite ("TS1" of Chua et
        al., 2018). Gradients flow to observations and actions, not to the weights.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: next observations ``(B, obs_dim)`` and rewards ``(B,)``
        """
        x = self.input_standardizer(th.cat([obs, actions], dim=-1))
        # Each elite has the same number of places for rows; some of them stay empty.
        elites, size = self.elites, -(-len(x) // self.n_elites)
        places = th.randperm(size * self.n_elites, generator=self.generator, device=x.device)[: len(x)]
        mean, log_variance = self._bounded(self._input_gradient.rows(x, elites.tolist(), places))
        noise = th.randn(mean.shape, generator=self.generator, device=x.device) * (0.5 * log_variance).exp()
        prediction = self._to_prediction(mean * self.gain[elites[places // size], 0] + noise, obs)
        return prediction[:, 1:], prediction[:, 0]

    def negative_log_likelihood(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        The training loss without weight decay: sum over members of the mean of exp(beta l) ((mu - y)^2 exp(-l) + l), plus 0.01
        (sum of upper - sum of lower bounds of l), where l is the log-variance. No gradient flows through the first factor.
        Constant targets are ignored.

        :param x: standardized inputs ``(members, B, obs_dim + action_dim)``
        :param y: standardized targets ``(members, B, 1 + obs_dim)``
        :return: the loss, a scalar
        """
        mean, log_variance = self._distribution(x)
        varies = self.target_standardizer.varies
        weight = (self.beta * log_variance.detach()).exp()
        likelihood = (weight * ((mean - y) ** 2 * (-log_variance).exp() + log_variance)).mean(dim=1).sum(dim=0)
        bounds = self.max_log_variance - self.min_log_variance
        return (likelihood * varies).sum() / varies.sum().clamp(min=1) + 0.01 * (bounds * varies).sum()

    @th.no_grad()
    def _holdout_error(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        Squared error of each member's mean prediction, averaged over rows and over the dimensions that vary.

        For standardized targets, the mean over dimensions is geometric, and errors are clipped to that of a constant. In an
        arithmetic mean, a dimension that cannot be predicted, such as an almost constant reward, would outweigh all others,
        end the fit early and determine the elites.

        :param x: standardized inputs ``(B, obs_dim + action_dim)``
        :param y: standardized targets ``(B, 1 + obs_dim)``
        :return: ``(members,)``; infinite if a prediction of the member is NaN
        """
        # In blocks that fit a CPU's caches.
        means = [self._distribution(part.expand(len(self.holdout_errors), -1, -1))[0] for part in x.split(1000)]
        errors = ((th.cat(means, dim=1) - y) ** 2).mean(dim=1)
        varies = self.target_standardizer.varies > 0.5
        if not varies.any():
            return th.zeros_like(self.holdout_errors)
        errors = errors[:, varies]
        if self.normalize_targets:
            error = (errors.clamp(max=1) + GOOD_ENOUGH).log().mean(dim=1).exp()
        else:
            error = errors.mean(dim=1)
        return th.where(errors.isfinite().all(dim=1), error, th.inf)

    def _improved(self, error: float, best: float) -> bool:
        """
        Whether the ensemble has improved by ``min_improvement``.

        Unpredictable dimensions must not hide improvements of the others. The error means as much as log(error) n / log(0.1)
        of n dimensions with an error of a tenth and the others with 1, and the mean over the former must have improved.

        :param error: mean hold-out error of the members, see :meth:`_holdout_error`
        :param best: the lowest error so far
        """
        if not self.normalize_targets or best == math.inf:
            return error < best * (1 - self.min_improvement)
        n = max(float(self.target_standardizer.varies.sum()), 1.0)
        known = min(max(math.log(max(error, GOOD_ENOUGH)) / math.log(0.1), 1 / n), 1.0)
        return error < best * (1 - self.min_improvement) ** known

    @th.no_grad()
    def _fit_gain(self, x: th.Tensor, y: th.Tensor) -> None:
        """
        Shrink predictions that are exaggerated on the hold-out rows, so that unpredictable dimensions, such as contact forces,
        are not predicted worse than by their mean.

        The gain is the least-squares factor of the mean, sum(m y) / sum(m^2), between 0 and 1. ``GAIN_PRIOR`` rows with a gain
        of 1 are added, because few rows are not reliable.

        :param x: standardized inputs ``(B, obs_dim + action_dim)``
        :param y: standardized targets ``(B, 1 + obs_dim)``
        """
        self.gain.fill_(1.0)
        if not self.normalize_targets:
            return
        along, square = th.full_like(self.gain, GAIN_PRIOR), th.full_like(self.gain, GAIN_PRIOR)
        for inputs, targets in zip(x.split(1000), y.split(1000), strict=True):
            mean, _ = self._distribution(inputs.expand(len(self.gain), -1, -1))
            along += (mean * targets).sum(dim=1, keepdim=True)
            square += (mean**2).sum(dim=1, keepdim=True)
        self.gain.copy_((along / square).clamp(0, 1).nan_to_num(nan=1.0))

    def _targets(self, transitions: ReplayBufferSamples) -> th.Tensor:
        return th.cat([transitions.rewards, transitions.next_observations - self.relative * transitions.observations], dim=-1)

    def _choose_targets(self, transitions: ReplayBufferSamples) -> None:
        """
        For each dimension, predict its change or its next value, whichever varies less. A position changes little in a step; a
        contact force does not depend on the previous one. A choice changes only if the other one is ``CLEARLY`` better.
        """
        if self.target_mode != "auto":
            return
        obs, next_obs = transitions.observations.double(), transitions.next_observations.double()
        of_next, of_change = next_obs.var(dim=0, correction=0), (next_obs - obs).var(dim=0, correction=0)
        favored = th.where(self.relative > 0.5, 1 / CLEARLY, CLEARLY) if self.usable else 1.0
        self.relative.copy_((of_change * favored < of_next) | (of_change == 0))

    def _split(self, transitions: ReplayBufferSamples) -> FitData:
        """Split off the hold-out rows, fit the standardizers to the others, and keep the predictions unchanged."""
        relative = self.relative.clone()
        self._choose_targets(transitions)
        inputs = th.cat([transitions.observations, transitions.actions], dim=-1)
        targets = self._targets(transitions)
        left_out = held_out(transitions, self.holdout_ratio, self.max_holdout)
        before = [copy.deepcopy(part) for part in (self.input_standardizer, self.target_standardizer)]
        # The output weights of a dimension are not kept if its target changes between change and next value.
        before[1].varies[1:] *= relative == self.relative
        self.input_standardizer.fit(inputs[~left_out])
        magnitude = th.cat([targets[:, :1], transitions.next_observations], dim=-1).abs().amax(dim=0)
        self.target_standardizer.fit(targets[~left_out], magnitude)
        if not self.normalize_targets:
            # Raw targets, but the mean of constant ones is still subtracted.
            self.target_standardizer.mean.mul_(1 - self.target_standardizer.varies)
            self.target_standardizer.std.fill_(1.0)
        if self.usable:
            self._keep_predictions(*before)
        x, y = self.input_standardizer(inputs), self.target_standardizer(targets)
        return FitData(x[~left_out], y[~left_out], x[left_out], y[left_out], left_out)

    @th.no_grad()
    def _keep_predictions(self, inputs: Standardizer, targets: Standardizer) -> None:
        """
        Adapt the first and the last layer to the new standardizers, so that the predictions do not change.

        A fit then starts from what the last one has learned. The gain is fitted again.

        :param inputs: the previous standardizer of the inputs
        :param targets: the previous standardizer of the targets
        """
        scale, shift = _change(inputs, self.input_standardizer)
        # An input that has become constant keeps its effect.
        still = (inputs.varies > 0.5) & (self.input_standardizer.varies < 0.5)
        shift = th.where(still, inputs(self.input_standardizer.mean), shift)
        first: Any = self.mlp.layers[0]
        last: Any = self.mlp.layers[-1]
        first.bias += (shift @ first.weight).unsqueeze(1)
        first.weight *= scale.unsqueeze(1)
        scale, shift = _change(self.target_standardizer, targets)
        mean, log_variance = (slice(None, len(scale)), slice(len(scale), None))
        last.weight[..., mean] *= scale
        last.bias[..., mean] = last.bias[..., mean] * scale + shift
        for part in (last.bias[..., log_variance], self.min_log_variance, self.max_log_variance):
            part += 2 * scale.log()

    def _gradient(self) -> Gradient:
        own_loss = is_replaced(self, ProbabilisticEnsemble, "negative_log_likelihood", "_distribution", "_bounded")
        if not own_loss and LikelihoodGradient.covers(self.mlp):
            bounds = (self.min_log_variance, self.max_log_variance)
            return LikelihoodGradient(self.mlp, bounds, self.target_standardizer.varies, self.beta)
        return autograd_of(self.negative_log_likelihood, self.parameters())

    def _train_steps(self, data: FitData, rows: th.Tensor, gradient: Gradient, rates: Sequence[float]) -> th.Tensor:
        """
        Gradient steps on batches drawn for each member.

        :param rows: indices of the rows of ``data.x`` that each member learns from, ``(members, N)``
        :param rates: learning rate of each step
        :return: mean loss
        """
        size = min(self.batch_size, rows.shape[1])
        draws = th.randint(rows.shape[1], (len(rows), len(rates) * size), generator=self.generator, device=rows.device)
        chosen = rows.gather(1, draws)
        losses = []
        for batch, rate in zip(chosen.split(size, dim=1), rates, strict=True):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses.append(gradient(data.x[batch], data.y[batch]))
            self.optimizer.step()
        return th.stack(losses).mean()

    def fit(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """
        Train until the mean hold-out error stops improving, restore the best weights of each member, and rank the members.

        If a fit diverges (a warning is issued, see ``divergence.py``) or is interrupted, the previous state is restored.

        :param transitions: see ``DynamicsModel.fit``; at least ``min_transitions``
        :param progress: called from time to time with a short text; it may raise to abort the fit
        :return: ``train_loss``, ``holdout_error`` (mean over elites), ``explained_reward``, ``explained_obs`` of the held-out
            rows (see :func:`.explained_variance.explained`), ``updates``, ``epochs`` (passes over the data), ``elites``,
            ``diverged``
        :raises ValueError: there are too few transitions
        """
        if (n := len(transitions.observations)) < self.min_transitions:
            raise ValueError(f"fit needs at least {self.min_transitions} transitions, got {n}")
        before = LastGood(self)
        self._input_gradient.forget()
        try:
            data = self._split(transitions)
            loss, updates, sound = self._train(data, progress or (lambda words: None), before)
            self.holdout_errors.copy_(self._holdout_error(data.x_holdout, data.y_holdout))
            self._fit_gain(data.x_holdout, data.y_holdout)
        except BaseException:
            before.undo()
            raise
        diverged = float(before.settle(sound, data.y, data.x_holdout, data.y_holdout))
        rows = ReplayBufferSamples(*(part[data.held_out] for part in transitions[:5]))
        errors = squared_errors(self.predict_mean(rows.observations, rows.actions), rows)
        of_constant = th.maximum(constant_errors(transitions), constant_errors(rows))
        share = explained(errors, of_constant, len(rows.rewards))
        return {
            "train_loss": loss,
            "holdout_error": self.holdout_errors[self.elites].mean().item(),
            "explained_reward": share.reward,
            "explained_obs": share.obs,
            "epochs": updates * min(self.batch_size, len(data.x)) / len(data.x),
            "updates": updates,
            "diverged": diverged,
            "elites": " ".join(str(i) for i in sorted(self.elites.tolist())),
        }

    def _train(self, data: FitData, progress: Progress, before: LastGood) -> tuple[float, int, bool]:
        """
        Train, then restore for each member the weights, including those before the fit, that were best on the hold-out set.

        :param before: checks whether the final weights are sound
        :return: mean loss of the last steps, the number of steps, and whether the final weights are sound or, if the ensemble
            was usable before, any member has improved
        """
        weights, bounds = list(self.mlp.parameters()), [self.min_log_variance, self.max_log_variance]
        best, best_bounds = ([part.detach().clone() for part in parts] for parts in (weights, bounds))
        warm = self.usable
        least = self._holdout_error(data.x_holdout, data.y_holdout) if warm else th.full_like(self.holdout_errors, th.inf)
        first, reference = least, _mean(least)
        most = math.inf if self.max_updates is None else int(self.max_updates * (1 if warm else FIRST_FIT))
        rows = th.arange(len(data.x), device=data.x.device).expand(len(least), -1)
        if self.bootstrap:
            rows = th.randint(len(data.x), rows.shape, generator=self.generator, device=data.x.device)
        self._renew_optimizer()
        gradient, schedule, loss = self._gradient(), FitSchedule(self.learning_rate, self.patience, most), math.nan
        while rates := schedule.next_rates(LOOK_EVERY):
            loss = self._train_steps(data, rows, gradient, rates).item()
            error = self._holdout_error(data.x_holdout, data.y_holdout)
            improved = self._improved(level := _mean(error), reference)
            reference = level if improved else reference
            schedule.look(improved)
            better = error < least
            least = th.where(better, error, least)
            best = [th.where(better.view(-1, 1, 1), weight.detach(), kept) for kept, weight in zip(best, weights, strict=True)]
            if better.any():
                best_bounds = [bound.detach().clone() for bound in bounds]
            progress(f"fitting the dynamics, {schedule.updates} gradient steps")
        sound = before.sound_enough(data.y, data.x_holdout, data.y_holdout) or (warm and bool((least < first).any()))
        with th.no_grad():
            for kept, part in zip([*best, *best_bounds], [*weights, *bounds], strict=True):
                part.copy_(kept)
        self._renew_optimizer()
        return loss, schedule.updates, sound


def _mean(errors: th.Tensor) -> float:
    """:return: mean of the finite errors of the members; infinite if there are none"""
    finite = errors[errors.isfinite()]
    return finite.mean().item() if len(finite) else math.inf


def _change(old: Standardizer, new: Standardizer) -> tuple[th.Tensor, th.Tensor]:
    """
    :return: scale and shift with ``old(x) = new(x) * scale + shift``, ``(size,)`` each; 1 and 0 for a dimension that is
        constant in one of them or whose scale has changed too much, so that what was learned is not valid
    """
    scale, shift = new.std / old.std, (new.mean - old.mean) / old.std
    alike = (scale < LARGEST_RESCALING) & (scale > 1 / LARGEST_RESCALING) & (old.varies > 0.5) & (new.varies > 0.5)
    return th.where(alike, scale, 1.0), th.where(alike, shift, 0.0)
