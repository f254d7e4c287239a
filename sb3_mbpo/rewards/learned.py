"""The learned reward: a function of observation, action, next observation, and whether the episode ends."""

import math
from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mbpo.dynamics.base import DynamicsModel, DynamicsWrapper, Progress
from sb3_mbpo.dynamics.explained_variance import SMALL
from sb3_mbpo.dynamics.holdout import row_hash
from sb3_mbpo.dynamics.input_gradient import InputGradient
from sb3_mbpo.dynamics.layers import EnsembleMLP, Standardizer

_N_MEMBERS, _BATCH, _MOST_ROWS, _BLOCK = 3, 128, 20_000, 5_000
# Maximum number of gradient updates of the first fit and of later fits, for each network; and updates between two evaluations
# on the held-out rows.
_MOST_UPDATES = {"going_on": (1000, 400), "extra_at_end": (400, 200)}
_LOOK = 25
# With few rows, the number of updates is limited to this many passes over them, more for ends, which are rare.
_PASSES = {"going_on": 200, "extra_at_end": 1000}
_LEARNING_RATE = 2e-3
# Number of folds of rows that go on, and of ends. Member i holds out fold i.
_FOLDS_OF_MANY, _FOLDS_OF_FEW = 10, 3
# A network replaces the constant if its error is below this fraction of the constant's error.
_CLEARLY_BETTER = 0.8


