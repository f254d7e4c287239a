"""DHMBPO: its formulas against brute force, its gradients against finite differences, and what it promises SB3's users."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy
from true_systems import TruePendulum

from sb3_mbpo import MBPO
from sb3_mbpo.dhmbpo import DHMBPO, DHMBPOPolicy
from sb3_mbpo.dhmbpo.policies import BoundedCritic, StandardizeExtractor
from sb3_mbpo.dhmbpo.training_rollout import training_rollout
from sb3_mbpo.dhmbpo.value_expansion import expanded_values, value_bounds, with_values_of_ends
from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.filters import FilterResult

FAST = {
    "learning_starts": 20,
    "batch_size": 16,
    "rollout_schedule": 3,
    "rollout_batch_size": 8,
    "retained_rollouts": 3,
    "dynamics_kwargs": {"n_members": 3, "n_elites": 2, "net_arch": [8], "max_updates": 20},
    "policy_kwargs": {"net_arch": [16, 16]},
    # Of a few rows, little is explained.
    "min_explained_variance": None,
    "device": "cpu",
    "seed": 0,
}


def agent(env="Pendulum-v1", **kwargs) -> DHMBPO:
    own = {"dynamics_kwargs": None} if "dynamics_class" in kwargs else {}
    return DHMBPO("MlpPolicy", env, **{**FAST, **own, **kwargs})


class Linear(DynamicsModel):
    """next_obs = A obs + B action, reward = -|obs|^2 - |action|^2 / 2 + sum(next_obs)."""

    def __init__(self, obs_dim, action_dim, *, seed=None, device="cpu"):
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        draw = th.Generator().manual_seed(3)
        self.a = 0.5 * th.randn(obs_dim, obs_dim, generator=draw, dtype=th.float64)
        self.b = th.randn(action_dim, obs_dim, generator=draw, dtype=th.float64)

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        next_obs = obs @ self.a.to(obs) + actions @ self.b.to(obs)
        return next_obs, -obs.square().sum(dim=1) - 0.5 * actions.square().sum(dim=1) + next_obs.sum(dim=1)


class Normalizing(BaseFeaturesExtractor):
    """With statistics that training changes."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.norm = th.nn.BatchNorm1d(3)

    def forward(self, observations):
        return self.norm(observations)


def never(obs, actions, next_obs):
    return th.zeros(len(obs), dtype=th.bool)


# ---------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("root_entropy", [True, False])
def test_expanded_values_by_hand(horizon, root_entropy):
    draw = th.Generator().manual_seed(0)
    rewards, log_probs = (th.randn(n, 4, generator=draw, dtype=th.float64) for n in (horizon, horizon + 1))
    alive = (th.rand(horizon + 1, 4, generator=draw) < 0.7).double().cumprod(dim=0)
    alive[0] = 1
    last, gamma, alpha = th.randn(4, generator=draw, dtype=th.float64), 0.9, 0.3
    expected = []
    for row in range(4):
        value = 0.0
        for h in range(horizon):
            entropy = -alpha * log_probs[h, row].item() if h > 0 or root_entropy else 0.0
            value += gamma**h * alive[h, row].item() * (rewards[h, row].item() + entropy)
        value += gamma**horizon * alive[horizon, row].item() * (last[row].item() - alpha * log_probs[horizon, row].item())
        expected.append(value)
    values = expanded_values(rewards, log_probs, alive, last, gamma, alpha, root_entropy)
    assert values.tolist() == pytest.approx(expected, rel=1e-12)


def test_an_end_cuts_rewards_entropies_and_values():
    rewards, log_probs, last = th.tensor([[2.0], [100.0]]), th.tensor([[0.0], [100.0], [100.0]]), th.tensor([100.0])
    alive = th.tensor([[1.0], [0.0], [0.0]])
    assert expanded_values(rewards, log_probs, alive, last, 0.9, 0.5, root_entropy=True).item() == 2.0


def test_the_value_of_the_last_state_stands_for_the_reward_that_ends():
    rewards = th.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    alive = th.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    values = th.tensor([10.0, 20.0, 30.0])
    assert with_values_of_ends(rewards, alive, values).tolist() == [[10.0, 2.0, 3.0], [4.0, 20.0, 6.0]]


