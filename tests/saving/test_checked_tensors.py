import copy

import gymnasium as gym
import pytest
import torch as th
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.saving.checked_tensors import Bounded, check_like, check_optimizer, restore


def after_steps(make, n=2):
    weights = [th.nn.Parameter(th.ones(2, 3)), th.nn.Parameter(th.ones(4))]
    optimizer = make(weights)
    for _ in range(n):
        for weight in weights:
            weight.grad = th.ones_like(weight)
        optimizer.step()
    return optimizer


MAKERS = {
    "Adam": lambda weights: th.optim.Adam(weights, lr=0.1),
    "fused": lambda weights: th.optim.Adam(weights, lr=0.1, fused=True),
    "AMSGrad": lambda weights: th.optim.AdamW(weights, amsgrad=True),
    "SGD": lambda weights: th.optim.SGD(weights, lr=0.1),
    "momentum": lambda weights: th.optim.SGD(weights, lr=0.1, momentum=0.9),
    "RMSprop": lambda weights: th.optim.RMSprop(weights, centered=True),
    "NAdam": lambda weights: th.optim.NAdam(weights),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_states_of_optimizers(make):
    for given in (after_steps(make), after_steps(make, 0)):
        fresh = after_steps(make, 0)
        check_optimizer(fresh, given.state_dict(), "o")
        assert not fresh.state, "the check leaves it as it was"


def with_change(change):
    state = copy.deepcopy(after_steps(MAKERS["Adam"]).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["state"][0].update(exp_avg=th.zeros(3, 2)),
            r"o: state: 0: exp_avg must be .* of shape \(2, 3\)",
        ),
        (lambda s: s["state"][0].update(exp_avg=th.zeros(2, 3).double()), "torch.float32"),
        (lambda s: s["state"][0].update(exp_avg=[0] * 6), "must be a tensor"),
        (lambda s: s["state"][0].update(exp_avg=th.zeros(2, 3).to_sparse()), "must be a tensor"),
        (lambda s: s["state"][0].pop("exp_avg"), r"lacks \['exp_avg'\]"),
        (lambda s: s["state"][0].update(more=1), r"unknown keys \['more'\]"),
        (lambda s: s["state"].update({7: s["state"][0]}), "unknown parameter 7"),
        (lambda s: s["state"].update({"0": s["state"][0]}), "unknown parameter 0"),
        (lambda s: s.update(state=[]), "state must be a mapping"),
        (lambda s: s.pop("state"), r"lacks \['state'\]"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "finite number"),
        (lambda s: s["param_groups"][0].update(lr="0.1"), "finite number"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad must be False"),
        (lambda s: s["param_groups"][0].update(betas=(0.9,)), "tuple of 2"),
        (lambda s: s["param_groups"][0].update(params=[1, 0]), "same parameters"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "list of 1"),
        (lambda s: s["param_groups"][0].update(hook=1), "unknown keys"),
    ],
)
def test_what_is_no_state(change, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(after_steps(MAKERS["Adam"], 0), with_change(change), "o")


def test_a_tensor_that_only_looks_large():
    with pytest.raises(ValueError, match=r"a must be .* of shape"):
        check_like({"a": th.zeros(2)}, {"a": th.zeros(1).expand(10**12)}, "x")


def test_nothing_grows_beyond_its_bound():
    with Bounded(0):
        th.nn.Linear(30, 30)
        with pytest.raises(ValueError, match="larger than the tensors in the file"):
            th.nn.Linear(10**6, 10**6)
    with Bounded(0), pytest.raises(ValueError, match="larger than"):
        for _ in range(10**6):
            th.nn.Linear(1, 1)


@pytest.fixture(scope="module")
def agent():
    return MBPO("MlpPolicy", gym.make("Pendulum-v1"), **FAST).learn(40)


def tensors_of(agent):
    return copy.deepcopy({**agent.get_parameters(), "pytorch_variables": {"log_ent_coef": agent.log_ent_coef.detach()}})


def test_an_agent(agent):
    other = MBPO("MlpPolicy", gym.make("Pendulum-v1"), **{**FAST, "seed": 5})
    restore(other, tensors_of(agent))
    check = tensors_of(other)
    assert all(th.equal(check["policy"][key], value) for key, value in tensors_of(agent)["policy"].items())
    assert th.equal(other.log_ent_coef, agent.log_ent_coef) and other.log_ent_coef.requires_grad
    assert len(other.actor.optimizer.state) == len(agent.actor.optimizer.state) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("dynamics"), r"the file lacks \['dynamics'\]"),
        (lambda t: t.update({"policy.__class__": {}}), "unknown keys"),
        (lambda t: t["policy"].popitem(), "policy lacks"),
        (lambda t: t["policy"].update(extra=th.zeros(1)), "policy .*unknown keys"),
        (lambda t: t["policy"].update({"actor.mu.bias": th.zeros(7)}), r"policy: actor.mu.bias must be .* of shape \(1,\)"),
        (lambda t: t["dynamics"].update(holdout_errors=th.zeros(7, dtype=th.int64)), "dynamics: holdout_errors"),
        (lambda t: t["pytorch_variables"].update(log_ent_coef=3.0), "log_ent_coef must be a tensor"),
        (lambda t: t.update(pytorch_variables=None), "pytorch_variables must be a mapping"),
        (lambda t: t.update({"critic.optimizer": {}}), "critic.optimizer lacks"),
    ],
)
def test_what_is_not_the_agents(agent, change, message):
    """Nothing is changed before everything was checked."""
    tensors = tensors_of(MBPO("MlpPolicy", gym.make("Pendulum-v1"), **{**FAST, "seed": 5}))
    change(tensors)
    before = tensors_of(agent)
    with pytest.raises(ValueError, match=message):
        restore(agent, tensors)
    after = tensors_of(agent)
    assert all(th.equal(after["policy"][key], value) for key, value in before["policy"].items())
