"""Rules that drop or correct imagined transitions, or end branches, by the disagreement of the ensemble members."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.layers import ROUNDING, Standardizer
from sb3_mbpo.trust.disagreement import draw, geometric_jsd, information_fusion, information_loss, one_vs_rest_kl
from sb3_mbpo.validation.class_registry import described
from sb3_mbpo.validation.rules import number, whole

# Maximum number of real transitions that a rule computes its limits from.
PROBED_ROWS = 10_000
# Minimum variance of a member, in squared standard deviations of the real data, so that its logarithm is finite.
LEAST_VARIANCE = 1e-12


class RolloutStep(NamedTuple):
    """
    One step of all branches, passed to a rule.

    :param step: h, 0 in the first step
    :param length: k, the maximum number of steps
    :param limits: limits returned by the rule's ``begin`` for this model rollout; ``None`` for a rule without ``begin``
    :param state: state of these branches that the rule returned in the previous step; ``None`` in the first
    :param generator: the only source of randomness a rule may use
    """

    step: int
    length: int
    limits: Any
    state: th.Tensor | None
    generator: th.Generator


class FilterResult(NamedTuple):
    """
    The result of a rule for one step.

    :param prediction: a draw of (reward, change of the observation), ``(B, 1 + obs_dim)``, in the units of ``mean``
    :param keep: which transitions are stored in the model buffer, bool ``(B,)``
    :param proceed: which branches continue, unless they terminate, bool ``(B,)``
    :param state: state of each branch for its next step, ``(B, ...)``, or ``None``
    :param penalty: subtracted from the stored reward, also from a known or learned one, ``(B,)``, in standard deviations of
        the real rewards; ``None``: nothing
    """

    prediction: th.Tensor
    keep: th.Tensor
    proceed: th.Tensor
    state: th.Tensor | None = None
    penalty: th.Tensor | None = None

    def of(self, rows: th.Tensor) -> "FilterResult":
        """
        :param rows: which rows to select, bool ``(B,)``
        :return: the result for these rows
        """
        return FilterResult(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


#: ``(mean, var, rollout_step) -> FilterResult``: the members' means and variances of (reward, change of the observation), each
#: ``(members, B, 1 + obs_dim)``, in standard deviations of the real data. A rule may have a method
#: ``begin(mean, var, memory) -> (limits, memory)``, which is called before each model rollout with predictions of real
#: transitions. The memory is a list of numbers, empty at first; it is passed to the next ``begin`` and saved with the agent.
Rule = Callable[[th.Tensor, th.Tensor, RolloutStep], FilterResult]


@described("rollout_filter")
@dataclass(frozen=True)
class Macura:
    """
    A branch ends before the first step with ``geometric_jsd >= kappa`` (Frauenknecht et al., 2024).

    kappa is the running mean over the model rollouts of xi times a percentile of the divergence at real transitions. The
    original takes the percentile (90 or 95) at the first imagined step, over all members instead of the elites, and tunes xi
    per task from 0.3 to 30. Here, it is taken at the real actions, xi is 1, and the percentile did no harm on any measured
    task (docs/guide/trust.md).

    :param xi: Factor of the threshold
    :param zeta: Percentile, from 0 to 100
    :param window: Number of model rollouts after which older ones fade, as in an exponential moving average
    """

    xi: float = 1.0
    zeta: float = 99.0
    window: int = 2000

    def __post_init__(self) -> None:
        number(0, 1e9).check("Macura: xi", self.xi)
        number(0, 100).check("Macura: zeta", self.zeta)
        whole(1).check("Macura: window", self.window)

    def begin(self, mean: th.Tensor, var: th.Tensor, memory: list[float]) -> tuple[float, list[float]]:
        """
        :param mean: means at real transitions, see :data:`Rule`
        :param var: variances, same shape
        :param memory: returned by the last call; empty at first
        :return: kappa, and the memory: kappa and the number of model rollouts in it
        """
        kappa, rounds = memory or (0.0, 0)
        latest = self.xi * geometric_jsd(mean, var).nanquantile(self.zeta / 100).item()
        if math.isfinite(latest):
            rounds = min(rounds + 1, self.window)
            kappa += (latest - kappa) / rounds
        return kappa, [kappa, rounds]

    def __call__(self, mean: th.Tensor, var: th.Tensor, rollout_step: RolloutStep) -> FilterResult:
        """See :data:`Rule`."""
        certain = geometric_jsd(mean, var) < rollout_step.limits
        return FilterResult(draw(mean, var, rollout_step.generator)[0], certain, certain)


@described("rollout_filter")
@dataclass(frozen=True)
class Infoprop:
    """
    The next state is drawn from the fusion of the members. A branch ends before the step in which it loses too much
    information: in any dimension, more than lambda_1 in one step or more than lambda_2 in total (Frauenknecht et al., 2025).

    lambda_1 is the ``step_quantile`` of the loss at real transitions, and lambda_2 is ``horizon`` times its
    ``budget_quantile``, per dimension. Both are computed for each model rollout. The defaults are those of the original, which
    uses all members instead of the elites, and draws new start states until enough transitions are stored.

    :param step_quantile: Quantile of lambda_1, from 0 to 1
    :param budget_quantile: Quantile of lambda_2, from 0 to 1
    :param horizon: Number of steps with a loss at the ``budget_quantile`` that a branch can make
    """

    step_quantile: float = 0.9999
    budget_quantile: float = 0.01
    horizon: int = 100

    def __post_init__(self) -> None:
        for name in ("step_quantile", "budget_quantile"):
            number(0, 1).check(f"Infoprop: {name}", getattr(self, name))
        whole(1).check("Infoprop: horizon", self.horizon)

    def begin(self, mean: th.Tensor, var: th.Tensor, memory: list[float]) -> tuple[tuple[th.Tensor, th.Tensor], list[float]]:
        """
        :param mean: means at real transitions, see :data:`Rule`
        :param var: variances, same shape
        :param memory: not used
        :return: lambda_1 and lambda_2, each ``(1 + obs_dim,)``, and an empty memory
        """
        loss = information_loss(information_fusion(mean, var)[2])
        at_once, cheapest = (loss.nanquantile(q, dim=0) for q in (self.step_quantile, self.budget_quantile))
        return (at_once, self.horizon * cheapest), []

    def __call__(self, mean: th.Tensor, var: th.Tensor, rollout_step: RolloutStep) -> FilterResult:
        """See :data:`Rule`. The state is the total loss since the start, ``(B, 1 + obs_dim)``."""
        fused_mean, gain, conditional_var = information_fusion(mean, var)
        value, _ = draw(mean, var, rollout_step.generator)
        noise = th.randn(value.shape, generator=rollout_step.generator, device=value.device)
        loss = information_loss(conditional_var)
        total = loss if rollout_step.state is None else rollout_step.state + loss
        at_once, in_all = rollout_step.limits
        certain = ((loss <= at_once) & (total <= in_all)).all(dim=1)
        return FilterResult(fused_mean + gain * (value - fused_mean) + noise * conditional_var.sqrt(), certain, certain, total)


@described("rollout_filter")
@dataclass(frozen=True)
class M2AC:
    """
    In step h of k, the transitions with the lowest ``one_vs_rest_kl`` of the drawn member are stored, a fraction of
    (k - h) / (2 (k + 1)), or half if k = 1. All branches continue (Pan et al., 2020).

    Branches are ranked within a block (``buffers/rollout_blocks.py``). The original uses all members instead of the elites,
    and includes terminated branches in the fraction.

    :param alpha: Factor of the penalty: alpha times the divergence, in standard deviations of the real rewards, is subtracted
        from the stored reward
    """

    alpha: float = 1e-3

    def __post_init__(self) -> None:
        number(0, 1e9).check("M2AC: alpha", self.alpha)

    def __call__(self, mean: th.Tensor, var: th.Tensor, rollout_step: RolloutStep) -> FilterResult:
        """See :data:`Rule`."""
        value, chosen = draw(mean, var, rollout_step.generator)
        uncertainty = one_vs_rest_kl(mean, var, chosen)
        k = rollout_step.length
        share = 0.5 if k == 1 else (k - rollout_step.step) / (2 * (k + 1))
        rank = uncertainty.argsort(stable=True).argsort(stable=True)
        everywhere = th.ones_like(chosen, dtype=th.bool)
        return FilterResult(value, rank < share * len(rank), everywhere, penalty=self.alpha * uncertainty)


#: The rules by their names in ``rollout_filter``.
FILTERS: dict[str, type] = {"macura": Macura, "infoprop": Infoprop, "m2ac": M2AC}


class RolloutFilter:
    """
    Applies a rule in one model rollout. Inputs and outputs are in the env's units. The rule sees standard deviations of the
    real data, so that the units of observations do not matter.

    :param rule: The rule, see :data:`Rule`
    :param dynamics: Must implement ``predict``, see ``DynamicsModel``; if it has ``elites``, only those are used
    :param transitions: All real transitions
    :param memory: The rule's memory of earlier model rollouts
    """

    @th.no_grad()
    def __init__(self, rule: Rule, dynamics: DynamicsModel, transitions: ReplayBufferSamples, memory: list[float]) -> None:
        self.rule, self.dynamics = rule, dynamics
        #: Number of finite predictions that the rule did not keep so far.
        self.left_out = 0
        obs, actions, next_obs, _, rewards = transitions[:5]
        scale = Standardizer(1 + obs.shape[1], constant_std=1e-3).to(obs.device)
        scale.fit(th.cat([rewards, next_obs - obs], dim=1))
        self.std = scale.std
        values = th.cat([rewards, next_obs], dim=1).double()
        # In constant dimensions, members differ by float32 rounding, which must not count as disagreement.
        constant = values.std(dim=0, correction=0) <= ROUNDING * values.abs().amax(dim=0)
        # Checked once here, because every check in a rollout would wait for the GPU.
        self.constant = constant if constant.any() else None
        self.limits: Any = None
        #: The rule's memory for the next model rollout.
        self.memory: list[float] = []
        begin = getattr(rule, "begin", None)
        if begin is not None:
            n_rows = min(len(obs), PROBED_ROWS)
            # Evenly spaced: no random numbers are drawn.
            rows = th.arange(n_rows, device=obs.device) * len(obs) // n_rows
            self.limits, self.memory = begin(*self.predict(obs[rows], actions[rows]), memory)

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: means and variances as in :data:`Rule`, each ``(members, B, 1 + obs_dim)``
        """
        mean, var = self.dynamics.predict(obs, actions)
        if (elites := getattr(self.dynamics, "elites", None)) is not None:
            mean, var = mean[elites], var[elites]
        change = th.cat([mean[..., :1], mean[..., 1:] - obs], dim=-1)
        if self.constant is not None:
            change, var = (th.where(self.constant, part.mean(dim=0), part) for part in (change, var))
        return change / self.std, (var / self.std / self.std).clamp(min=LEAST_VARIANCE)

    def __call__(self, obs: th.Tensor, actions: th.Tensor, step: int, length: int, state: th.Tensor | None) -> FilterResult:
        """
        Apply the rule to one step.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :param step: see :class:`RolloutStep`
        :param length: see :class:`RolloutStep`
        :param state: see :class:`RolloutStep`
        :return: the result, with the reward, the next observation and the penalty in the env's units. Non-finite predictions
            are kept, and :func:`.rollouts.branched_rollout` drops them
        """
        rollout_step = RolloutStep(step, length, self.limits, state, self.dynamics.generator)
        filtered = self.rule(*self.predict(obs, actions), rollout_step)
        drawn = filtered.prediction * self.std
        prediction = th.cat([drawn[:, :1], obs + drawn[:, 1:]], dim=1)
        broken = ~prediction.isfinite().all(dim=1)
        self.left_out += int((~filtered.keep & ~broken).sum())
        penalty = None if filtered.penalty is None else filtered.penalty * self.std[0]
        return FilterResult(prediction, filtered.keep | broken, filtered.proceed | broken, filtered.state, penalty)