def test_value_bounds():
    soft_rewards = th.linspace(1, 101, 101).reshape(101, 1)
    low, high = value_bounds(soft_rewards, th.ones(101, 1), (0.01, 0.99), 0.9)
    # A mean beyond the quantile: what is rare comes again and again.
    rare = th.cat([th.zeros(995, 1), th.ones(5, 1)])
    assert value_bounds(rare, th.ones(1000, 1), (0.01, 0.99), 0.9)[1].item() == pytest.approx(0.05)
    # The worst that happens is the end of the episode, worth 0.
    assert low.item() == 0 and high.item() == pytest.approx(1000.0)
    low, high = value_bounds(-soft_rewards, th.ones(101, 1), (0.01, 0.99), 0.9)
    assert low.item() == pytest.approx(-1000.0) and high.item() == 0
    alive = (soft_rewards < 50.5).float()
    assert value_bounds(soft_rewards, alive, (0.0, 1.0), 0.5)[1].item() == pytest.approx(100.0)


# ---------------------------------------------------------------------- training rollouts


def test_a_training_rollout_follows_the_policy_and_stops_where_an_episode_ends():
    dynamics = Linear(2, 1)
    policy = lambda obs: (0.1 * obs[:, :1], obs.sum(dim=1))  # noqa: E731
    ends = lambda obs, actions, next_obs: next_obs[:, 0] > 1  # noqa: E731
    start = th.tensor([[0.1, 0.2], [4.0, -3.0], [-0.5, 0.3]], dtype=th.float64)
    rollout = training_rollout(dynamics, policy, ends, start, 4)
    assert [part.shape[0] for part in rollout[:5]] == [5, 5, 5, 4, 5] and (rollout.alive[0] == 1).all() and rollout.valid.all()
    for row in range(3):
        obs, alive = start[row : row + 1], True
        for h in range(4):
            next_obs, reward = dynamics.sample(obs, policy(obs)[0])
            assert rollout.rewards[h, row].item() == pytest.approx(reward.item() if alive else 0.0)
            if alive:
                obs, alive = next_obs, not bool(next_obs[0, 0] > 1)
            assert rollout.alive[h + 1, row].item() == alive
            assert th.allclose(rollout.obs[h + 1, row], obs[0])
    assert rollout.alive[-1].tolist().count(0.0) >= 1


def test_what_is_not_finite_ends_a_branch_and_leaves_the_gradient_finite():
    class Breaks(Linear):
        def sample(self, obs, actions):
            next_obs, rewards = super().sample(obs, actions)
            return next_obs / (obs[:, :1] != 7), rewards

    weight = th.tensor(0.1, dtype=th.float64, requires_grad=True)
    start = th.tensor([[7.0, 0.0], [1.0, 0.0]], dtype=th.float64)
    rollout = training_rollout(Breaks(2, 1), lambda obs: (weight * obs[:, :1], obs[:, 0]), never, start, 3)
    assert rollout.alive[:, 0].tolist() == [1, 0, 0, 0] and rollout.alive[:, 1].tolist() == [1, 1, 1, 1]
    # No end, of which the value would be known to be 0: the branch is to be left out.
    assert rollout.valid.tolist() == [False, True] and rollout.of(rollout.valid).rewards.shape == (3, 1)
    (gradient,) = th.autograd.grad(rollout.rewards.sum(), weight)
    assert gradient.isfinite() and gradient != 0


@pytest.fixture
def in_double(monkeypatch):
    """Makes an agent compute in float64; SB3 would make float32 of every observation."""
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda obs, *args, **kwargs: obs)

    def make(model: DHMBPO) -> DHMBPO:
        model.policy.double()
        return model

    return make