class LearnedReward(nn.Module):
    """
    r(s, a, s', end) = f(s, a, s') + end * g(s, a, s'): a regression on real rewards by mean squared error.

    f is trained on transitions that go on, and g on the difference between the rewards of terminal transitions and f. So a
    bonus or penalty at the end does not affect other transitions. g starts as a constant, the mean of these differences, so
    that a constant bonus is learned from one end. It is replaced by a network once the network predicts held-out ends clearly
    better.

    In training, half of the next observations are real and half are predicted by the dynamics. The regression then uses
    differences between observations only as far as the dynamics predicts them correctly. The prediction is deterministic,
    because noise of the reward would only add variance to the critic's target.

    :param obs_dim: Size of a flat observation
    :param action_dim: Size of a flat action
    :param seed: Seed of its own random generator; ``None``: a random seed from the system
    :param device: Device of the parameters
    """

    fitted: th.Tensor

    def __init__(self, obs_dim: int, action_dim: int, *, seed: int | None, device: th.device | str) -> None:
        super().__init__()
        self.generator = th.Generator()
        self.seed(seed)
        size = 2 * obs_dim + action_dim
        self.going_on = _Regression(size, [128, 128], self.generator)
        self.extra_at_end = _Regression(size, [64, 64], self.generator)
        # 1 after the first fit.
        self.register_buffer("fitted", th.zeros(()))
        self.to(device)

    def seed(self, seed: int | None) -> None:
        """:param seed: seed of future minibatches, not of the weights; ``None``: a random seed from the system"""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def forward(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, terminated: th.Tensor) -> th.Tensor:
        """
        :param obs: raw observations ``(B, obs_dim)``
        :param actions: actions in [-1, 1] ``(B, action_dim)``
        :param next_obs: raw next observations ``(B, obs_dim)``
        :param terminated: whether the episode ends, bool ``(B,)``
        :return: expected rewards ``(B,)``
        """
        inputs = _inputs(obs, actions, next_obs)
        rewards = self.going_on(inputs)
        if terminated.any():
            ends = terminated.nonzero().squeeze(1)
            rewards = rewards.index_add(0, ends, self.extra_at_end(inputs[ends]))
        return rewards

    def fit(
        self, transitions: ReplayBufferSamples, dynamics: DynamicsModel, progress: Progress | None = None
    ) -> dict[str, float | str]:
        """
        Continue training for a fixed number of updates, with a new optimizer whose learning rate decays to 0.

        Each member has its own held-out rows. The weights with the lowest error on held-out rows are kept, which may be those
        before the fit.

        :param transitions: all real transitions that the dynamics learns from
        :param dynamics: predicts next observations, which replace half of the real ones
        :param progress: called from time to time with a short text; it may raise to abort the fit
        :return: ``reward_error`` and, if there are enough ends, ``end_reward_error``: root mean squared errors of held-out
            rewards, given the predicted next observation, in the env's units; ``explained_reward``: explained fraction of the
            variance of rewards of transitions that go on (1 if they hardly vary)
        """
        ended = transitions.dones.squeeze(1) > 0.5
        metrics: dict[str, float | str] = {}
        first = not bool(self.fitted)
        finite = (
            th.cat([transitions.rewards, transitions.next_observations, transitions.observations], dim=1).isfinite().all(dim=1)
        )
        for part, name, of in (("going_on", "reward_error", ~ended), ("extra_at_end", "end_reward_error", ended)):
            rows = (of & finite).nonzero().squeeze(1)
            if not len(rows):
                continue
            if len(rows) > _MOST_ROWS:
                rows = rows[th.randperm(len(rows), generator=self.generator)[:_MOST_ROWS].to(rows.device)]
            some = ReplayBufferSamples(*(part[rows] for part in transitions[:5]))
            inputs, rewards, fold = _both_inputs(some, dynamics), some.rewards.squeeze(1), _folds(some)
            at_end, regression = part == "extra_at_end", getattr(self, part)
            targets = rewards - th.stack([self._in_blocks(x) for x in inputs]) if at_end else rewards.expand(2, -1)
            usual = targets.mean() if at_end else None
            updates = min(_MOST_UPDATES[part][0 if first else 1], _LOOK + _PASSES[part] * len(rows) // _BATCH)
            error = regression.fit(inputs, targets, fold, updates, self.generator, usual, progress)
            if error is not None:
                metrics[name] = error**0.5
            if not at_end:
                variance = rewards.double().var(correction=0).item()
                varies = variance > SMALL**2 * rewards.double().square().mean().item()
                # Add one standard error: with few rows, the error may be low by chance. A constant explains nothing.
                n = max(int((fold % _FOLDS_OF_MANY < _N_MEMBERS).sum()), 1)
                unexplained = variance if error is None else error * (1 + math.sqrt(2 / n))
                metrics["explained_reward"] = max(0.0, 1 - unexplained / variance) if varies else 1.0
        self.fitted.fill_(1.0)
        return metrics

    @th.no_grad()
    def _in_blocks(self, inputs: th.Tensor) -> th.Tensor:
        return th.cat([self.going_on(block) for block in inputs.split(_BLOCK)])


class _Regression(nn.Module):
    """An ensemble that predicts one number. Each member has its own held-out rows."""

    def __init__(self, size: int, net_arch: list[int], generator: th.Generator) -> None:
        super().__init__()
        self.inputs = Standardizer(size)
        # Targets are never clipped: a rare large reward matters. A constant target gets a very small standard deviation.
        self.target = Standardizer(1, limit=float("inf"), constant_std=1e-3)
        self.network = EnsembleMLP(_N_MEMBERS, size, 1, net_arch, generator)
        self._make_constant()

    def _make_constant(self) -> None:
        """Predict the mean of the targets for every input."""
        with th.no_grad():
            self.network.layers[-1].weight.zero_()  # type: ignore[operator, union-attr]
            self.network.layers[-1].bias.zero_()  # type: ignore[operator, union-attr]

    def members(self, inputs: th.Tensor) -> th.Tensor:
        """:return: standardized predictions ``(members, B)`` for ``inputs (B, size)``"""
        x = self.inputs(inputs).expand(_N_MEMBERS, -1, -1)
        # Gradients with respect to inputs and weights are never needed together.
        through = InputGradient(self.network)
        return (through(x) if x.requires_grad and through.covers() else self.network(x)).squeeze(-1)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """:return: mean of the members' predictions ``(B,)``, in the unit of the targets"""
        return self.target.inverse(self.members(inputs).mean(dim=0))

    def fit(
        self,
        inputs: th.Tensor,
        targets: th.Tensor,
        fold: th.Tensor,
        updates: int,
        generator: th.Generator,
        usual: th.Tensor | None,
        progress: Progress | None,
    ) -> float | None:
        """
        :param inputs: inputs with the real and with the predicted next observation, ``(2, N, size)``
        :param targets: targets of both, ``(2, N)``
        :param fold: a whole number per row that determines which member holds it out, ``(N,)``
        :param updates: number of gradient updates
        :param generator: random generator of the minibatches
        :param usual: constant to use if the network is not clearly better; ``None``: always use the network
        :param progress: called from time to time with a short text
        :return: mean squared error of held-out rows with the predicted next observation; ``None``: no row was held out
        """
        n_folds = _FOLDS_OF_MANY if usual is None else _FOLDS_OF_FEW
        if len(th.unique(fold % n_folds)) < n_folds:
            # With few rows, or copies, a fold may be empty. Folds by rank have equal sizes.
            fold = fold.argsort(stable=True).argsort()
        fold = fold % n_folds
        held_out = [(fold == i).nonzero().squeeze(1) for i in range(_N_MEMBERS)]
        kept_in = [(fold != i).nonzero().squeeze(1) for i in range(_N_MEMBERS)]
        before = {name: value.clone() for name, value in self.state_dict().items()}
        trained = bool(self.network.layers[-1].weight.any())  # type: ignore[operator, union-attr]
        error_before = self._error(inputs[1], targets[1], held_out)
        self.inputs.fit(inputs.flatten(0, 1))
        self.target.fit(targets.reshape(-1, 1))
        if any(not len(rows) for rows in kept_in) or any(not len(rows) for rows in held_out):
            # Too few rows to evaluate a network.
            if trained:
                self.load_state_dict(before)
            return None
        try:
            best_error, best = self._train(inputs, targets, kept_in, held_out, updates, generator, progress)
        except BaseException:
            self.load_state_dict(before)
            raise
        if usual is not None:
            constant = th.stack([(targets[1, rows].double() - usual).square().mean() for rows in held_out]).mean().item()
            if not best_error < _CLEARLY_BETTER * constant:
                self._make_constant()
                return constant
        if error_before < best_error:
            self.load_state_dict(before)
            return error_before
        self.load_state_dict(best, strict=False)
        return best_error

    def _train(
        self,
        inputs: th.Tensor,
        targets: th.Tensor,
        kept_in: list[th.Tensor],
        held_out: list[th.Tensor],
        updates: int,
        generator: th.Generator,
        progress: Progress | None,
    ) -> tuple[float, dict[str, th.Tensor]]:
        """:return: lowest error of held-out rows, and its parameters"""
        parameters = list(self.network.parameters())
        optimizer = th.optim.Adam(parameters, lr=_LEARNING_RATE)
        x, y = self.inputs(inputs).flatten(0, 1), self.target(targets.reshape(-1, 1))
        # Rows of the second half have the predicted next observation.
        train = [th.cat([rows, rows + inputs.shape[1]]) for rows in kept_in]
        best_error, best = float("inf"), {}
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - update / updates)
            rows = th.stack([own[th.randint(len(own), (_BATCH,), generator=generator).to(own.device)] for own in train])
            loss = (self.network(x[rows]) - y[rows]).square().mean(dim=(1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (update + 1) % _LOOK == 0 or update + 1 == updates:
                error = self._error(inputs[1], targets[1], held_out)
                if error < best_error:
                    best_error, best = error, {name: value.clone() for name, value in self.state_dict().items()}
                if progress is not None:
                    progress("fitting the reward")
        return best_error, best or self.state_dict()

    @th.no_grad()
    def _error(self, inputs: th.Tensor, targets: th.Tensor, held_out: list[th.Tensor]) -> float:
        """:return: mean squared error of each member's held-out rows, averaged over the members; NaN without rows"""
        errors = []
        for i, rows in enumerate(held_out):
            predicted = self.network.member(i, self.inputs(inputs[rows])).squeeze(-1)
            # In double precision, so that squares of large rewards are finite.
            errors.append((self.target.inverse(predicted).double() - targets[rows]).square().mean())
        return th.stack(errors).mean().item()


class TransitionReward(DynamicsWrapper):
    """
    Replaces the rewards of another dynamics model by those of a :class:`LearnedReward`.

    :param dynamics: The wrapped model, which predicts the next observation
    :param reward: The learned reward
    :param termination: Maps ``(obs, actions, next_obs)`` to bool ``(B,)``: whether an imagined transition ends its episode
    :param limit: Maps ``(rewards, ended)``, each ``(B,)``, to clipped rewards; ``None``: rewards are not clipped
    """

    own_reward = True

    def __init__(
        self,
        dynamics: DynamicsModel,
        reward: LearnedReward,
        termination: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
        limit: Callable[[th.Tensor, th.Tensor], th.Tensor] | None = None,
    ) -> None:
        super().__init__(dynamics)
        self.reward, self.termination, self.limit = reward, termination, limit

    def adjust(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsWrapper.adjust``; rewards come from the learned reward."""
        return next_obs, self._paid(obs, actions, next_obs)

    def _paid(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        finite = next_obs.isfinite().all(dim=1, keepdim=True)
        # A user's termination function is never called with NaN or infinity. Such rows are dropped later.
        asked = next_obs if finite.all() else th.where(finite, next_obs, obs)
        # The termination has no gradient.
        ended = self.termination(obs.detach(), actions.detach(), asked.detach())
        rewards = self.reward(obs, actions, asked, ended)
        return rewards if self.limit is None else self.limit(rewards, ended)


def _inputs(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    return th.cat([obs, actions, next_obs - obs], dim=1)


@th.no_grad()
def _both_inputs(rows: ReplayBufferSamples, dynamics: DynamicsModel) -> th.Tensor:
    """:return: inputs ``(2, N, size)`` with real and with predicted next observations; real ones replace non-finite ones"""
    blocks = zip(rows.observations.split(_BLOCK), rows.actions.split(_BLOCK), strict=True)
    predicted = th.cat([dynamics.sample(obs, actions)[0] for obs, actions in blocks])
    predicted = th.where(predicted.isfinite().all(dim=1, keepdim=True), predicted, rows.next_observations)
    return th.stack([_inputs(rows.observations, rows.actions, end) for end in (rows.next_observations, predicted)])


def _folds(rows: ReplayBufferSamples) -> th.Tensor:
    """:return: whole numbers ``(N,)`` that depend on the rows' content, so that held-out rows stay held out in later fits"""
    return (row_hash(rows) * 2**24).long()
