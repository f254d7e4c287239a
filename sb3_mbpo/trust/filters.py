"""Rules that cut, leave out or correct imagined transitions by how far the members of an ensemble disagree."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.layers import ROUNDING, Standardizer
from sb3_mbpo.trust.disagreement import draw, geometric_jsd, information_fusion, information_loss, one_vs_rest_kl
from sb3_mbpo.validation.rules import number, whole

# Real transitions that a rule takes its limits from.
PROBED_ROWS = 10_000
# Variance of a member that is sure of itself, in squared standard deviations of the real data: its logarithm must exist.
LEAST_VARIANCE = 1e-12


class RolloutStep(NamedTuple):
    """
    The branches whose next step a rule judges.

    :param step: h, 0 in the first
    :param length: k, the most steps there are
    :param limits: what the rule's ``begin`` found in this refill; ``None`` for a rule without
    :param state: what the rule returned of these branches in the step before; ``None`` in the first
    :param generator: the only source of randomness a rule may use
    """

    step: int
    length: int
    limits: Any
    state: th.Tensor | None
    generator: th.Generator


class FilterResult(NamedTuple):
    """
    What a rule makes of a step.

    :param prediction: a draw of (reward, change of the observation), ``(B, 1 + obs_dim)``, in the units of ``mean``
    :param keep: which transitions are learned from, bool ``(B,)``
    :param proceed: which branches go on, unless they terminate, bool ``(B,)``
    :param state: what is to be known of each branch in its next step, ``(B, ...)``, or ``None``
    :param penalty: what the stored reward is less by, wherever that reward comes from, ``(B,)``, in standard deviations of the
        real rewards; ``None``: nothing
    """

    prediction: th.Tensor
    keep: th.Tensor
    proceed: th.Tensor
    state: th.Tensor | None = None
    penalty: th.Tensor | None = None

    def of(self, rows: th.Tensor) -> "FilterResult":
        """:return: the same of some rows, bool ``(B,)``"""
        return FilterResult(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


#: ``(mean, var, rollout_step) -> FilterResult``: the members' means and variances of (reward, change of the observation), each
#: ``(members, B, 1 + obs_dim)``, in standard deviations of the real data. A rule may have a method
#: ``begin(mean, var, memory) -> (limits, memory)``, called before each refill with predictions of real transitions; the
#: memory is a list of numbers, empty at first, that is handed to the next ``begin`` and saved with the agent.
Rule = Callable[[th.Tensor, th.Tensor, RolloutStep], FilterResult]


@dataclass(frozen=True)
class Macura:
    """
    A branch ends before the first step with ``geometric_jsd >= kappa`` (Frauenknecht et al., 2024).

    kappa is the running mean over the refills of xi times a percentile of the divergence at real transitions. The original
    takes the percentile (90 or 95) at the first imagined step, over all members instead of the elites, and tunes xi per task
    from 0.3 to 30; here the actions are those that were really taken, xi is 1, and the percentile one that did no harm on any
    task where it was measured (docs/guide/trust.md).

    :param xi: factor of the threshold
    :param zeta: percentile, from 0 to 100
    :param window: refills from which on older ones fade, as in an exponential mean
    """

    xi: float = 1.0
    zeta: float = 99.0
    window: int = 2000

    def __post_init__(self) -> None:
        number(0, 1e9).check("Macura: xi", self.xi)
        number(0, 100).check("Macura: zeta", self.zeta)
        whole(1).check("Macura: window", self.window)

    def begin(self, mean: th.Tensor, var: th.Tensor, memory: list[float]) -> tuple[float, list[float]]:
        """:return: kappa, and the memory: kappa and the number of refills in it"""
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


@dataclass(frozen=True)
class Infoprop:
    """
    The next state is what the members have in common, and a branch ends before the step in which too much information is
    lost: in any dimension more than lambda_1 at once or, since its start, more than lambda_2 (Frauenknecht et al., 2025).

    lambda_1 is the ``step_quantile`` of the loss at real transitions, lambda_2 is ``horizon`` times its ``budget_quantile``,
    per dimension, anew in each refill. The defaults are the original's, which takes all members instead of the elites, and
    draws new start states until enough transitions are stored.

    :param step_quantile: from 0 to 1
    :param budget_quantile: from 0 to 1
    :param horizon: steps that a branch can make at its best
    """

    step_quantile: float = 0.9999
    budget_quantile: float = 0.01
    horizon: int = 100

    def __post_init__(self) -> None:
        for name in ("step_quantile", "budget_quantile"):
            number(0, 1).check(f"Infoprop: {name}", getattr(self, name))
        whole(1).check("Infoprop: horizon", self.horizon)

    def begin(self, mean: th.Tensor, var: th.Tensor, memory: list[float]) -> tuple[tuple[th.Tensor, th.Tensor], list[float]]:
        """:return: lambda_1 and lambda_2, each ``(1 + obs_dim,)``; nothing to remember"""
        loss = information_loss(information_fusion(mean, var)[2])
        at_once, cheapest = (loss.nanquantile(q, dim=0) for q in (self.step_quantile, self.budget_quantile))
        return (at_once, self.horizon * cheapest), []

    def __call__(self, mean: th.Tensor, var: th.Tensor, rollout_step: RolloutStep) -> FilterResult:
        """See :data:`Rule`; the state is the loss since the start, ``(B, 1 + obs_dim)``."""
        fused_mean, gain, conditional_var = information_fusion(mean, var)
        value, _ = draw(mean, var, rollout_step.generator)
        noise = th.randn(value.shape, generator=rollout_step.generator, device=value.device)
        loss = information_loss(conditional_var)
        total = loss if rollout_step.state is None else rollout_step.state + loss
        at_once, in_all = rollout_step.limits
        certain = ((loss <= at_once) & (total <= in_all)).all(dim=1)
        return FilterResult(fused_mean + gain * (value - fused_mean) + noise * conditional_var.sqrt(), certain, certain, total)


@dataclass(frozen=True)
class M2AC:
    """
    Of the transitions in step h of k, those with the least ``one_vs_rest_kl`` of the drawn member are stored, a share of
    (k - h) / (2 (k + 1)), or half if k = 1; the others' branches go on all the same (Pan et al., 2020).

    Branches are ranked among those that are imagined together (``buffers/rollout_blocks.py``). The original takes all
    members instead of the elites, and counts terminated branches in the share.

    :param alpha: the stored reward is less by alpha times the divergence, in standard deviations of the real rewards
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