@pytest.mark.parametrize("ending", [False, True])
def test_the_actors_gradient_is_a_finite_difference_through_the_system(in_double, ending):
    """Of the whole objective: rewards, entropies and the last values, by one weight of the actor after the other."""
    ends = (lambda obs, actions, next_obs: next_obs[:, 0] > 0.3) if ending else never
    model = in_double(agent(dynamics_class=Linear, reward_fn=None, termination_fn="never"))
    for network in (model.critic, model.critic_target):
        for body in network.q_networks:
            th.nn.init.normal_(body[-1].weight, std=0.3, generator=th.Generator().manual_seed(1))
    roots = th.randn(6, 3, generator=th.Generator().manual_seed(2), dtype=th.float64)
    dynamics = model.imagined_dynamics

    def objective() -> th.Tensor:
        th.manual_seed(5)
        rollout = training_rollout(dynamics, model._action_and_log_prob, ends, roots, 4)
        assert (0 < rollout.alive[-1].sum() < 6) == ending
        return model.actor_objective(rollout, 0.2)

    parameters = [model.actor.mu.weight, model.actor.log_std.bias, model.actor.latent_pi[0].weight]
    gradients = th.autograd.grad(objective(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for place in (0, parameter.numel() // 2):
            flat, step = parameter.data.view(-1), 1e-6
            before = flat[place].item()
            flat[place] = before + step
            above = objective().item()
            flat[place] = before - step
            below = objective().item()
            flat[place] = before
            assert gradient.view(-1)[place].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)
            assert gradient.view(-1)[place] != 0


def test_where_every_branch_ends_at_once_the_actor_climbs_sacs_objective(in_double):
    """Q - alpha log pi at the roots. A reward that ends has no gradient here, and the actor would see entropy alone."""
    model = in_double(agent(dynamics_class=Linear))
    for body in model.critic.q_networks:
        th.nn.init.normal_(body[-1].weight, std=0.3, generator=th.Generator().manual_seed(1))
    roots = th.randn(6, 3, generator=th.Generator().manual_seed(2), dtype=th.float64)
    at_once = lambda obs, actions, next_obs: th.ones(len(obs), dtype=th.bool)  # noqa: E731
    flat = lambda obs, actions, next_obs, ended: 0 * obs[:, 0]  # noqa: E731
    th.manual_seed(5)
    rollout = training_rollout(model.imagined_dynamics, model._action_and_log_prob, at_once, roots, 3, flat)
    assert not rollout.alive[1:].any()
    values = th.cat(model.critic(roots, rollout.actions[0]), dim=1).mean(dim=1)
    sacs = (values - 0.2 * rollout.log_probs[0]).mean()
    parameters = list(model.actor.parameters())
    ours, theirs = (
        th.autograd.grad(objective, parameters, retain_graph=True) for objective in (model.actor_objective(rollout, 0.2), sacs)
    )
    assert all(th.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))
    (by_value,) = th.autograd.grad(values.mean(), [model.actor.mu.weight])
    assert by_value.any()


def test_values_have_a_gradient_by_the_state():
    """At a fixed action: SB3 cuts it where actor and critic share their features."""
    model = agent()
    for body in model.critic.q_networks:
        th.nn.init.normal_(body[-1].weight)
    obs = th.zeros(1, 3, requires_grad=True)
    (gradient,) = th.autograd.grad(model.critic(obs, th.zeros(1, 1))[0].sum(), obs)
    assert (gradient != 0).all()
    with pytest.raises(ValueError, match="share_features_extractor must be False"):
        agent(policy_kwargs={"share_features_extractor": True})


def test_with_one_step_the_target_is_sacs(in_double):
    """r + gamma (1 - done) (min Q(s', a') - alpha log pi(a' | s')), with the transition of the true system."""
    model = in_double(agent(dynamics_class=Linear, termination_fn=lambda obs, actions, next_obs: next_obs[:, 0] > 0.3))
    for body in model.critic_target.q_networks:
        th.nn.init.normal_(body[-1].weight, std=0.3)
    roots = th.randn(8, 3, generator=th.Generator().manual_seed(2), dtype=th.float64)
    rollout = training_rollout(model.imagined_dynamics, model._action_and_log_prob, model.terminates, roots, 1)
    last = th.cat(model.critic_target(rollout.obs[1], rollout.actions[1]), dim=1).amin(dim=1)
    ours = expanded_values(rollout.rewards, rollout.log_probs, rollout.alive, last, 0.99, 0.2, root_entropy=False)
    next_obs, rewards = model.imagined_dynamics.sample(roots, rollout.actions[0])
    done = (next_obs[:, 0] > 0.3).double()
    assert 0 < done.sum() < 8
    next_values = th.cat(model.critic_target(next_obs, rollout.actions[1]), dim=1).amin(dim=1)
    sacs = rewards + (1 - done) * 0.99 * (next_values - 0.2 * rollout.log_probs[1])
    # A branch that ended stays where it was, so its last value is another; it does not count.
    assert th.allclose(ours, sacs, rtol=1e-12)


def test_an_update_changes_what_it_should_and_nothing_else():
    model = agent().learn(21)
    before = {name: copy.deepcopy(getattr(model, name).state_dict()) for name in ("dynamics", "actor", "critic_target")}
    critic = copy.deepcopy(model.critic.state_dict())
    rollout = training_rollout(model.imagined_dynamics, model._action_and_log_prob, never, model._roots(16), 3)
    for parameter in model.dynamics.parameters():
        parameter.grad = None
    model._update_actor(rollout, th.tensor(0.1))
    changed = {
        name: [key for key, value in state.items() if not th.equal(value, getattr(model, name).state_dict()[key])]
        for name, state in {**before, "critic": critic}.items()
    }
    assert changed.pop("actor") and not any(changed.values())
    assert all(parameter.grad is None for parameter in model.dynamics.parameters())


def test_no_gradient_passes_where_a_branch_has_ended():
    """That of a distance is none where a branch stays, which must not reach the others."""
    weight = th.tensor(0.3, dtype=th.float64, requires_grad=True)
    ends = lambda obs, actions, next_obs: obs[:, 0] > 2  # noqa: E731
    distance = lambda obs, actions, next_obs, ended: (next_obs - obs).square().sum(dim=1).sqrt()  # noqa: E731
    start = th.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=th.float64)
    policy = lambda obs: (weight * obs[:, :1], obs[:, 0])  # noqa: E731
    rollout = training_rollout(Linear(2, 1), policy, ends, start, 3, distance)
    assert rollout.alive[:, 0].tolist() == [1, 0, 0, 0] and rollout.valid.all() and (rollout.rewards[1:, 0] == 0).all()
    (gradient,) = th.autograd.grad(rollout.rewards.sum(), weight)
    assert gradient.isfinite() and gradient != 0


