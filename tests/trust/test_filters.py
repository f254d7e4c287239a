import math

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tiny import FAST, equal_agents

from sb3_mbpo import MBPO, MBTD3, DynamicsModel
from sb3_mbpo.dynamics.base import KnownReward
from sb3_mbpo.rollouts import branched_rollout
from sb3_mbpo.trust.disagreement import geometric_jsd, information_fusion, information_loss, one_vs_rest_kl
from sb3_mbpo.trust.filters import FILTERS, M2AC, FilterResult, Infoprop, Macura, RolloutFilter, RolloutStep
from sb3_mbpo.trust.prediction_bounds import PredictionBounds
from sb3_mbpo.variants import MBTQC, MBCrossQ

RULES = list(FILTERS)


def rollout_step(step=0, length=1, limits=None, state=None, seed=0):
    return RolloutStep(step, length, limits, state, th.Generator().manual_seed(seed))


def spread(disagreement, members=3):
    """Members with variance 1 whose means lie so far apart, ``(members, B, 2)``."""
    steps = th.linspace(-1, 1, members).reshape(-1, 1, 1)
    mean = (steps * th.as_tensor(disagreement).reshape(1, -1, 1)).expand(-1, -1, 2)
    return mean, th.ones_like(mean)


# ---------------------------------------------------------------------- rules


def test_macura_cuts_at_the_running_mean_of_a_percentile():
    memory, expected = [], []
    for round_, largest in enumerate([1.0, 3.0, 0.5], start=1):
        mean, var = spread(th.linspace(0, largest, 101))
        expected.append(2 * np.percentile(geometric_jsd(mean, var), 90))
        kappa, memory = Macura(xi=2.0, zeta=90).begin(mean, var, memory)
        assert kappa == pytest.approx(np.mean(expected), rel=1e-5) and memory == [kappa, round_]
    mean, var = spread(th.linspace(0, 3, 50))
    filtered = Macura()(mean, var, rollout_step(limits=kappa))
    certain = geometric_jsd(mean, var) < kappa
    assert th.equal(filtered.keep, certain) and th.equal(filtered.proceed, certain) and 0 < certain.sum() < 50


def test_macura_forgets_after_its_window():
    memory = []
    for largest in [1.0, 1.0, 5.0]:
        kappa, memory = Macura(window=2).begin(*spread([largest] * 3), memory)
    one, five = (geometric_jsd(*spread([largest])).item() for largest in (1.0, 5.0))
    assert kappa == pytest.approx((one + five) / 2, rel=1e-5) and memory[1] == 2


def test_macura_learns_nothing_from_a_broken_model():
    mean, var = spread([1.0, 2.0])
    kappa, memory = Macura().begin(mean * math.nan, var, [])
    assert memory == [0, 0] and not Macura()(mean, var, rollout_step(limits=kappa)).keep.any()
    healthy = Macura().begin(mean, var, [])
    assert Macura().begin(mean * math.nan, var, healthy[1]) == healthy
    # One bad row among good ones is no reason to know nothing.
    one_broken = mean.clone()
    one_broken[:, 0] = math.nan
    assert Macura(zeta=0).begin(one_broken, var, [])[0] == pytest.approx(geometric_jsd(mean, var)[1].item())


def test_infoprop_limits_are_quantiles_of_each_dimension():
    generator = th.Generator().manual_seed(0)
    mean, var = th.randn(3, 500, 2, generator=generator), th.rand(3, 500, 2, generator=generator) + 0.1
    loss = information_loss(information_fusion(mean, var)[2]).numpy()
    (at_once, in_all), memory = Infoprop(0.9, 0.2, 7).begin(mean, var, [])
    assert memory == []
    np.testing.assert_allclose(at_once, np.quantile(loss, 0.9, axis=0), rtol=1e-5)
    np.testing.assert_allclose(in_all, 7 * np.quantile(loss, 0.2, axis=0), rtol=1e-5)


def test_infoprop_is_not_blinded_by_one_broken_row():
    mean, var = spread(th.linspace(0, 3, 50))
    expected = Infoprop().begin(mean[:, 1:], var[:, 1:], [])
    mean = mean.clone()
    mean[:, 0] = math.nan
    for ours, theirs in zip(Infoprop().begin(mean, var, [])[0], expected[0], strict=True):
        assert th.equal(ours, theirs)


