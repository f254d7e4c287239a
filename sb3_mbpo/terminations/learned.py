"""A learned termination rule, for environments without a known one."""

from typing import Any

import torch as th
from torch import nn

from sb3_mbpo.dynamics.layers import EnsembleMLP, Standardizer

_N_MEMBERS, _HALF_BATCH, _MOST_ROWS = 3, 64, 10_000
_FIRST_STEPS, _LATER_STEPS = 1000, 200  # minibatches of the network's first fit and of later fits
_NEVER = 1e30  # a logit that no rule reaches; finite, because SB3 and checkpoints expect finite numbers
# With fewer than _ENOUGH terminations, surfaces are compared by cross-validation, and no network is trained.
_ENOUGH, _FOLDS = 100, 3
# A candidate replaces an earlier one if its errors are below this fraction of the earlier one's errors.
_CLEARLY_BETTER = 0.8
# With few terminations, position of the threshold between other transitions (0) and terminations (1). There are many other
# transitions, so their boundary is known better.
_AT = 0.1
# Penalty of a surface's weights. It is small, so that terminations and other transitions are separated if possible.
_L1 = 1e-5
# Products are not used if the observation has more dimensions than this.
_MOST_PRODUCTS_OF = 30


class LearnedTermination(nn.Module):
    """
    A classifier of real terminations, for environments without a known rule.

    Most termination rules are simple regions of the next observation: a threshold, a range, a disc. So the first candidates
    are quadratic surfaces, fitted by logistic regression: in next_obs without products of its entries, in next_obs with
    products, and in next_obs, obs and action without products. The last candidate, if there are a hundred terminations, is a
    network with a group lasso on its first layer (Scardapane et al. 2017, arXiv 1607.00485), which removes irrelevant inputs.
    A later candidate is used if it has clearly fewer errors on rows it was not trained on. A non-finite next_obs counts as
    terminated.

    :param obs_shape: Shape of one observation
    :param action_shape: Shape of one action
    :param seed: Seed of its own random generator; ``None``: a random seed from the system
    :param device: Device of the parameters
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
        # A transition terminates above this logit: never, until there was a termination.
        self.register_buffer("threshold", th.full((1,), _NEVER))
        # Index of the used candidate: a surface, or the network after the last surface. A float, see Standardizer.
        self.register_buffer("rule", th.zeros(1))
        # 1 once the network has been trained.
        self.register_buffer("network_trained", th.zeros(1))
        self.to(device)
        self.optimizer = th.optim.Adam(self.network.parameters(), lr=3e-3)

    network_trained: th.Tensor

    def seed(self, seed: int | None) -> None:
        """:param seed: seed of future minibatches, not of the weights; ``None``: a random seed from the system"""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def forward(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(B, *obs_shape)``
        :param actions: ``(B, *action_shape)``, in the env's own scale
        :param next_obs: ``(B, *obs_shape)``
        :return: whether each transition terminates, bool ``(B,)``
        """
        return self.probability(obs, actions, next_obs) > 0.5

    @th.no_grad()
    def probability(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(B, *obs_shape)``
        :param actions: ``(B, *action_shape)``, in the env's own scale
        :param next_obs: ``(B, *obs_shape)``
        :return: ``(B,)``, above 0.5 if the transition terminates; only calibrated at that value
        """
        logits = self._logits(int(self.rule), self._inputs(obs, actions, next_obs))
        return th.where(_finite(next_obs), th.sigmoid(logits - self.threshold), 1.0)

    def fit(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, terminated: th.Tensor) -> dict[str, float]:
        """
        Fit the surfaces from scratch, continue training the network, and choose the best candidate.

        With at least a hundred terminations, a fifth of each class, or 10,000 rows in total if that is less, is held out for
        the choice. The content of the rows determines which are held out, so that earlier fits hardly ever trained on them.
        With fewer terminations, surfaces are compared by cross-validation, and the best one is fitted to all rows.

        :param obs: ``(N, *obs_shape)``
        :param actions: ``(N, *action_shape)``, in the env's own scale
        :param next_obs: ``(N, *obs_shape)``
        :param terminated: real terminations ``(N,)``, without time limits
        :return: metrics on held-out rows: ``termination_positives``, the number of terminations; ``termination_recall`` if
            there are any; ``termination_precision`` if any was predicted
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
            # Use all rows, in an order that does not depend on the class.
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
            # With a single class, nothing can be learned. What was learned before is kept.
            self.threshold.fill_(-_NEVER if len(positives) else _NEVER)
        hits, inventions = (int(self(obs[rows], actions[rows], next_obs[rows]).sum()) for rows in held_out)
        return _metrics(len(held_out[0]), hits, inventions)

    @property
    def _untrained(self) -> bool:
        return bool(self.threshold.abs() == _NEVER)

    def _cross_validate(self, positives: th.Tensor, negatives: th.Tensor, weight: float) -> tuple[int, int, int]:
        """
        Choose a surface by cross-validation and fit it to all rows.

        :param positives: inputs of terminations
        :param negatives: inputs of other transitions
        :param weight: number of transitions that each row of ``negatives`` represents
        :return: numbers of terminations judged, of those found, and of false positives (scaled to all other transitions)
        """
        best, found = float("inf"), (0, 0)
        folds = min(_FOLDS, len(positives), len(negatives))
        of = [th.arange(len(rows), device=rows.device) % folds for rows in (positives, negatives)]
        # With a single row of a class, cross-validation is impossible; the simplest surface is used.
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
        """Fit all candidates, and use the one with the fewest errors on held-out rows."""
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
        """:return: threshold of surface ``i`` after the fit"""
        surface: Any = self.surfaces[i]
        surface.fit(positives, negatives)
        logits = surface(positives), surface(negatives)
        return _fewest_errors(*logits, weight, at=_AT if len(positives) < _ENOUGH else 0.5)

    def _train(self, positives: th.Tensor, negatives: th.Tensor) -> None:
        """Continue training the network. Each minibatch has equally many rows of both classes."""
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
    A quadratic surface between two classes, by logistic regression on standardized features.

    :param size: number of inputs used, from the first on
    :param products: use the products of all pairs of inputs; ``False``: only the squares
    """

    weight: th.Tensor
    bias: th.Tensor

    def __init__(self, size: int, *, products: bool) -> None:
        super().__init__()
        self.size, self.products = size, products
        self.inputs = Standardizer(size)
        n_features = size + (size * (size + 1) // 2 if products else size)
        # A larger limit than for the inputs, because squares of large inputs are larger.
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
        """
        :param inputs: ``(B, size or more)``
        :return: logits ``(B,)``; larger means more likely in the first class
        """
        return self.features(self._expand(inputs)) @ self.weight + self.bias

    def fit(self, positives: th.Tensor, negatives: th.Tensor) -> None:
        """
        Fit by L-BFGS, starting from zero weights. Both classes have the same total weight. The optimum is unique.

        :param positives: inputs of the first class ``(P, size or more)``
        :param negatives: inputs of the second class ``(N, size or more)``
        """
        rows = th.cat([positives, negatives])
        self.inputs.fit(rows[:, : self.size])
        self.features.fit(self._expand(rows))
        # In double precision, because weights get large for separable classes; on the CPU, because there are many small steps.
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
    The threshold with the fewest errors; the middle one if several are equally good.

    The textbook correction for balanced batches, which adds the log of the real odds, assumes calibrated logits. With a
    lasso, they are not calibrated.

    :param positives: logits of terminations
    :param negatives: logits of other transitions
    :param weight: number of transitions that each row of ``negatives`` represents
    :param at: position between the two neighboring logits, where 0 is the lower one
    :return: the threshold, a scalar tensor
    """
    logits, order = th.cat([positives, negatives]).double().sort()
    # Errors of a threshold just above each logit: terminations up to it are missed, other transitions above it are false.
    missed = (order < len(positives)).double().cumsum(dim=0)
    errors = missed + weight * (len(negatives) - (order >= len(positives)).double().cumsum(dim=0))
    upper = th.cat([logits[1:], logits[-1:] + 1.0])
    errors[upper <= logits] = th.inf  # no threshold lies between equal logits
    best = th.nonzero(errors <= errors.min() + 1e-6)[:, 0]
    middle = best[len(best) // 2]
    return (1 - at) * logits[middle] + at * upper[middle]


def _finite(obs: th.Tensor) -> th.Tensor:
    return obs.isfinite().flatten(1).all(dim=1)