def test_a_policy_without_a_gradient_stays_as_it_is():
    model = agent(dynamics_class=Linear, reward_fn=lambda obs, actions, next_obs: (0 * next_obs).square().sum(dim=1).sqrt())
    with pytest.raises(ValueError, match=r"gradient of the policy is not finite.*reward_fn"):
        model.learn(25)
    assert all(parameter.isfinite().all() for parameter in model.actor.parameters())


def test_the_critics_learn_the_expanded_value():
    """r_0 + gamma (r_1 - alpha log pi_1) + gamma^2 (least of two target critics, within the bounds, - alpha log pi_2)."""
    model = agent(dynamics_class=Linear, termination_fn="never", training_horizon=2).learn(21)
    for i, body in enumerate([*model.critic.q_networks, *model.critic_target.q_networks]):
        th.nn.init.normal_(body[-1].weight, std=5.0, generator=th.Generator().manual_seed(i))
    roots = th.randn(8, 3, generator=th.Generator().manual_seed(2))
    rollout = training_rollout(model.dynamics, model._action_and_log_prob, never, roots, 2)
    target = copy.deepcopy(model.critic_target)
    before = th.cat(model.critic(rollout.obs[0], rollout.actions[0]), dim=1).detach()
    np.random.seed(7)
    asked = np.random.permutation(model.critic.n_critics)[:2]
    np.random.seed(7)
    loss, mean = model._update_critics(rollout, th.tensor(0.3))
    with th.no_grad():
        target.move_bounds(model.critic_target.value_low, model.critic_target.value_high, 1.0)
        least = th.cat(target.values_of(asked, rollout.obs[2], rollout.actions[2]), dim=1).amin(dim=1)
        clipped = least.clamp(model.critic_target.value_low, model.critic_target.value_high)
        entropies = -0.3 * rollout.log_probs
        gamma, rewards = model.gamma, rollout.rewards
        expected = rewards[0] + gamma * (rewards[1] + entropies[1]) + gamma**2 * (clipped + entropies[2])
        width = (model.critic.value_high - model.critic.value_low) / 2
        by_hand = (0.5 * ((before - expected.unsqueeze(1)) / width).square().mean(dim=0)).sum()
    assert (clipped != least).any() and mean == pytest.approx(expected.mean().item(), rel=1e-4)
    assert loss == pytest.approx(by_hand.item(), rel=1e-3)


# ---------------------------------------------------------------------- the networks