def test_infoprop_cuts_at_once_or_in_all():
    mean, var = spread([1.0, 10.0])
    loss = information_loss(information_fusion(mean, var)[2])
    rule, none = Infoprop(), th.full((2,), math.inf)
    between = loss.mean(dim=0)
    assert rule(mean, var, rollout_step(limits=(none, none))).keep.tolist() == [True, True]
    assert rule(mean, var, rollout_step(limits=(between, none))).keep.tolist() == [True, False]
    first = rule(mean, var, rollout_step(limits=(none, between)))
    assert first.keep.tolist() == [True, False] and th.equal(first.state, loss)
    second = rule(mean, var, rollout_step(step=1, limits=(none, 2 * between), state=first.state))
    assert th.equal(second.state, 2 * loss) and second.proceed.tolist() == [True, False]
    # One dimension is enough.
    assert rule(mean, var, rollout_step(limits=(th.tensor([math.inf, 0.0]), none))).keep.tolist() == [False, False]


def test_infoprop_draws_what_the_members_have_in_common():
    """The mean mu and, over all draws of members, the variance K^2 (S + S_epi) + (1 - K) S = S."""
    mean = th.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1).expand(3, 100_000, 1)
    var = th.full_like(mean, 0.5)
    limits = (th.tensor([math.inf]),) * 2
    values = Infoprop()(mean, var, rollout_step(limits=limits)).prediction
    assert values.mean().item() == pytest.approx(0, abs=0.01) and values.var().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(("length", "shares"), [(1, [0.5]), (10, [10 / 22, 9 / 22, 8 / 22]), (2, [2 / 6, 1 / 6])])
def test_m2ac_stores_the_most_certain_and_stops_nobody(length, shares):
    mean, var = spread(th.linspace(0, 5, 66).flip(0))
    for step, share in enumerate(shares):
        filtered = M2AC()(mean, var, rollout_step(step, length))
        assert filtered.proceed.all() and filtered.keep.sum() == math.ceil(share * 66 - 1e-9)
    chosen = th.randint(3, (66,), generator=th.Generator().manual_seed(0))
    uncertainty = one_vs_rest_kl(mean, var, chosen)
    assert uncertainty[filtered.keep].max() <= uncertainty[~filtered.keep].min()


def test_m2acs_penalty_is_that_of_the_drawn_member():
    mean, var = spread(th.linspace(0, 5, 20))
    plain, dear = (M2AC(alpha)(mean, var, rollout_step()) for alpha in (0.0, 0.5))
    chosen = th.randint(3, (20,), generator=th.Generator().manual_seed(0))
    th.testing.assert_close(dear.penalty, 0.5 * one_vs_rest_kl(mean, var, chosen))
    assert th.equal(plain.prediction, dear.prediction) and not plain.penalty.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Macura(xi=-1), "Macura: xi=-1 must be"),
        (lambda: Macura(zeta=101), "Macura: zeta=101"),
        (lambda: Macura(window=0), "Macura: window=0"),
        (lambda: Infoprop(step_quantile=2), "Infoprop: step_quantile=2"),
        (lambda: Infoprop(budget_quantile=math.nan), "Infoprop: budget_quantile=nan"),
        (lambda: Infoprop(horizon=1.5), "Infoprop: horizon=1.5"),  # type: ignore[arg-type]
        (lambda: M2AC(alpha="much"), "M2AC: alpha='much'"),  # type: ignore[arg-type]
    ],
)
def test_refused_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- at work


class Members(DynamicsModel):
    """
    Three members over one observation: it grows by the action, in units of ``scale`` and from ``origin``; the disagreement is
    as large as the observation is far from the origin. The reward is the change.
    """

    def __init__(self, scale=1.0, origin=0.0):
        super().__init__(1, 1, seed=0)
        self.scale, self.origin = scale, origin

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        raise AssertionError("a filter goes by predict")

    def predict(self, obs, actions):
        step = self.scale * (actions + th.tensor([-0.1, 0.0, 0.1]).reshape(3, 1, 1) * (obs - self.origin) / self.scale)
        return th.cat([step, obs + step], dim=-1), (1e-2 * self.scale) ** 2 * th.ones(3, len(obs), 2)


def real(dynamics, n=200):
    """Transitions of that system, at -1 to 1 units from the origin."""
    obs = dynamics.origin + dynamics.scale * th.linspace(-1, 1, n).unsqueeze(1)
    actions = th.linspace(1, -1, n).unsqueeze(1)
    return ReplayBufferSamples(obs, actions, obs + dynamics.scale * actions, th.zeros(n, 1), dynamics.scale * actions)


def never(obs, actions, next_obs):
    return th.zeros(len(obs), dtype=th.bool)


