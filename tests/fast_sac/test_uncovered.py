import copy
from typing import Any

import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.sac.policies import SACPolicy
from test_sac_update import BATCH, batches, difference, make, run
from torch import nn

from sb3_mbpo.fast_sac.cpu import train
from sb3_mbpo.fast_sac.eligibility import why_not_fast


class OwnTrain(SAC):
    def train(self, gradient_steps: int, batch_size: int = 64) -> None: ...


class Conductor(SAC):
    """Asks, as a subclass that would rather use the fast update does."""

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        if why_not_fast(self, Conductor) is None:
            train(self, batches(self, gradient_steps, batch_size))
        else:
            super().train(gradient_steps, batch_size)


class Wrapped(Conductor):
    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        super().train(gradient_steps, batch_size)


class OtherParent(Conductor, OwnTrain): ...


class OwnPolicy(SACPolicy): ...


class OwnExtractor(FlattenExtractor): ...


class OwnDistribution(SquashedDiagGaussianDistribution): ...


def insert(layer: nn.Module, agent: SAC) -> None:
    agent.critic.q_networks[0].insert(1, layer)  # type: ignore[operator]


def tie(agent: SAC) -> None:
    first, second = agent.critic.q_networks
    second[0].weight = first[0].weight  # type: ignore[index]


def unused(agent: SAC) -> None:
    agent.actor.optimizer.add_param_group({"params": [nn.Parameter(th.zeros(1))]})


def other_target(agent: SAC, **kwargs: Any) -> None:
    agent.critic_target = make(**kwargs).critic_target


def other_critic(agent: SAC, *layers: nn.Module) -> None:
    """Critic and target alike, but not the first critic and the second."""
    for network in (agent.critic, agent.critic_target):
        network.qf1 = nn.Sequential(*map(copy.deepcopy, layers))
        network.q_networks[1] = network.qf1  # type: ignore[index]
    agent.critic.optimizer = th.optim.Adam(agent.critic.parameters())


def other_actor_with_a_hook(agent: SAC) -> None:
    agent.actor = make().actor
    agent.actor.mu.weight.register_hook(print)  # type: ignore[operator]


def new_optimizer(agent: SAC, parameters: list[nn.Parameter]) -> None:
    agent.actor.optimizer = th.optim.Adam(parameters)


REFUSED_KWARGS: list[tuple[str, dict[str, Any]]] = [
    ("gSDE", {"use_sde": True}),
    ("Tanh", {"policy_kwargs": {"activation_fn": nn.Tanh}}),
    ("OwnPolicy", {"policy": OwnPolicy}),
    ("OwnExtractor", {"policy_kwargs": {"features_extractor_class": OwnExtractor}}),
    ("AdamW", {"policy_kwargs": {"optimizer_class": th.optim.AdamW}}),
    ("SGD", {"policy_kwargs": {"optimizer_class": th.optim.SGD}}),
    ("options of Adam", {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 1e-4}}}),
    ("options of Adam", {"policy_kwargs": {"optimizer_kwargs": {"amsgrad": True}}}),
    ("Linear and ReLU", {"policy_kwargs": {"net_arch": []}}),
    ("float32", {"double": True}),
    ("overridden", {"cls": OwnTrain}),
    ("overridden", {"cls": Conductor}),
]


@pytest.mark.parametrize("reason, kwargs", REFUSED_KWARGS, ids=str)
def test_refused_from_the_start(reason, kwargs):
    assert reason in why_not_fast(make(**kwargs))