def test_new_statistics_leave_actions_and_values_as_they_were():
    model = agent()
    policy = model.policy
    assert isinstance(policy, DHMBPOPolicy)
    obs = th.randn(50, 3) * th.tensor([1.0, 2.0, 3.0]) + 1
    policy.adapt(obs, th.zeros(50, 1), trained=False)
    assert th.allclose(policy.actor.features_extractor(obs).std(dim=0, correction=0), th.ones(3), atol=1e-4)
    actions = th.rand(50, 1)
    for body in policy.critic.q_networks:
        th.nn.init.normal_(body[-1].weight)
    before = policy.actor(obs, deterministic=True), th.cat(policy.critic(obs, actions), dim=1)
    policy.adapt(2 * obs - 3, th.zeros(50, 1), trained=True)
    after = policy.actor(obs, deterministic=True), th.cat(policy.critic(obs, actions), dim=1)
    for old, new in zip(before, after, strict=True):
        assert th.allclose(old, new, atol=1e-4)
    extractors = [part.features_extractor for part in (policy.actor, policy.critic, policy.critic_target)]
    assert all(
        isinstance(part, StandardizeExtractor) and th.equal(part.obs_mean, extractors[0].obs_mean) for part in extractors
    )


def test_values_start_in_the_middle_of_their_bounds_and_bounds_move_slowly():
    critic = agent().critic
    assert isinstance(critic, BoundedCritic)
    critic.move_bounds(th.tensor(-10.0), th.tensor(30.0), 0.1)
    assert (critic.value_low, critic.value_high) == (-10, 30)
    assert all(values.tolist() == [[10.0]] for values in critic(th.ones(1, 3), th.ones(1, 1)))
    critic.move_bounds(th.tensor(0.0), th.tensor(40.0), 0.1)
    assert (critic.value_low, critic.value_high) == (-9, 31)
    critic.move_bounds(th.tensor(0.0), th.tensor(0.0), 1.0)
    assert critic.value_high - critic.value_low == 1


def test_one_critic_alone():
    critic = agent().critic
    critic.move_bounds(th.tensor(-10.0), th.tensor(30.0), 0.1)
    obs, actions = th.randn(4, 3), th.rand(4, 1)
    assert th.equal(critic.q1_forward(obs, actions), critic(obs, actions)[0])


def test_networks_that_were_loaded_keep_what_they_learned(tmp_path):
    learned = agent().learn(40)
    learned.to_sac().save(tmp_path / "sac")
    started = agent()
    started.set_parameters(tmp_path / "sac", exact_match=False)
    obs = th.randn(50, 3)
    before = started.actor(obs, deterministic=True)
    assert th.equal(started.policy.average_actor(obs, deterministic=True), before)
    # The first fit of the new agent, on observations of another kind.
    started.policy.adapt(2 * obs + 1, th.zeros(50, 1), trained=False)
    assert th.allclose(started.actor(obs, deterministic=True), before, atol=1e-4)


def test_deterministic_actions_come_from_the_average_of_the_actors_weights():
    """average += rate * (actor - average), rate = max(actor_tau, 10 / (updates before + 1)), at most 1."""

    class Noted(DHMBPO):
        def _average_actor(self, before, updates):
            noted.append((updates, [parameter.detach().clone() for parameter in self.actor.parameters()]))
            super()._average_actor(before, updates)

    noted = []
    model = Noted("MlpPolicy", "Pendulum-v1", actor_tau=0.3, **FAST)
    expected = [parameter.detach().clone() for parameter in model.actor.parameters()]
    model.learn(70)
    assert model.expands_values and len(noted) == 50
    for before, (updates, weights) in enumerate(noted):
        assert updates == 1
        rate = max(0.3, min(1, 10 / (before + 1)))
        expected = [average + rate * (weight - average) for average, weight in zip(expected, weights, strict=True)]
    average = model.policy.average_actor
    # The first fit came before the first update, and no statistics have changed since.
    for parameter, value in zip(average.parameters(), expected, strict=True):
        assert th.allclose(parameter, value, atol=1e-6) and not parameter.requires_grad
    obs = th.randn(30, 3)
    acted = model.policy.scale_action(model.predict(obs.numpy(), deterministic=True)[0])
    assert np.allclose(acted, average(obs, deterministic=True).detach(), atol=1e-5)
    assert not np.allclose(acted, model.actor(obs, deterministic=True).detach(), atol=1e-3)
    th.manual_seed(0)
    sampled = model.predict(obs.numpy())[0]
    th.manual_seed(0)
    assert np.allclose(model.policy.scale_action(sampled), model.actor(obs).detach(), atol=1e-5)