def ones(obs):
    return th.ones_like(obs)


def rolled(rule, dynamics, start, length=4, termination=never, policy=ones, wrap=lambda dynamics: dynamics):
    rollout_filter = RolloutFilter(rule, dynamics, real(dynamics), [])
    return branched_rollout(wrap(dynamics), policy, termination, start, length, rollout_filter), rollout_filter


@pytest.mark.parametrize("name", RULES)
def test_no_unit_matters(name):
    """The same system in other units: the same rows are stored, with the same numbers in those units."""
    results = []
    for scale, origin in [(1.0, 0.0), (1e-3, 0.0), (512.0, 1024.0)]:
        dynamics = Members(scale, origin)
        start = origin + scale * th.linspace(-1, 1, 64).unsqueeze(1)
        data, rollout_filter = rolled(FILTERS[name](), dynamics, start)
        results.append((data.rewards / scale, (data.next_observations - origin) / scale, rollout_filter.left_out))
    assert 0 < results[0][2]
    for rewards, next_obs, left_out in results[1:]:
        assert left_out == results[0][2]
        th.testing.assert_close(rewards, results[0][0], rtol=1e-3, atol=1e-3)
        th.testing.assert_close(next_obs, results[0][1], rtol=1e-3, atol=1e-3)


def test_only_elites_are_asked():
    class WithElites(Members):
        elites = th.tensor([2, 0])

        def predict(self, obs, actions):
            mean, var = super().predict(obs, actions)
            mean[1] = th.nan
            return mean, var

    dynamics = WithElites()
    rollout_filter = RolloutFilter(Macura(), dynamics, real(dynamics), [])
    mean, var = rollout_filter.predict(th.ones(5, 1), th.ones(5, 1))
    assert len(mean) == len(var) == 2 and mean.isfinite().all() and rollout_filter.limits > 0


def test_a_rule_sees_changes_in_standard_deviations_of_the_real_data():
    dynamics = Members(scale=8.0, origin=16.0)
    transitions = real(dynamics)
    std = [part.std(correction=0) for part in (transitions.rewards, transitions.next_observations - transitions.observations)]
    mean, var = RolloutFilter(M2AC(), dynamics, transitions, []).predict(th.tensor([[16.0]]), th.tensor([[0.5]]))
    th.testing.assert_close(mean[1, 0], th.stack([4.0 / one for one in std]))
    th.testing.assert_close(var[1, 0], th.stack([0.08**2 / one**2 for one in std]))


class WithConstant(Members):
    """A second dimension, always 1000, about which the members differ by rounding only, and are not equally sure."""

    def predict(self, obs, actions):
        mean, var = super().predict(obs[:, :1], actions)
        last = obs[:, 1:] + 4e-5 * th.tensor([-1.0, 0, 1]).reshape(3, 1, 1) * (obs[:, :1] > 0)
        return th.cat([mean, last], dim=-1), th.cat([var, 1e-6 * (1 + 10 * (last - 1000).abs() * 1e4)], dim=-1)


@pytest.mark.parametrize("name", RULES)
def test_a_constant_dimension_cuts_nothing(name):
    def beside(obs):
        return th.cat([obs, th.full_like(obs, 1000)], dim=1)

    start, action, data = th.linspace(-1, 1, 64).unsqueeze(1), th.zeros(64, 1), real(Members())
    more = data._replace(observations=beside(data.observations), next_observations=beside(data.next_observations))
    without = RolloutFilter(FILTERS[name](), Members(), data, [])(start, action, 0, 4, None).keep
    assert th.equal(RolloutFilter(FILTERS[name](), WithConstant(), more, [])(beside(start), action, 0, 4, None).keep, without)
    assert without.any()


@pytest.mark.parametrize("name", RULES)
def test_members_that_are_sure_of_themselves(name):
    """Known physics: no variance, and no disagreement."""

    class Sure(Members):
        def predict(self, obs, actions):
            mean, var = super().predict(obs, actions)
            return mean[1:2].expand(2, -1, -1), 0 * var[:2]

    data, _ = rolled(FILTERS[name](), Sure(), th.zeros(4, 1), length=2)
    assert all(part.isfinite().all() for part in data[:5])


def test_nothing_is_drawn_but_from_the_dynamics_generator():
    results = []
    for seed in (0, 0, 1):
        dynamics = Members()
        dynamics.seed(seed)
        before = th.get_rng_state()
        results.append(rolled(Infoprop(), dynamics, th.linspace(-1, 1, 8).unsqueeze(1))[0].next_observations)
        assert th.equal(th.get_rng_state(), before)
    assert th.equal(results[0], results[1]) and not th.equal(results[0], results[2])