#: The rules by the names that ``rollout_filter`` knows.
FILTERS: dict[str, type] = {"macura": Macura, "infoprop": Infoprop, "m2ac": M2AC}


class RolloutFilter:
    """
    A rule at work, in one refill: in the units of the environment outside, in standard deviations of the real data inside, so
    that no unit of an observation matters.

    :param rule: see :data:`Rule`
    :param dynamics: offers ``predict``, see ``DynamicsModel``; if it has ``elites``, only those are asked
    :param transitions: all real transitions
    :param memory: what the rule remembers of earlier refills
    """

    @th.no_grad()
    def __init__(self, rule: Rule, dynamics: DynamicsModel, transitions: ReplayBufferSamples, memory: list[float]) -> None:
        self.rule, self.dynamics = rule, dynamics
        #: Finite predictions that the rule left out so far.
        self.left_out = 0
        obs, actions, next_obs, _, rewards = transitions[:5]
        scale = Standardizer(1 + obs.shape[1], constant_std=1e-3).to(obs.device)
        scale.fit(th.cat([rewards, next_obs - obs], dim=1))
        self.std = scale.std
        values = th.cat([rewards, next_obs], dim=1).double()
        # Members differ there by float32's rounding, which no unit of the data tells from a disagreement.
        constant = values.std(dim=0, correction=0) <= ROUNDING * values.abs().amax(dim=0)
        # Asked here: within a rollout, a GPU would have to be waited for.
        self.constant = constant if constant.any() else None
        self.limits: Any = None
        #: What the rule will remember.
        self.memory: list[float] = []
        begin = getattr(rule, "begin", None)
        if begin is not None:
            n_rows = min(len(obs), PROBED_ROWS)
            # At even distances in age: nothing is drawn.
            rows = th.arange(n_rows, device=obs.device) * len(obs) // n_rows
            self.limits, self.memory = begin(*self.predict(obs[rows], actions[rows]), memory)

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: mean and variance as :data:`Rule` has them"""
        mean, var = self.dynamics.predict(obs, actions)
        if (elites := getattr(self.dynamics, "elites", None)) is not None:
            mean, var = mean[elites], var[elites]
        change = th.cat([mean[..., :1], mean[..., 1:] - obs], dim=-1)
        if self.constant is not None:
            change, var = (th.where(self.constant, part.mean(dim=0), part) for part in (change, var))
        return change / self.std, (var / self.std / self.std).clamp(min=LEAST_VARIANCE)

    def __call__(self, obs: th.Tensor, actions: th.Tensor, step: int, length: int, state: th.Tensor | None) -> FilterResult:
        """
        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :param step: see :class:`RolloutStep`, and so ``length`` and ``state``
        :return: with the reward, the next observation and the penalty in the environment's units; what is not finite counts as
            stored, for :func:`.rollouts.branched_rollout` to drop
        """
        rollout_step = RolloutStep(step, length, self.limits, state, self.dynamics.generator)
        filtered = self.rule(*self.predict(obs, actions), rollout_step)
        drawn = filtered.prediction * self.std
        prediction = th.cat([drawn[:, :1], obs + drawn[:, 1:]], dim=1)
        broken = ~prediction.isfinite().all(dim=1)
        self.left_out += int((~filtered.keep & ~broken).sum())
        penalty = None if filtered.penalty is None else filtered.penalty * self.std[0]
        return FilterResult(prediction, filtered.keep | broken, filtered.proceed | broken, filtered.state, penalty)