def test_an_average_changes_nothing_of_the_training():
    averaging, plain = (agent(actor_tau=tau).learn(50) for tau in (0.1, 1))
    assert all(th.equal(a, b) for a, b in zip(averaging.actor.parameters(), plain.actor.parameters(), strict=True))


def test_statistics_of_layers_are_those_of_the_actor():
    policy = agent(policy_kwargs={"net_arch": [8], "features_extractor_class": Normalizing}, gradient_steps=3).learn(30).policy
    own, average = policy.actor.features_extractor.norm, policy.average_actor.features_extractor.norm
    assert own.num_batches_tracked > 0 and th.equal(own.running_var, average.running_var)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("saved", "loaded"), [(0.1, 1), (1, 0.1)])
def test_an_agent_is_loaded_with_and_without_an_average(tmp_path, saved, loaded, safe):
    model = agent(actor_tau=saved).learn(30)
    model.save(tmp_path / "agent")
    other = DHMBPO.load(tmp_path / "agent", actor_tau=loaded, safe=safe)
    assert (other.policy.average_actor is None) == (loaded == 1)
    obs = th.randn(20, 3)
    assert th.equal(other.policy.deterministic_actor(obs, True), model.actor(obs, True))


def test_without_an_average_the_actor_acts():
    for model in (agent(actor_tau=1).learn(40), agent(real_ratio=1)):
        assert model.policy.average_actor is None and model.policy.deterministic_actor is model.actor


def test_the_average_goes_where_the_policy_goes(tmp_path):
    model = agent(actor_tau=0.01).learn(60)
    obs = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    acted = model.predict(obs, deterministic=True)[0]
    model.save(tmp_path / "agent")
    for safe in (False, True):
        assert np.array_equal(DHMBPO.load(tmp_path / "agent", safe=safe).predict(obs, deterministic=True)[0], acted)
    model.policy.save(tmp_path / "policy")
    assert np.array_equal(DHMBPOPolicy.load(tmp_path / "policy", device="cpu").predict(obs, deterministic=True)[0], acted)
    # It is compared with predict, and refused if it differs.
    model.export(tmp_path / "policy.pt")
    # New statistics change the first layers, and not the actions.
    model.policy.adapt(th.as_tensor(1.2 * obs + 0.1), th.zeros(30, 1), trained=True)
    assert np.allclose(model.predict(obs, deterministic=True)[0], acted, atol=1e-3)
    sac = model.to_sac()
    assert sac.policy.average_actor is None and np.allclose(sac.predict(obs, deterministic=True)[0], acted, atol=1e-3)
    sac.set_env(gym.make("Pendulum-v1"))
    sac.learn(60)
    again = agent(policy_kwargs={"net_arch": [16, 16], "average_actor": True}).to_sac()
    assert again.policy.average_actor is None
    assert not np.allclose(sac.predict(obs, deterministic=True)[0], acted, atol=1e-3)


def test_values_stay_where_bounds_jump():
    critic = agent().critic
    for body in critic.q_networks:
        th.nn.init.normal_(body[-1].weight)
    obs, actions = th.randn(20, 3), th.rand(20, 1)
    before = th.cat(critic(obs, actions), dim=1)
    # The first time, of a critic that has learned from SAC's updates; then by a reward that was never seen before.
    critic.move_bounds(th.tensor(-2000.0), th.tensor(0.0), 0.1)
    assert th.allclose(before, th.cat(critic(obs, actions), dim=1), atol=1e-3)
    critic.reward_high.fill_(100.0)
    critic.move_bounds(th.tensor(-2000.0), th.tensor(0.0), 0.1)
    assert critic.value_high == 100 and th.allclose(before, th.cat(critic(obs, actions), dim=1), atol=1e-3)