# ---------------------------------------------------------------------- in branched rollouts


def middle(mean, var, rollout_step):
    """The middle member, and the start's number as state: cuts where the reward is beyond 1.5 standard deviations."""
    state = th.arange(mean.shape[1]) if rollout_step.state is None else rollout_step.state
    seen.append((rollout_step.step, rollout_step.length, state.tolist()))
    certain = mean[1, :, 0].abs() < 1.5
    return FilterResult(mean[1], certain, certain, state)


seen: list = []


def test_a_cut_transition_is_not_stored_and_ends_its_branch():
    """Actions are the observation: 0.25 -> 0.5 -> 1 is cut before the step from 1; the state follows its branch."""
    seen.clear()
    data, rollout_filter = rolled(
        middle, Members(), th.tensor([[1.0], [0.25], [0.5], [0.0]]), length=3, policy=lambda obs: obs
    )
    assert data.observations.flatten().tolist() == [0.25, 0.5, 0.0, 0.5, 0.0, 0.0]
    th.testing.assert_close(data.next_observations.flatten(), th.tensor([0.5, 1.0, 0.0, 1.0, 0.0, 0.0]))
    assert seen == [(0, 3, [0, 1, 2, 3]), (1, 3, [1, 2, 3]), (2, 3, [1, 3])] and rollout_filter.left_out == 3


def test_a_rule_may_leave_out_a_transition_and_go_on():
    def every_second(mean, var, rollout_step):
        return FilterResult(
            mean[1], th.full(mean.shape[1:2], rollout_step.step % 2 == 0), th.ones(mean.shape[1], dtype=th.bool)
        )

    data, rollout_filter = rolled(every_second, Members(), th.tensor([[0.0], [0.5]]), length=4)
    th.testing.assert_close(data.observations.flatten(), th.tensor([0.0, 0.5, 2.0, 2.5]))
    assert rollout_filter.left_out == 4


