import copy

import pytest
import torch as th
from stable_baselines3 import SAC
from test_sac_update import BATCH, CASES, difference, make, run
from torch._subclasses.fake_tensor import FakeTensorMode

from sb3_mbpo.fast_sac.stacks import LEAD, layers_of
from sb3_mbpo.fast_sac.static_memory import SACMemory, _originals, counts_of, why_not_static


def trained(seed: int = 0, **kwargs) -> SAC:
    return run(make(seed=seed, **kwargs), False)[0]


@th.no_grad()
def memory_of(agent: SAC) -> SACMemory:
    memory = SACMemory(agent)
    memory.read(agent)
    return memory


@pytest.mark.parametrize("case", ["plain", "unequal", "fixed alpha", "deep, one critic"])
def test_what_was_read_is_written(case):
    agent, other = trained(**CASES[case]), make(seed=1, **CASES[case])
    steps = agent._n_updates
    with th.no_grad():
        memory_of(agent).write(other, steps)
    assert difference(other, agent) == 0
    assert counts_of(other) == [{steps}] * len(counts_of(agent))


def test_where_things_stand():
    agent = trained()
    memory = memory_of(agent)
    actor, critic, target = agent.actor, agent.critic.q_networks, agent.critic_target.q_networks
    heads = layers_of(memory.actor, memory.pi_shapes)[-1][0]
    assert th.equal(heads[:, LEAD:], th.cat([actor.mu.weight, actor.log_std.weight]))  # type: ignore[list-item]
    assert th.equal(heads[:, 0], th.cat([actor.mu.bias, actor.log_std.bias]))  # type: ignore[list-item]
    firsts = layers_of(memory.all_critics, memory.q_shapes)[0][:, :, LEAD:]
    assert all(th.equal(ours, network[0].weight) for ours, network in zip(firsts, [*target, *critic], strict=True))  # type: ignore
    assert memory.log_alpha is not None and th.equal(memory.log_alpha, agent.log_ent_coef.detach())  # type: ignore[union-attr]


def test_the_critics_step_leaves_the_others_alone():
    memory = memory_of(trained())
    before = [part.clone() for part in (memory.critics, memory.actor, memory.targets)]
    for layer in (*memory.critic_grads, *memory.actor_grads):
        layer.fill_(1)
    memory.step_critics()
    now = [memory.critics, memory.actor, memory.targets]
    assert [th.equal(a, b) for a, b in zip(before, now, strict=True)] == [False, True, True]
    memory.step_actor_and_alpha()
    assert [th.equal(a, b) for a, b in zip(before, now, strict=True)] == [False, False, True]


def test_counts():
    agent = make()
    assert counts_of(agent) == [{0.0}] * 3
    SAC.train(agent, 2, BATCH)
    assert counts_of(agent) == [{2.0}] * 3 and why_not_static(agent) is None
    agent.critic.optimizer.state[agent.critic.q_networks[0][0].weight]["step"] += 1  # type: ignore[index]
    assert counts_of(agent) == [{2.0, 3.0}, {2.0}, {2.0}]
    del agent.actor.optimizer.state[agent.actor.mu.weight]  # type: ignore[union-attr, arg-type]
    assert counts_of(agent)[1] == {0.0, 2.0}
    assert "unequal numbers of steps" in str(why_not_static(agent))


def test_an_eps_of_zero_would_move_what_stands_between():
    agent = make()
    # The second is zero in float32.
    for eps in (0.0, 1e-50):
        agent.critic.optimizer.param_groups[0]["eps"] = eps
        assert "eps" in str(why_not_static(agent))


@pytest.mark.parametrize("case", ["plain", "unequal", "fixed alpha", "deep, one critic"])
def test_where_a_gpu_likes_to_read(case):
    """The fused kernel of Adam reads four numbers at once only where all its tensors begin at 16 bytes."""
    memory = SACMemory(make(**CASES[case]))
    pieces = [piece for adam in memory._adams for kind in adam._pieces for piece in kind]
    assert {piece.data_ptr() % 16 for piece in pieces} == {0}


def test_log_alpha_may_be_a_scalar():
    """SB3 trains it as it is."""
    agent, other = trained(), trained(seed=1)
    with th.no_grad():
        other.log_ent_coef.set_(th.zeros(()))  # type: ignore[union-attr, call-overload]
        for key in ("exp_avg", "exp_avg_sq"):
            other.ent_coef_optimizer.state[other.log_ent_coef][key].set_(th.zeros(()))  # type: ignore
        memory_of(agent).write(other, 0)
        assert other.log_ent_coef.shape == () and other.log_ent_coef == agent.log_ent_coef  # type: ignore[union-attr]
        assert th.equal(memory_of(other)._mirror.memory, memory_of(agent)._mirror.memory)


def test_nothing_of_the_agent_is_kept():
    agent = trained()
    before, memory = copy.deepcopy(agent), memory_of(agent)
    memory.actor += 1
    memory.all_critics += 1
    assert difference(agent, before) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_counters_of_a_loaded_agent(fused):
    """SB3 loads them onto the GPU (here one of fake tensors); Adam itself keeps them there only if it is fused."""
    agent = trained(policy_kwargs={"optimizer_kwargs": {"fused": fused}})
    states = agent.critic.optimizer.state.values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for state in states:
            state["step"] = th.ones((), device="cuda")
        _originals(agent)
    assert {state["step"].device.type for state in states} == {"cuda" if fused else "cpu"}