def test_moments_of_adam_follow_the_first_layer():
    """In the new units of its gradient."""
    model = agent().learn(30)
    layer = model.actor.latent_pi[0]
    moments = model.actor.optimizer.state[layer.weight]
    before = {name: moments[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    old = model.actor.features_extractor.obs_std.clone()
    model.policy.adapt(2 * th.randn(500, 3), th.zeros(1), trained=True)
    scale = model.actor.features_extractor.obs_std / old
    assert (scale != 1).all() and (scale < 10).all()
    assert th.allclose(moments["exp_avg"], before["exp_avg"] / scale)
    assert th.allclose(moments["exp_avg_sq"], before["exp_avg_sq"] / scale**2)


def test_a_rare_reward_is_a_possible_value():
    """A bonus of 100 at the end of an episode is beyond the quantiles of the rewards, and must not be cut off."""
    policy = agent().policy
    policy.adapt(th.randn(50, 3), th.cat([th.full((49, 1), -0.1), th.tensor([[100.0]])]), trained=False)
    for _ in range(3):
        policy.critic.move_bounds(th.tensor(-20.0), th.tensor(0.0), 0.1)
        assert policy.critic.value_low == -20 and policy.critic.value_high == 100


# ---------------------------------------------------------------------- in SB3


def test_without_trust_in_the_dynamics_updates_are_sacs():
    """With the model off, SAC with the same policy, bit for bit; with a gate that never opens, the same updates."""
    kwargs = {"learning_starts": 20, "batch_size": 16, "seed": 0, "device": "cpu", "gamma": 0.995, "ent_coef": "auto_0.1"}
    sac = SAC(DHMBPOPolicy, "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}, **kwargs).learn(60)
    off = agent(real_ratio=1).learn(60)
    for name, value in sac.policy.state_dict().items():
        assert th.equal(value, off.policy.state_dict()[name]), name
    shut = agent(min_explained_variance=1.0).learn(60)
    assert not shut.expands_values and math.isfinite(shut.logger.name_to_value["train/critic_loss"])
    assert "train/value" not in shut.logger.name_to_value


def test_a_filter_ends_the_branches_of_distribution_rollouts():
    """One that lets no branch go on: all states that training rollouts start at are real, or one step away from it."""
    met = []

    def one_step(mean, var, rollout_step):
        met.append(rollout_step.step)
        everything = th.ones(mean.shape[1], dtype=th.bool)
        return FilterResult(mean[0], everything, ~everything)

    model = agent(rollout_filter=one_step).learn(21)
    met.clear()
    model.roll_distribution()
    # As often as it takes to have as many states as without the filter.
    assert met == [0, 0, 0] and model.replay_buffer.model_buffer.refills[-1] == 3 * 8


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"training_horizon": 0}, "training_horizon=0 must be"),
        ({"distribution_freq": 0}, "distribution_freq=0 must be"),
        ({"real_roots": 1.5}, "real_roots=1.5 must be"),
        ({"actor_tau": -0.1}, "actor_tau=-0.1 must be"),
        ({"value_quantiles": (0.9, 0.1)}, "value_quantiles=.*the lower one first"),
        ({"real_ratio": 0.05}, "real_ratio=0.05 must be 0, or 1.*pass real_roots"),
        ({"use_sde": True}, "use_sde=True must be False"),
        ({"gamma": 1}, "gamma=1 must be below 1"),
        ({"value_quantiles": 0.5}, "value_quantiles=0.5 must be two numbers"),
    ],
)
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        agent(**kwargs)


def test_refused_policies():
    for policy in ("CnnPolicy", SACPolicy):
        with pytest.raises(ValueError, match="must be 'MlpPolicy' or a subclass of DHMBPOPolicy"):
            DHMBPO(policy, "Pendulum-v1")


def test_arguments_as_yaml_has_them(tmp_path):
    model = agent(training_horizon="2", value_quantiles=[0.05, 0.95]).learn(25)
    assert model.training_horizon == 2
    model.save(tmp_path / "agent")
    assert DHMBPO.load(tmp_path / "agent", safe=True).value_quantiles == (0.05, 0.95)
    with pytest.warns(UserWarning, match="gradient_steps"):
        agent(make_vec_env("Pendulum-v1", 4))
    agent(policy_kwargs={"net_arch": []}).learn(25)


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_dynamics_without_a_gradient_are_refused():
    class Opaque(TruePendulum):
        def sample(self, obs, actions):
            with th.no_grad():
                return super().sample(obs, actions)

    with pytest.raises(
        ValueError, match=r"imagined observations.*dynamics_class must be made of differentiable torch operations"
    ):
        agent(dynamics_class=Opaque).learn(25)
    with pytest.warns(UserWarning, match="rewards have no gradient"):
        agent(reward_fn=lambda obs, actions, next_obs: next_obs[:, 0].detach() + 0).learn(25)
    # What never varies has no gradient and needs none.
    agent(reward_fn=lambda obs, actions, next_obs: th.ones(len(obs))).learn(25)