def test_terminations_with_a_rule():
    """A terminal transition is stored where the rule stores it, and ends its branch all the same."""

    def beyond_one(obs, actions, next_obs):
        return next_obs[:, 0] > 0.9

    data, _ = rolled(middle, Members(), th.tensor([[0.25], [0.0]]), 5, beyond_one, policy=lambda obs: obs)
    assert data.observations.flatten().tolist() == [0.25, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert data.dones.flatten().tolist() == [0, 0, 1, 0, 0, 0, 0]

    def stores_none(mean, var, rollout_step):
        return FilterResult(mean[1], th.zeros(mean.shape[1], dtype=th.bool), th.ones(mean.shape[1], dtype=th.bool))

    data, rollout_filter = rolled(stores_none, Members(), th.tensor([[0.25], [0.5]]), 5, beyond_one)
    assert len(data.rewards) == 0 and [part.shape[1] for part in data[:5]] == [1] * 5 and rollout_filter.left_out == 2


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_is_dropped_and_not_counted_as_filtered(name):
    class Breaks(Members):
        def predict(self, obs, actions):
            mean, var = super().predict(obs, actions)
            mean[:, obs[:, 0] > 10] = th.nan
            return mean, var

    data, rollout_filter = rolled(FILTERS[name](), Breaks(), th.tensor([[0.0], [99.0], [99.0]]), length=1)
    assert data.observations.flatten().tolist() == [0.0] * (1 - rollout_filter.left_out) and rollout_filter.left_out <= 1


def test_bounds_a_known_reward_and_the_penalty_hold_together():
    rewards = {}
    for alpha in (0.0, 100.0):
        dynamics = Members()
        bounds = PredictionBounds(real(dynamics), 0)
        data, _ = rolled(
            M2AC(alpha=alpha),
            dynamics,
            th.linspace(-1, 1, 40).unsqueeze(1),
            wrap=lambda inner, of=bounds: of.wrap(KnownReward(inner, lambda obs, actions, next_obs: 7 * next_obs[:, 0])),
        )
        assert data.next_observations.max() == 1 and bounds.clipped > 0
        rewards[alpha] = data.rewards
        missing = 7 * data.next_observations - data.rewards
        assert (missing > 0).all() if alpha else not missing.any()
    # The members disagree, and by as much in each run: the penalty is in proportion to alpha.
    assert len(rewards[0.0]) == len(rewards[100.0])


def test_rollouts_that_come_out_empty():
    def cuts_all(mean, var, rollout_step):
        none = th.zeros(mean.shape[1], dtype=th.bool)
        return FilterResult(mean[0], none, none)

    data, rollout_filter = rolled(cuts_all, Members(), th.zeros(5, 1))
    assert len(data.rewards) == 0 and [part.shape[1] for part in data[:5]] == [1] * 5 and rollout_filter.left_out == 5


# ---------------------------------------------------------------------- in an agent


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cls", [MBPO, MBTD3, MBTQC, MBCrossQ])
def test_all_algorithms_learn_with_all_rules(cls, name):
    agent = cls("MlpPolicy", "Pendulum-v1", rollout_filter=name, rollout_schedule=3, **FAST).learn(40)
    values = agent.logger.name_to_value
    rows = len(agent.replay_buffer.model_buffer)
    assert 0 <= values["dynamics/filtered"] < 1 and values["dynamics/branch_length"] == rows / 30 > 0
    assert values["dynamics/dropped"] == 0 and agent._n_updates == 40


def test_the_length_of_branches_is_logged_without_a_rule_too():
    agent = MBPO("MlpPolicy", "Pendulum-v1", rollout_schedule=3, **FAST).learn(25)
    values = agent.logger.name_to_value
    assert values["dynamics/branch_length"] == 3 and "dynamics/filtered" not in values and agent.filter_state == []


def settings(**kwargs):
    return {**FAST, "rollout_schedule": 2, "model_train_freq": 10, **kwargs}


def test_forms_of_a_rule():
    """By name, as an object, by the dotted name of its class or of an object."""
    forms = ["macura", Macura(), "sb3_mbpo.trust.filters.Macura", Macura]
    agents = [MBPO("MlpPolicy", "Pendulum-v1", **settings(rollout_filter=form)).learn(40) for form in forms]
    assert all(equal_agents(agents[0], other) for other in agents[1:])
    assert agents[0].filter_state[1] == 3 and all(a.filter_state == agents[0].filter_state for a in agents)


def test_construction_draws_nothing():
    agents = [MBPO("MlpPolicy", "Pendulum-v1", **settings(rollout_filter=form)) for form in (None, "infoprop")]
    states = [agent.dynamics.generator.get_state() for agent in agents]
    assert th.equal(*states) and equal_agents(*agents)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("form", ["macura", Macura(zeta=80)], ids=["name", "object"])
def test_saved_and_loaded_with_its_memory(tmp_path, form, safe):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **settings(rollout_filter=form)).learn(40)
    agent.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", safe=safe)
    assert loaded.rollout_filter == form and loaded.filter_state == agent.filter_state and len(agent.filter_state) == 2
    assert MBPO.load(tmp_path / "agent", safe=safe, rollout_filter=None).rollout_filter is None
    other = MBPO.load(tmp_path / "agent", env=agent.get_env(), safe=safe, rollout_filter="infoprop")
    agent.save_replay_buffer(tmp_path / "buffer")
    other.load_replay_buffer(tmp_path / "buffer")
    assert other.learn(25).filter_state == [] and not hasattr(agent.to_sac(), "filter_state")


def test_everything_left_out_means_real_batches():
    def cuts_all(mean, var, rollout_step):
        none = th.zeros(mean.shape[1], dtype=th.bool)
        return FilterResult(mean[0], none, none)

    agent = MBPO("MlpPolicy", "Pendulum-v1", **settings(rollout_filter=cuts_all)).learn(40)
    values = agent.logger.name_to_value
    assert values["dynamics/filtered"] == 1 and values["dynamics/branch_length"] == 0 and values["dynamics/dropped"] == 0
    assert values["dynamics/real_share"] == 1 and agent._n_updates == 40


def test_memory_that_runs_out_in_a_filtered_rollout(monkeypatch):
    """What was left out of a block that is imagined anew is not taken for dropped."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **settings(rollout_filter="m2ac"))
    predict, calls = agent.dynamics.predict, []

    def cramped(obs, actions):
        calls.append(len(obs))
        if len(obs) == 30 and calls.count(30) == 2:
            raise th.OutOfMemoryError("CUDA out of memory")
        return predict(obs, actions)

    monkeypatch.setattr(agent.dynamics, "predict", cramped)
    with pytest.warns(UserWarning, match="from now on 15 are imagined"):
        agent.learn(21)
    # A fit may ask for predictions as well, of fewer rows.
    assert calls[calls.index(30) :] == [30, 30, 15, 15, 15, 15]
    assert agent.logger.name_to_value["dynamics/dropped"] == 0