DEEPER = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)]
REFUSED_CHANGES: dict[str, tuple[str, Any]] = {
    "layer norm": ("LayerNorm", lambda agent: insert(nn.LayerNorm(32), agent)),
    "batch norm": ("BatchNorm1d", lambda agent: insert(nn.BatchNorm1d(32), agent)),
    "dropout": ("Dropout", lambda agent: insert(nn.Dropout(0.1), agent)),
    "no activation": ("Linear and ReLU", lambda agent: insert(nn.Linear(32, 32), agent)),
    "distribution": ("action distribution", lambda agent: setattr(agent.actor, "action_dist", OwnDistribution(2))),
    "compiled": ("compiled", lambda agent: setattr(agent.actor, "_compiled_call_impl", print)),
    "module hook": ("hooks", lambda agent: agent.actor.mu.register_forward_hook(print)),
    "parameter hook": ("hooks", lambda agent: agent.actor.mu.weight.register_hook(print)),
    "hook after a gradient": ("hooks", lambda agent: agent.actor.mu.weight.register_post_accumulate_grad_hook(print)),
    "hook of another actor": ("hooks", other_actor_with_a_hook),
    "alpha hook": ("hooks", lambda agent: agent.log_ent_coef.register_hook(print)),
    "alpha hook after a gradient": ("hooks", lambda agent: agent.log_ent_coef.register_post_accumulate_grad_hook(print)),
    "forward of the actor": ("replaced", lambda agent: setattr(agent.actor, "forward", print)),
    "action_log_prob": ("replaced", lambda agent: setattr(agent.actor, "action_log_prob", print)),
    "forward of a q_network": ("replaced", lambda agent: setattr(agent.critic.q_networks[1], "forward", print)),
    "forward of a target layer": ("replaced", lambda agent: setattr(agent.critic_target.q_networks[0][0], "forward", print)),
    "log_prob": ("replaced", lambda agent: setattr(agent.actor.action_dist, "log_prob_from_params", print)),
    "step of the optimizer": ("replaced", lambda agent: setattr(agent.critic.optimizer, "step", print)),
    "optimizer hook": ("hooks", lambda agent: agent.critic.optimizer.register_step_pre_hook(print)),
    "tied": ("shared", tie),
    "groups": ("several groups", unused),
    "part": ("missing", lambda agent: new_optimizer(agent, [*agent.actor.parameters()][:2])),
    "no bias": ("missing", lambda agent: setattr(agent.actor.mu, "bias", None)),
    "new log_ent_coef": ("shared, missing", lambda agent: setattr(agent, "log_ent_coef", th.zeros(1, requires_grad=True))),
    "frozen": ("frozen", lambda agent: agent.actor.latent_pi.requires_grad_(False)),
    "wider target": ("target", lambda agent: other_target(agent, policy_kwargs={"net_arch": [64, 64]})),
    "more targets": ("target", lambda agent: other_target(agent, policy_kwargs={"n_critics": 3})),
    "target in float64": ("target", lambda agent: agent.critic_target.double()),
    "target on another device": ("target", lambda agent: agent.critic_target.to("meta")),
    "target without a bias": ("target", lambda agent: setattr(agent.critic_target.q_networks[0][0], "bias", None)),
    "target is the critic": ("target", lambda agent: setattr(agent, "critic_target", agent.critic)),
    "one critic wider": ("unequal", lambda agent: other_critic(agent, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1))),
    "one critic deeper": ("unequal", lambda agent: other_critic(agent, *DEEPER)),
    "train of one agent": ("overridden", lambda agent: setattr(agent, "train", print)),
}


@pytest.mark.parametrize("change", REFUSED_CHANGES)
def test_refused_after_a_change(change):
    reason, apply = REFUSED_CHANGES[change]
    agent = make()
    assert why_not_fast(agent) is None
    apply(agent)
    assert reason in why_not_fast(agent)


@pytest.mark.parametrize("layers", [[nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1)], DEEPER], ids=["wider", "deeper"])
def test_sb3_trains_critics_of_unequal_shape(layers):
    """So they are no mistake of the user's."""
    agent = make()
    other_critic(agent, *layers)
    run(agent, False)


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_refused_with_a_hook_on_all_modules(kind):
    agent = make()
    with getattr(nn.modules.module, f"register_module_{kind}_hook")(print):
        assert "hooks" in why_not_fast(agent)
    assert why_not_fast(agent) is None


def test_refused_on_another_device():
    agent = make()
    agent.log_ent_coef = th.empty(1, device="meta", requires_grad=True)
    agent.ent_coef_optimizer = th.optim.Adam([agent.log_ent_coef])
    assert "CPU" in why_not_fast(agent)


def test_only_what_stands_behind_the_caller_counts():
    assert why_not_fast(make(cls=Conductor), Conductor) is None
    assert why_not_fast(make(cls=Wrapped), Conductor) is None
    assert "overridden" in why_not_fast(make(cls=OtherParent), Conductor)
    agent, reference = make(cls=Wrapped), make()
    set_random_seed(3)
    agent.train(2, BATCH)
    assert difference(agent, run(reference, True, 2)[0]) == 0
