"""A learned rule of termination, for environments whose own is not known."""

import torch as th
from torch import nn

from sb3_mbpo.ensemble import EnsembleMLP, Standardizer

_N_MEMBERS, _HALF_BATCH, _MOST_ROWS = 3, 64, 10_000
_FIRST_STEPS, _LATER_STEPS = 1000, 200  # minibatches of a fit: from the initial weights, from trained ones
_NEVER = 1e30  # a logit that no network reaches, yet finite: SB3 and checkpoints expect ordinary numbers


class LearnedTermination(nn.Module):
    """
    A classifier of real terminations, for environments without a known rule.

    It sees next_obs, obs and action, for a rule may rest on any of them; a group lasso on the first layer
    (Scardapane et al. 2017, arXiv 1607.00485) lets go of the inputs that do not matter.
    A non-finite next_obs counts as terminated.

    :param obs_shape: shape of one observation
    :param action_shape: shape of one action
    :param seed: of its own generator; None takes one from the operating system
    :param device: where the parameters live
    """

    threshold: th.Tensor

    def __init__(
        self, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], *, seed: int | None, device: th.device | str
    ) -> None:
        super().__init__()
        self.generator = th.Generator()
        self.seed(seed)
        size = 2 * th.Size(obs_shape).numel() + th.Size(action_shape).numel()
        self.standardizer = Standardizer(size)
        self.network = EnsembleMLP(_N_MEMBERS, size, 1, [64, 64], self.generator)
        # Terminated above this logit: never, until a termination was seen.
        self.register_buffer("threshold", th.full((1,), _NEVER))
        self.to(device)
        self.optimizer = th.optim.Adam(self.parameters(), lr=3e-3)

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
        probability = th.sigmoid(self._logits(self._inputs(obs, actions, next_obs)) - self.threshold)
        return th.where(_finite(next_obs), probability, 1.0)

    def fit(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, terminated: th.Tensor) -> dict[str, float]:
        """
        Train on from the present weights: a fixed number of minibatches, half of either class.

        A fifth of each class, or 10,000 rows in all if that is less, is held out. The rows' own content decides which,
        so that those held out now were hardly ever trained on by an earlier fit.

        :param obs: ``(N, *obs_shape)``
        :param actions: ``(N, *action_shape)``, in the env's own scale
        :param next_obs: ``(N, *obs_shape)``
        :param terminated: ``(N,)``, true terminations, never the end by a time limit
        :return: ``termination_positives``, the terminations held out; if there are any ``termination_recall``,
            and if any was predicted ``termination_precision``
        """
        content = next_obs.flatten(1).sum(dim=1, dtype=th.float32).view(th.int32).long()
        rank = (content * 2654435761 % 2**32).argsort(stable=True)
        share = min(0.2, 10_000 / max(len(rank), 1))
        train, held_out = [], []
        for rows in (rank[terminated[rank] > 0.5], rank[terminated[rank] <= 0.5]):
            cut = int(len(rows) * share)
            held_out.append(rows[:cut])
            train.append(rows[cut:])
        some = (rows if len(rows) <= _MOST_ROWS else rows[self._draw(len(rows), (_MOST_ROWS,))] for rows in train)
        positives, negatives = (self._inputs(obs[rows], actions[rows], next_obs[rows]) for rows in some)
        self._train(positives[positives.isfinite().all(dim=1)], negatives[negatives.isfinite().all(dim=1)], len(train[1]))
        hits, inventions = (int(self(obs[rows], actions[rows], next_obs[rows]).sum()) for rows in held_out)
        metrics = {"termination_positives": float(len(held_out[0]))}
        if len(held_out[0]):
            metrics["termination_recall"] = hits / len(held_out[0])
            if hits + inventions:
                metrics["termination_precision"] = hits / (hits + inventions)
        return metrics

    def _train(self, positives: th.Tensor, negatives: th.Tensor, n_negatives: int) -> None:
        """:param n_negatives: the number of transitions that the rows of ``negatives`` stand for"""
        untrained = bool(self.threshold.abs() == _NEVER)
        if not len(positives) or not len(negatives):
            # One class teaches nothing about the other: what was learned from both stays.
            if untrained and len(positives) + len(negatives):
                self.threshold.fill_(-_NEVER if len(positives) else _NEVER)
            return
        self.standardizer.fit(th.cat([positives, negatives]))
        sign = th.tensor([-1.0, 1.0], device=positives.device).repeat_interleave(_HALF_BATCH)
        first = next(self.network.parameters())  # weights of the first layer: (members, inputs, outputs)
        for _ in range(_FIRST_STEPS if untrained else _LATER_STEPS):
            halves = (x[self._draw(len(x), (_N_MEMBERS, _HALF_BATCH)).to(x.device)] for x in (positives, negatives))
            logits = self.network(self.standardizer(th.cat(list(halves), dim=1))).squeeze(-1)
            loss = nn.functional.softplus(sign * logits).mean(dim=1).sum()
            loss = loss + 0.01 * first.square().sum(dim=2).add(1e-8).sqrt().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        with th.no_grad():
            weight = n_negatives / len(negatives)
            self.threshold.copy_(_fewest_errors(self._logits(positives), self._logits(negatives), weight))

    def _inputs(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        parts = (x.flatten(1).to(self.threshold) for x in (next_obs, obs, actions))
        return th.cat(list(parts), dim=1)

    def _logits(self, inputs: th.Tensor) -> th.Tensor:
        return self.network(self.standardizer(inputs).expand(_N_MEMBERS, -1, -1)).mean(dim=0).squeeze(-1)

    def _draw(self, size: int, shape: tuple[int, ...]) -> th.Tensor:
        return th.randint(size, shape, generator=self.generator)


def _fewest_errors(positives: th.Tensor, negatives: th.Tensor, weight: float) -> th.Tensor:
    """
    The threshold of fewest errors, the middle one where several are as good.

    The textbook correction for balanced batches, adding the log of the real odds, supposes calibrated logits; under
    a lasso they are not.

    :param positives: logits of terminations
    :param negatives: logits of other transitions
    :param weight: transitions that each of ``negatives`` stands for
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
    return (logits[middle] + upper[middle]) / 2


def _finite(obs: th.Tensor) -> th.Tensor:
    return obs.isfinite().flatten(1).all(dim=1)
