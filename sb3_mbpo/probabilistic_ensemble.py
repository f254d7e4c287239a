"""The paper's dynamics: an ensemble of Gaussian networks over the reward and the change of the observation."""

from collections.abc import Sequence

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mbpo.checks import ENSEMBLE_RULES, check_ensemble
from sb3_mbpo.divergence import LastGood
from sb3_mbpo.dynamics import DynamicsModel, Progress
from sb3_mbpo.ensemble import EnsembleMLP, Standardizer
from sb3_mbpo.likelihood_gradient import Gradient, LikelihoodGradient, autograd_of, is_replaced
from sb3_mbpo.trust import explained


class ProbabilisticEnsemble(DynamicsModel):
    """
    The paper's model. Each member predicts a diagonal Gaussian and is trained by maximum likelihood on its bootstrap of the
    data, with early stopping on a shared hold-out set; the ``n_elites`` members best on it make the predictions
    (Janner et al., 2019, appendix; Chua et al., 2018). Weights and Adam moments carry over from fit to fit.

    :param n_members: number of networks
    :param n_elites: how many of them predict
    :param net_arch: sizes of the hidden layers
    :param learning_rate: of Adam
    :param weight_decays: L2 factor per layer, input to output (weights only);
        ``None``: the original's 2.5e-5 ... 1e-4 (spread evenly over another depth)
    :param batch_size: transitions per member and gradient step
    :param holdout_ratio: share of the data held out, drawn anew in every fit
    :param max_holdout: most transitions held out
    :param patience: epochs without a member improving that are tolerated
    :param min_improvement: relative fall of a member's hold-out error that counts as improving
    :param max_updates: most gradient steps in one fit, checked after each epoch; ``None``: only early stopping ends it
    :param epoch_updates: most gradient steps of an epoch; of more data, an epoch sees a random part; ``None``: all of it
    :param target_mode: ``"delta"``: predict next_obs - obs (the paper); ``"next"``: predict next_obs
    :param normalize_targets: standardise each target dimension, so that reward and every observation weigh the same in loss,
        hold-out error and early stopping; ``False``: raw targets and their mean squared error (the paper)
    """

    min_transitions = 10
    # A penalty or bonus at the end of an episode is learned better as a function of the transition (learned_reward.py).
    own_reward = False
    # Logarithms of the variance, in the units of the targets: where the learned bounds start (original code).
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
        learning_rate: float = 1e-3,
        weight_decays: Sequence[float] | None = None,
        batch_size: int = 256,
        holdout_ratio: float = 0.2,
        max_holdout: int = 5000,
        patience: int = 5,
        min_improvement: float = 0.01,
        max_updates: int | None = 2000,
        epoch_updates: int | None = 64,
        target_mode: str = "delta",
        normalize_targets: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in ENSEMBLE_RULES}
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        check_ensemble(given)
        self.n_elites, self.batch_size = n_elites, batch_size
        self.holdout_ratio, self.max_holdout = holdout_ratio, max_holdout
        self.patience, self.min_improvement = patience, min_improvement
        self.max_updates, self.epoch_updates = max_updates, epoch_updates
        self.target_mode, self.normalize_targets = target_mode, normalize_targets
        # The weights are drawn on the CPU, so that a seed means the same network on every device.
        on_cpu = th.Generator().manual_seed(self.generator.initial_seed() % 2**63)
        out_dim = 1 + obs_dim
        self.input_standardizer = Standardizer(obs_dim + action_dim)
        # Targets are never cut: a rare large reward is information. A constant one gets next to no noise from the start.
        self.target_standardizer = Standardizer(out_dim, limit=float("inf"), constant_std=1e-3)
        self.mlp = EnsembleMLP(n_members, obs_dim + action_dim, 2 * out_dim, list(net_arch), on_cpu)
        low, high = self.initial_log_variance
        self.min_log_variance = nn.Parameter(th.full((out_dim,), low))
        self.max_log_variance = nn.Parameter(th.full((out_dim,), high))
        self.register_buffer("holdout_errors", th.full((n_members,), float("inf")))
        self.register_buffer("known_rows", th.zeros(()))
        self.to(device)
        self.learning_rate = learning_rate
        self.weight_decays = self._decay_per_layer(weight_decays)
        self.optimizer = self._make_optimizer()

    holdout_errors: th.Tensor
    known_rows: th.Tensor  # what the last fit was given; in a buffer that grows, the transitions after them are new

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

    @property
    def usable(self) -> bool:  # type: ignore[override]
        """Whether enough members had a good fit; without one, nothing is imagined."""
        return int(self.holdout_errors.isfinite().sum()) >= self.n_elites

    @property
    def elites(self) -> th.Tensor:
        """Indices of the ``n_elites`` members with the least hold-out error, ``(n_elites,)``."""
        return self.holdout_errors.argsort(stable=True)[: self.n_elites]

    def _distribution(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param x: standardised inputs ``(members, B, obs_dim + action_dim)``
        :return: mean and log-variance of the standardised targets, each ``(members, B, 1 + obs_dim)``
        """
        return self._bounded(self.mlp(x))

    def _bounded(self, output: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: mean and log-variance, each ``(..., 1 + obs_dim)``, from the networks' ``output (..., 2 (1 + obs_dim))``"""
        mean, log_variance = output.chunk(2, dim=-1)
        # Soft bounds, so that a gradient is left beyond them (Chua et al., 2018, appendix A.1).
        log_variance = self.max_log_variance - nn.functional.softplus(self.max_log_variance - log_variance)
        log_variance = self.min_log_variance + nn.functional.softplus(log_variance - self.min_log_variance)
        return mean, log_variance

    def _to_prediction(self, targets: th.Tensor, obs: th.Tensor) -> th.Tensor:
        """
        :param targets: standardised targets ``(..., 1 + obs_dim)``
        :return: reward and next observation in the environment's units, same shape
        """
        raw = self.target_standardizer.inverse(targets)
        return raw if self.target_mode == "next" else th.cat([raw[..., :1], raw[..., 1:] + obs], dim=-1)

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Every member's distribution, elites or not.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: mean and variance of (reward, next observation), each ``(members, B, 1 + obs_dim)``, in the env's units
        """
        x = self.input_standardizer(th.cat([obs, actions], dim=-1))
        mean, log_variance = self._distribution(x.expand(len(self.holdout_errors), -1, -1))
        return self._to_prediction(mean, obs), log_variance.exp() * self.target_standardizer.std**2

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw from one elite per row, chosen uniformly and independently ("TS1" of Chua et al., 2018).

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: next observations ``(B, obs_dim)`` and rewards ``(B,)``
        """
        x = self.input_standardizer(th.cat([obs, actions], dim=-1))
        choice = th.randint(self.n_elites, (len(x),), generator=self.generator, device=x.device)
        # Only the chosen member computes a row: rows are lined up member by member.
        order = choice.argsort()
        lines = x[order].split(choice.bincount(minlength=self.n_elites).tolist())
        output = th.cat([self.mlp.member(i, line) for i, line in zip(self.elites.tolist(), lines, strict=True)])
        mean, log_variance = self._bounded(output.index_copy(0, order, output))
        noise = th.randn(mean.shape, generator=self.generator, device=x.device)
        prediction = self._to_prediction(mean + noise * (0.5 * log_variance).exp(), obs)
        return prediction[:, 1:], prediction[:, 0]

    def negative_log_likelihood(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        The training loss without weight decay: sum over members of the mean of (mu - y)^2 exp(-l) + l,
        plus 0.01 (sum of upper - sum of lower bounds of l), l the log-variance.

        :param x: standardised inputs ``(members, B, obs_dim + action_dim)``
        :param y: standardised targets ``(members, B, 1 + obs_dim)``
        :return: a scalar
        """
        mean, log_variance = self._distribution(x)
        likelihood = ((mean - y) ** 2 * (-log_variance).exp() + log_variance).mean(dim=(1, 2)).sum()
        return likelihood + 0.01 * (self.max_log_variance.sum() - self.min_log_variance.sum())

    @th.no_grad()
    def _holdout_error(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        How wrong each member's mean is: the squared error over rows, and its mean over the target's dimensions.

        That mean is geometric where targets are standardised: a dimension that cannot be predicted, such as a reward that is
        almost always the same, would outweigh all others in an arithmetic mean, end the fit early and choose the elites.

        :param x: standardised inputs ``(B, obs_dim + action_dim)``
        :param y: standardised targets ``(B, 1 + obs_dim)``
        :return: ``(members,)``
        """
        # In pieces that stay in a CPU's caches.
        means = [self._distribution(part.expand(len(self.holdout_errors), -1, -1))[0] for part in x.split(1000)]
        errors = ((th.cat(means, dim=1) - y) ** 2).mean(dim=1)
        if not self.normalize_targets:
            return errors.mean(dim=1)
        # A thousandth of a standard deviation is good enough: a constant dimension must not keep a fit going.
        return errors.add(1e-6).log().mean(dim=1).exp()

    @th.no_grad()
    def _explained(self, rows: ReplayBufferSamples, unseen: th.Tensor) -> dict[str, float | str]:
        """:return: what the elites' mean explains of held-out transitions, see :func:`.trust.explained`"""
        parts = zip(rows.observations.split(1000), rows.actions.split(1000), strict=True)
        mean = th.cat([self.predict(obs, actions)[0][self.elites].mean(dim=0) for obs, actions in parts])
        return dict(zip(("explained_reward", "explained_obs"), explained(mean, rows, unseen), strict=True))

    def _split(self, transitions: ReplayBufferSamples) -> tuple[th.Tensor, ...]:
        """:return: inputs and targets to train on, whose spread is the unit, then those held out, and which rows these are"""
        obs, next_obs = transitions.observations, transitions.next_observations
        inputs = th.cat([obs, transitions.actions], dim=-1)
        targets = th.cat([transitions.rewards, next_obs - obs if self.target_mode == "delta" else next_obs], dim=-1)
        rows = th.randperm(len(inputs), generator=self.generator, device=inputs.device)
        held_out, train = rows.tensor_split([max(1, min(int(len(inputs) * self.holdout_ratio), self.max_holdout))])
        self.input_standardizer.fit(inputs[train])
        if self.normalize_targets:
            self.target_standardizer.fit(targets[train])
        x, y = self.input_standardizer(inputs), self.target_standardizer(targets)
        return x[train], y[train], x[held_out], y[held_out], held_out

    def _gradient(self) -> Gradient:
        own_loss = is_replaced(self, ProbabilisticEnsemble, "negative_log_likelihood", "_distribution", "_bounded")
        if not own_loss and LikelihoodGradient.covers(self.mlp):
            return LikelihoodGradient(self.mlp, (self.min_log_variance, self.max_log_variance))
        return autograd_of(self.negative_log_likelihood, self.parameters())

    def _train_epoch(
        self, x: th.Tensor, y: th.Tensor, bootstrap: th.Tensor, gradient: Gradient, say: Progress, what: str
    ) -> list[th.Tensor]:
        """
        One pass of every member over its bootstrap, in a new order, or the first ``epoch_updates`` batches of it.

        :param bootstrap: rows of ``x`` and ``y`` per member, ``(members, N)``
        :param say: called with ``what`` now and then
        :return: the loss of each batch
        """
        shuffle = th.rand(bootstrap.shape, generator=self.generator, device=x.device).argsort(dim=1)
        losses = []
        for rows in bootstrap.gather(1, shuffle).split(self.batch_size, dim=1)[: self.epoch_updates]:
            losses.append(gradient(x[rows], y[rows]))
            self.optimizer.step()
            if len(losses) % 25 == 0:
                say(what)
        return losses

    def fit(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """
        Train until no member improves on the hold-out set, then give each member its best weights back and rank them.

        A fit that diverges (which warns, see ``divergence.py``) leaves everything as it was.

        :param transitions: see ``DynamicsModel.fit``; at least ``min_transitions``
        :param progress: called with a few words after each epoch
        :return: ``train_loss``, ``holdout_error`` (mean over elites), ``explained_reward`` and ``explained_obs`` (see
            :func:`.trust.explained`; of the held-out rows), ``epochs``, ``updates``, ``elites``, ``diverged``
        :raises ValueError: too few transitions
        """
        if (n := len(transitions.observations)) < self.min_transitions:
            raise ValueError(f"fit needs at least {self.min_transitions} transitions, got {n}")
        before, (x, y, x_holdout, y_holdout, held_out) = LastGood(self), self._split(transitions)
        unseen = held_out >= self.known_rows
        bootstrap = th.randint(len(x), (len(self.holdout_errors), len(x)), generator=self.generator, device=x.device)
        # A loaded optimizer brings the settings of its time along.
        for group, decay in zip(self.optimizer.param_groups, [*self.weight_decays, 0.0], strict=True):
            group["lr"], group["weight_decay"] = self.learning_rate, decay
        weights = list(self.mlp.parameters())
        best, best_error = [weight.detach().clone() for weight in weights], th.full_like(self.holdout_errors, float("inf"))
        epochs, updates, idle, gradient = 0, 0, 0, self._gradient()
        while idle <= self.patience and (self.max_updates is None or updates < self.max_updates):
            what = f"fitting the dynamics, epoch {epochs + 1}"
            losses = self._train_epoch(x, y, bootstrap, gradient, progress or (lambda words: None), what)
            epochs, updates = epochs + 1, updates + len(losses)
            error = self._holdout_error(x_holdout, y_holdout)
            improved = error < best_error * (1 - self.min_improvement)
            idle = 0 if improved.any() else idle + 1
            best_error = th.where(improved, error, best_error)
            best = [
                th.where(improved.view(-1, 1, 1), weight.detach(), kept) for kept, weight in zip(best, weights, strict=True)
            ]
            if progress is not None:
                progress(what)
        finite = all(parameter.isfinite().all() for parameter in self.parameters())
        with th.no_grad():
            for kept, weight in zip(best, weights, strict=True):
                weight.copy_(kept)
            self.holdout_errors.copy_(self._holdout_error(x_holdout, y_holdout).nan_to_num(nan=float("inf")))
            self.known_rows.fill_(n)
        diverged = float(before.settle(finite, y, x_holdout, y_holdout))
        return {
            "train_loss": th.stack(losses).mean().item(),
            "holdout_error": self.holdout_errors[self.elites].mean().item(),
            **self._explained(ReplayBufferSamples(*(part[held_out] for part in transitions[:5])), unseen),
            "epochs": epochs,
            "updates": updates,
            "diverged": diverged,
            "elites": " ".join(str(i) for i in sorted(self.elites.tolist())),
        }