@pytest.mark.filterwarnings("ignore:termination_fn disagrees", "ignore:reward_fn disagrees")
def test_a_constant_reward_needs_no_gradient_where_episodes_end():
    ends = lambda obs, actions, next_obs: next_obs[:, 0] > 0.9  # noqa: E731
    ones = lambda obs, actions, next_obs: th.ones(len(obs))  # noqa: E731
    assert agent(reward_fn=ones, termination_fn=ends).learn(30).expands_values


def test_with_half_of_the_trust_sac_learns_from_real_rows(monkeypatch):
    """Imagined rows have no rewards that it could learn from, and a warning says that the dynamics is not used."""
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.imagined_fraction", lambda *args: 0.6)
    model = agent(model_train_freq=5)
    with pytest.warns(UserWarning, match="not used after 3 fits in a row"):
        model.learn(40)
    assert not model.expands_values and len(model.replay_buffer.model_buffer) and model.replay_buffer.real_ratio == 1
    assert model.logger.name_to_value["dynamics/real_share"] == 1


@pytest.mark.filterwarnings("ignore:After 40 steps")
def test_loaded_without_its_buffer_it_collects_first(tmp_path):
    agent().learn(40).save(tmp_path / "agent")
    loaded = DHMBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    loaded.learn(15, reset_num_timesteps=False)
    assert not loaded.expands_values and loaded._n_updates > 0
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.expands_values


def test_a_new_fit_has_new_bounds():
    """At the same step, after more data: an agent imagines no further than what its dynamics has seen."""
    model = agent().learn(30)
    zeros = {name: np.zeros((40, size)) for name, size in (("observations", 3), ("next_observations", 3), ("actions", 1))}
    ends = {name: np.zeros(40) for name in ("terminations", "truncations")}
    model.prefill({**zeros, **ends, "rewards": np.full(40, 50.0)})
    before = model.bounds_of_fit.reward_bounds[1]
    model.fit_dynamics()
    assert model.bounds_of_fit.reward_bounds[1] > before + 40
    model.forget_transitions()
    assert not model.expands_values and not model.critic.bounds_known


@pytest.mark.parametrize("real_roots", [0.0, 0.25, 1.0])
@pytest.mark.filterwarnings("ignore:After 40 steps")
def test_saved_loaded_and_learning_on(real_roots, tmp_path):
    model = agent(real_roots=real_roots).learn(40)
    rows = len(model.replay_buffer.model_buffer)
    # Without distribution rollouts, the callback's own at each fit remain.
    assert rows == (2 * 24 if real_roots < 1 else 24)
    model.save(tmp_path / "agent")
    loaded = DHMBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    obs = model.observation_space.sample()
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert loaded.gamma == 0.995 and loaded.training_horizon == 5 and loaded.real_roots == real_roots
    loaded.learning_starts = 10
    loaded.learn(40)
    assert loaded._n_updates > model._n_updates and loaded.expands_values


def test_with_several_envs_and_normalization():
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = DHMBPO("MlpPolicy", env, **{**FAST, "gradient_steps": 2}).learn(60)
    assert model.expands_values and model._n_updates >= 20
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())


@pytest.mark.parametrize("kind", [DHMBPO, MBPO])
def test_parameters_of_random_numbers(kind):
    """As Stable-Baselines3's own test of set_parameters sets them."""
    model = kind("MlpPolicy", "Pendulum-v1", device="cpu")
    parameters = {
        name: {key: th.rand_like(value) for key, value in state.items()}
        for name, state in model.get_parameters().items()
        if "optimizer" not in name
    }
    model.set_parameters(parameters, exact_match=False)
    found = model.get_parameters()
    assert all(
        th.equal(value, found[name][key]) for name in parameters for key, value in parameters[name].items() if "weight" in key
    )


def test_equal_seeds_are_equal_runs():
    one, other = (agent().learn(60).policy.state_dict() for _ in range(2))
    assert all(th.equal(value, other[name]) for name, value in one.items())


@pytest.mark.expensive
@pytest.mark.parametrize("dynamics", ["learned", "true"])
def test_pendulum_is_solved_in_1000_updates(dynamics):
    kwargs = {"dynamics_class": TruePendulum} if dynamics == "true" else {}
    model = DHMBPO("MlpPolicy", "Pendulum-v1", learning_starts=500, seed=0, device="cpu", **kwargs).learn(1_500)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=5)
    # A policy that knows nothing gets -1,200.
    assert isinstance(mean, float) and mean > -300
