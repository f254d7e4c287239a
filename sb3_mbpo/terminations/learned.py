"""A learned rule of termination, for environments whose own is not known."""

from typing import Any

import torch as th
from torch import nn

from sb3_mbpo.dynamics.layers import EnsembleMLP, Standardizer

_N_MEMBERS, _HALF_BATCH, _MOST_ROWS = 3, 64, 10_000
_FIRST_STEPS, _LATER_STEPS = 1000, 200  # minibatches of a fit of the network: from the initial weights, from trained ones
_NEVER = 1e30  # a logit that no rule reaches, yet finite: SB3 and checkpoints expect ordinary numbers
# With fewer terminations, surfaces are compared by cross-validation in so many folds, and no network is trained.
_ENOUGH, _FOLDS = 100, 3
# A rule replaces one before it if it makes less than this share of its errors.
_CLEARLY_BETTER = 0.8
# Where between the two classes the threshold of few terminations lies, from the others (0) to these (1). The others are many,
# so their edge is known better.
_AT = 0.1
# Penalty of a surface's weights: small, so that terminations and other transitions are separated wherever they can be.
_L1 = 1e-5
# Observations of more dimensions have too many products.
_MOST_PRODUCTS_OF = 30


class LearnedTermination(nn.Module):
    """
    A classifier of real terminations, for environments without a known rule.

    Rules of termination are mostly simple regions of the next observation: a threshold, a range, a disc. So the first
    candidates are quadratic surfaces, fitted by logistic regression from a few terminations: in next_obs without products of
    its entries, with them, and in next_obs, obs and action without products. A network is the last, once there are a hundred
    terminations; a group lasso on its first layer (Scardapane et al. 2017, arXiv 1607.00485) lets go of the inputs that do not
    matter. A later candidate is used if it errs clearly less on rows that it was not trained on.
    A non-finite next_obs counts as terminated.

    :param obs_shape: shape of one observation
    :param action_shape: shape of one action
    :param seed: of its own generator; None takes one from the operating system
    :param device: where the parameters live
    """

    threshold: th.Tensor
    rule: th.Tensor

    def __init__(
        self, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], *, seed: int | None, device: th.device | str
    ) -> None:
        super().__init__()
        self.generator = th.Generator()
        self.seed(seed)
        obs_size = th.Size(obs_shape).numel()
        size = 2 * obs_size + th.Size(action_shape).numel()
        self.standardizer = Standardizer(size)
        surfaces = [Surface(obs_size, products=False), Surface(size, products=False)]
        if obs_size <= _MOST_PRODUCTS_OF:
            surfaces.insert(1, Surface(obs_size, products=True))
        self.surfaces = nn.ModuleList(surfaces)
        self.network = EnsembleMLP(_N_MEMBERS, size, 1, [64, 64], self.generator)
        # Terminated above this logit: never, until a termination was seen.
        self.register_buffer("threshold", th.full((1,), _NEVER))
        # Which candidate is used: a surface, or the network after the last of them. A float, see Standardizer.
        self.register_buffer("rule", th.zeros(1))
        # 1 once the network has been trained.
        self.register_buffer("network_trained", th.zeros(1))
        self.to(device)
        self.optimizer = th.optim.Adam(self.network.parameters(), lr=3e-3)

    network_trained: th.Tensor

    def seed(self, seed: int | None) -> None:
        """Start the generator anew: of the coming minibatches, not of the weights."""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def forward(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """:return: whether each transition terminates, bool ``(B,)``"""
        return self.probability(obs, actions, next_obs) > 0.5

    @th.no_grad()
    def probability(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """:return: ``(B,)``, above 0.5 where the transition terminates; calibrated at that point only"""
        logits = self._logits(int(self.rule), self._inputs(obs, actions, next_obs))
        return th.where(_finite(next_obs), th.sigmoid(logits - self.threshold), 1.0)

    def fit(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, terminated: th.Tensor) -> dict[str, float]:
        """
        Fit the surfaces anew, train the network on from its present weights, and choose.

        With a hundred terminations or more, a fifth of each class, or 10,000 rows in all if that is less, is held out to
        choose by. The rows' own content decides which, so that those held out now were hardly ever trained on before.
        With fewer, surfaces are compared by cross-validation, and the one that is chosen is fitted to all rows.

        :param obs: ``(N, *obs_shape)``
        :param actions: ``(N, *action_shape)``, in the env's own scale
        :param next_obs: ``(N, *obs_shape)``
        :param terminated: ``(N,)``, true terminations, never the end by a time limit
        :return: of rows that were not trained on: ``termination_positives``, the terminations among them; if there are any
            ``termination_recall``, and if any was predicted ``termination_precision``
        """
        content = next_obs.flatten(1).sum(dim=1, dtype=th.float32).view(th.int32).long()
        rank = (content * 2654435761 % 2**32).argsort(stable=True)
        classes = [rank[terminated[rank] > 0.5], rank[terminated[rank] <= 0.5]]
        few = len(classes[0]) < _ENOUGH
        share = min(0.2, 10_000 / max(len(rank), 1))
        train, held_out = [], []
        for rows in classes:
            cut = int(len(rows) * share)
            held_out.append(rows[:cut])
            train.append(rows[cut:])
        used = (rows if len(rows) <= _MOST_ROWS else rows[self._draw(len(rows), (_MOST_ROWS,))] for rows in train)
        if few and all(map(len, classes)):
            # All terminations, in an order that does not depend on what they are.
            used = (rows if len(rows) <= _MOST_ROWS else rows[self._draw(len(rows), (_MOST_ROWS,))] for rows in classes)
        parts = [self._inputs(obs[rows], actions[rows], next_obs[rows]) for rows in used]
        positives, negatives = (part[part.isfinite().all(dim=1)] for part in parts)
        n_negatives = len(classes[1]) if few else len(train[1])
        weight = n_negatives / max(len(negatives), 1)
        if len(positives) and len(negatives):
            if few:
                counts = self._cross_validate(positives, negatives, weight)
                return _metrics(*counts)
            self._choose(positives, negatives, weight, [self._inputs(obs[r], actions[r], next_obs[r]) for r in held_out])
        elif self._untrained and len(positives) + len(negatives):
            # One class teaches nothing about the other: what was learned from both stays.
            self.threshold.fill_(-_NEVER if len(positives) else _NEVER)
        hits, inventions = (int(self(obs[rows], actions[rows], next_obs[rows]).sum()) for rows in held_out)
        return _metrics(len(held_out[0]), hits, inventions)

    @property
    def _untrained(self) -> bool:
        return bool(self.threshold.abs() == _NEVER)

    def _cross_validate(self, positives: th.Tensor, negatives: th.Tensor, weight: float) -> tuple[int, int, int]:
        """
        Choose a surface by cross-validation and fit it to all rows.

        :param weight: transitions that each of ``negatives`` stands for
        :return: terminations judged, those found, and transitions wrongly found (all of them, also those not in ``negatives``)
        """
        best, found = float("inf"), (0, 0)
        folds = min(_FOLDS, len(positives), len(negatives))
        of = [th.arange(len(rows), device=rows.device) % folds for rows in (positives, negatives)]
        # Of a single row of a class nothing can be left out; the simplest surface is used.
        for i in range(len(self.surfaces) if folds > 1 else 0):
            hits = inventions = 0
            for fold in range(folds):
                threshold = self._fit_surface(i, positives[of[0] != fold], negatives[of[1] != fold], weight)
                outside = positives[of[0] == fold], negatives[of[1] == fold]
                found_here = [int((self._logits(i, rows) > threshold).sum()) for rows in outside]
                hits, inventions = hits + found_here[0], inventions + found_here[1]
            errors = len(positives) - hits + weight * inventions
            if errors < _CLEARLY_BETTER * best:
                best, found = errors, (hits, round(weight * inventions))
                self.rule.fill_(i)
        if folds <= 1:
            self.rule.zero_()
        self.threshold.copy_(self._fit_surface(int(self.rule), positives, negatives, weight))
        return len(positives) if folds > 1 else 0, *found

    def _choose(self, positives: th.Tensor, negatives: th.Tensor, weight: float, held_out: list[th.Tensor]) -> None:
        """Fit all candidates; the best on the held-out terminations and other transitions is used."""
        best = float("inf")
        for i in range(len(self.surfaces) + 1):
            if i < len(self.surfaces):
                threshold = self._fit_surface(i, positives, negatives, weight)
            else:
                self._train(positives, negatives)
                threshold = _fewest_errors(self._logits(i, positives), self._logits(i, negatives), weight)
            hits, inventions = (int((self._logits(i, rows) > threshold).sum()) for rows in held_out)
            errors = len(held_out[0]) - hits + inventions
            if errors < _CLEARLY_BETTER * best:
                best = errors
                self.rule.fill_(i)
                self.threshold.copy_(threshold)

    def _fit_surface(self, i: int, positives: th.Tensor, negatives: th.Tensor, weight: float) -> th.Tensor:
        """:return: its threshold"""
        surface: Any = self.surfaces[i]
        surface.fit(positives, negatives)
        logits = surface(positives), surface(negatives)
        return _fewest_errors(*logits, weight, at=_AT if len(positives) < _ENOUGH else 0.5)

    def _train(self, positives: th.Tensor, negatives: th.Tensor) -> None:
        """Train the network on, half of each minibatch of either class."""
        self.standardizer.fit(th.cat([positives, negatives]))
        sign = th.tensor([-1.0, 1.0], device=positives.device).repeat_interleave(_HALF_BATCH)
        first = next(self.network.parameters())  # weights of the first layer: (members, inputs, outputs)
        for _ in range(_LATER_STEPS if self.network_trained else _FIRST_STEPS):
            halves = (x[self._draw(len(x), (_N_MEMBERS, _HALF_BATCH)).to(x.device)] for x in (positives, negatives))
            logits = self.network(self.standardizer(th.cat(list(halves), dim=1))).squeeze(-1)
            loss = nn.functional.softplus(sign * logits).mean(dim=1).sum()
            loss = loss + 0.01 * first.square().sum(dim=2).add(1e-8).sqrt().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.network_trained.fill_(1.0)

    def _inputs(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        parts = (x.flatten(1).to(self.threshold) for x in (next_obs, obs, actions))
        return th.cat(list(parts), dim=1)

    @th.no_grad()
    def _logits(self, rule: int, inputs: th.Tensor) -> th.Tensor:
        if rule < len(self.surfaces):
            return self.surfaces[rule](inputs)
        return self.network(self.standardizer(inputs).expand(_N_MEMBERS, -1, -1)).mean(dim=0).squeeze(-1)

    def _draw(self, size: int, shape: tuple[int, ...]) -> th.Tensor:
        return th.randint(size, shape, generator=self.generator)


class Surface(nn.Module):
    """
    A quadratic surface between two classes, by logistic regression on standardised features.

    :param size: of the inputs, only the first so many are used
    :param products: with the products of all pairs of them, else with the squares alone
    """

    weight: th.Tensor
    bias: th.Tensor

    def __init__(self, size: int, *, products: bool) -> None:
        super().__init__()
        self.size, self.products = size, products
        self.inputs = Standardizer(size)
        n_features = size + (size * (size + 1) // 2 if products else size)
        # Not as sharp as that of the inputs: a square is large where its input is.
        self.features = Standardizer(n_features, limit=100.0)
        self.register_buffer("weight", th.zeros(n_features))
        self.register_buffer("bias", th.zeros(1))

    def _expand(self, inputs: th.Tensor) -> th.Tensor:
        z = self.inputs(inputs[:, : self.size])
        if not self.products:
            return th.cat([z, z.square()], dim=1)
        i, j = th.triu_indices(self.size, self.size, device=z.device)
        return th.cat([z, z[:, i] * z[:, j]], dim=1)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """:return: ``(B,)``, the larger the more like the first class"""
        return self.features(self._expand(inputs)) @ self.weight + self.bias

    def fit(self, positives: th.Tensor, negatives: th.Tensor) -> None:
        """
        From zero, both classes with the same weight, by L-BFGS; the optimum is the only one.

        :param positives: inputs of the first class ``(P, size or more)``
        :param negatives: of the second ``(N, size or more)``
        """
        rows = th.cat([positives, negatives])
        self.inputs.fit(rows[:, : self.size])
        self.features.fit(self._expand(rows))
        # In double precision, for separable classes drive the weights far; and on the CPU, for these are many small steps.
        x = self.features(self._expand(rows)).double().cpu()
        sign = th.ones(len(rows), dtype=th.float64)
        sign[: len(positives)] = -1
        share = th.full_like(sign, 0.5 / len(negatives))
        share[: len(positives)] = 0.5 / len(positives)
        weight = th.zeros(x.shape[1] + 1, dtype=th.float64, requires_grad=True)
        optimizer = th.optim.LBFGS([weight], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> th.Tensor:
            optimizer.zero_grad()
            fit = (share * nn.functional.softplus(sign * (x @ weight[:-1] + weight[-1]))).sum()
            penalized = fit + _L1 * (weight[:-1].square() + 1e-10).sqrt().sum()
            penalized.backward()
            return penalized

        with th.enable_grad():
            optimizer.step(loss)
        with th.no_grad():
            self.weight.copy_(weight[:-1])
            self.bias.copy_(weight[-1:])


def _metrics(judged: int, hits: int, inventions: int) -> dict[str, float]:
    metrics = {"termination_positives": float(judged)}
    if judged:
        metrics["termination_recall"] = hits / judged
        if hits + inventions:
            metrics["termination_precision"] = hits / (hits + inventions)
    return metrics


def _fewest_errors(positives: th.Tensor, negatives: th.Tensor, weight: float, at: float = 0.5) -> th.Tensor:
    """
    The threshold of fewest errors, the middle one where several are as good.

    The textbook correction for balanced batches, adding the log of the real odds, supposes calibrated logits; under
    a lasso they are not.

    :param positives: logits of terminations
    :param negatives: logits of other transitions
    :param weight: transitions that each of ``negatives`` stands for
    :param at: where between the two logits beside it, 0 the lower
    :return: a scalar tensor: terminated above it
    """
    logits, order = th.cat([positives, negatives]).double().sort()
    # Errors of a threshold just above each logit: terminations up to it are missed, the others above it are invented.
    missed = (order < len(positives)).double().cumsum(dim=0)
    errors = missed + weight * (len(negatives) - (order >= len(positives)).double().cumsum(dim=0))
    upper = th.cat([logits[1:], logits[-1:] + 1.0])
    errors[upper <= logits] = th.inf  # no threshold lies between equal logits
    best = th.nonzero(errors <= errors.min() + 1e-6)[:, 0]
    middle = best[len(best) // 2]
    return (1 - at) * logits[middle] + at * upper[middle]


def _finite(obs: th.Tensor) -> th.Tensor:
    return obs.isfinite().flatten(1).all(dim=1)
