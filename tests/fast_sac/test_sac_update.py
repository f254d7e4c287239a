import copy
import io
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common import policies
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_mbpo.fast_sac import cpu as sac_update
from sb3_mbpo.fast_sac.cpu import train
from sb3_mbpo.fast_sac.eligibility import why_not_fast

BATCH = 24


class Still(gym.Env):
    """Only its spaces matter."""

    def __init__(self, obs_space: spaces.Space, action_shape: tuple[int, ...]) -> None:
        self.observation_space, self.action_space = obs_space, spaces.Box(-1, 1, action_shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {}


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float64)


def prepare(agent: SAC) -> SAC:
    """Give an agent what it needs to train outside of ``learn``: a logger, and transitions."""
    rng, buffer = np.random.default_rng(0), agent.replay_buffer
    assert buffer is not None
    for array in (buffer.observations, buffer.next_observations):
        array[:] = rng.integers(0, 5, array.shape) if array.dtype == np.int64 else rng.normal(size=array.shape)
    buffer.actions[:], buffer.rewards[:] = rng.uniform(-1, 1, buffer.actions.shape), rng.normal(size=buffer.rewards.shape)
    buffer.dones[:], buffer.full = rng.random(buffer.dones.shape) < 0.1, True
    agent.set_logger(configure(None, []))
    return agent


def to_double(array: np.ndarray, copy: bool = True) -> th.Tensor:
    return th.tensor(array, dtype=th.float64)


def make(
    obs: spaces.Space | None = None,
    actions: tuple[int, ...] = (2,),
    seed: int = 0,
    double: bool = False,
    cls: type[SAC] = SAC,
    **kwargs,
) -> SAC:
    kwargs = {"policy": "MlpPolicy", "buffer_size": 200, "learning_rate": 1e-3, "seed": seed, "device": "cpu", **kwargs}
    kwargs["policy_kwargs"] = {"net_arch": [32, 32], **kwargs.get("policy_kwargs", {})}
    agent = prepare(cls(env=Still(obs or box(4), actions), **kwargs))
    if double:
        agent.policy.double()
        setattr(agent.replay_buffer, "to_torch", to_double)  # noqa: B010
        if agent.log_ent_coef is not None:
            agent.log_ent_coef.data = agent.log_ent_coef.data.double()
    return agent


@pytest.fixture
def in_double(monkeypatch):
    """SB3 casts observations to float32 at the door of its networks: not here."""
    for module in (policies, sac_update):
        monkeypatch.setattr(module, "preprocess_obs", lambda obs, *_, **__: obs.double())


def parts(agent: SAC) -> dict[str, th.Tensor]:
    """All that training changes: parameters and optimizer states, as vectors."""
    nets = {"actor": agent.actor, "critic": agent.critic, "critic_target": agent.critic_target}
    result = {name: nn.utils.parameters_to_vector(net.parameters()).detach() for name, net in nets.items()}
    optimizers = {"actor": agent.actor.optimizer, "critic": agent.critic.optimizer}
    if agent.ent_coef_optimizer is not None:
        assert agent.log_ent_coef is not None
        result["log_ent_coef"], optimizers["ent_coef"] = agent.log_ent_coef.detach(), agent.ent_coef_optimizer
    for name, optimizer in optimizers.items():
        states = list(optimizer.state_dict()["state"].values())
        for key in ("exp_avg", "exp_avg_sq", "step"):
            result[f"{name} {key}"] = th.cat([state[key].flatten() for state in states])
    return result


def difference(agent: SAC, reference: SAC) -> float:
    """The largest relative difference over all parts."""
    # SB3 loads counters of Adam onto the GPU, where Adam itself keeps them on the CPU.
    ours, theirs = ({key: part.cpu() for key, part in parts(learner).items()} for learner in (agent, reference))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).norm() / theirs[key].norm().clamp_min(1e-30)) for key in ours)


def saved_and_loaded(agent: SAC) -> SAC:
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    loaded = SAC.load(file, env=agent.get_env(), device=agent.device)
    loaded.replay_buffer = agent.replay_buffer
    loaded.set_logger(configure(None, []))
    return loaded


def batches(agent: SAC, n: int, size: int = BATCH) -> list[ReplayBufferSamples]:
    """What SB3's own ``train`` would draw."""
    assert agent.replay_buffer is not None
    return [agent.replay_buffer.sample(size, env=agent._vec_normalize_env) for _ in range(n)]


def run(agent: SAC, fast: bool, steps: int = 5, update: Callable = train) -> tuple[SAC, dict[str, Any], list[Any]]:
    """Train from a fixed seed, by ``update`` or by SB3; also the log entries and where the random streams got to."""
    set_random_seed(3)
    agent.policy.set_training_mode(False)
    if fast:
        update(agent, batches(agent, steps))
    else:
        SAC.train(agent, steps, BATCH)
    numpy_state = np.random.get_state(legacy=False)["state"]
    return (
        agent,
        dict(agent.logger.name_to_value),
        [
            th.get_rng_state().tolist(),
            numpy_state["pos"],
            numpy_state["key"].tolist(),
            *(s.tolist() for s in th.cuda.get_rng_state_all()),
        ],
    )


def compare(agent: SAC, tolerance: float, steps: int, update: Callable = train) -> float:
    """Train a copy by SB3, the agent fast: weights, moments, log, counters and random streams must agree."""
    twin = copy.deepcopy(agent)
    reference, expected, streams = run(twin, False, steps)
    _, logged, our_streams = run(agent, True, steps, update)
    error = difference(agent, reference)
    assert error < tolerance
    assert our_streams == streams
    assert logged.keys() == expected.keys()
    assert logged == pytest.approx(expected, rel=10 * tolerance, abs=tolerance)
    assert {key: type(value) for key, value in logged.items()} == {key: type(value) for key, value in expected.items()}
    assert agent._n_updates == reference._n_updates == steps
    assert agent.policy.training and agent.actor.training and not agent.critic_target.training
    return error


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"policy_kwargs": {"net_arch": [64, 64]}},
    "shallow, three critics": {"policy_kwargs": {"net_arch": [32], "n_critics": 3}},
    "deep, one critic": {"policy_kwargs": {"net_arch": [48, 32, 16], "n_critics": 1}},
    "unequal": {"policy_kwargs": {"net_arch": {"pi": [16], "qf": [32, 8]}}},
    "shapes": {"obs": box(2, 3), "actions": (2, 2), "policy_kwargs": {"n_critics": 3}},
    "fixed alpha": {"ent_coef": 0.1, "target_update_interval": 3, "tau": 0.02},
    "auto alpha from 0.1": {"ent_coef": "auto_0.1", "target_entropy": -0.7, "gamma": 0.9, "tau": 1.0},
    "schedule": {"learning_rate": lambda progress: 2e-3 * progress, "target_update_interval": 3},
    "adam": {"policy_kwargs": {"optimizer_kwargs": {"betas": (0.8, 0.99), "eps": 1e-5}}},
    "fused adam": {"policy_kwargs": {"optimizer_kwargs": {"fused": True}}},
    "shared extractor": {"policy_kwargs": {"share_features_extractor": True}},
    "three-step returns": {"n_steps": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_sb3_in_float64(case, in_double):
    agent = make(double=True, **CASES[case])
    agent._current_progress_remaining = 0.5
    compare(agent, 1e-12, steps=50)


def test_equals_sb3_without_the_private_operation(in_double, monkeypatch):
    monkeypatch.delattr(th, "_fused_adam_")
    compare(make(double=True), 1e-12, steps=20)


def test_equals_sb3_where_log_std_is_clamped(in_double):
    """The gradient stops at the upper bound, in one dimension of two. So wide a policy saturates, and 1 - a^2 loses digits."""
    agent = make(double=True)
    agent.actor.log_std.bias.data[0] = 2.0
    compare(agent, 1e-10, steps=20)
    assert (agent.actor.log_std.bias.detach() != 2.0).all()


@pytest.mark.parametrize("bias", [-40.0, 10.0])
def test_no_gradient_beyond_the_bounds_of_log_std(bias):
    agent = make()
    agent.actor.log_std.bias.data.fill_(bias)
    weight = agent.actor.log_std.weight.detach().clone()
    train(agent, batches(agent, 3))
    assert th.equal(agent.actor.log_std.weight, weight) and (agent.actor.log_std.bias == bias).all()


def test_one_row():
    compare(make(), 1e-3, steps=1)
    agent = make()
    train(agent, batches(agent, 2, 1))
    assert all(value.isfinite().all() for value in parts(agent).values())


@pytest.mark.parametrize("case", [{}, {"obs": box(3, 2)}, {"obs": spaces.Discrete(5)}, {"ent_coef": 0.2}], ids=str)
def test_equals_sb3_in_float32(case):
    agent = make(policy_kwargs={"net_arch": [64, 64]}, **case)
    assert why_not_fast(agent) is None
    compare(agent, 1e-3, steps=20)


def test_equals_sb3_with_normalized_observations_and_rewards():
    env = VecNormalize(DummyVecEnv([lambda: Still(box(4), (2,))]))
    env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var = np.arange(4.0), np.arange(1.0, 5), np.array(9.0)
    agent = prepare(SAC("MlpPolicy", env, buffer_size=200, seed=0, device="cpu", policy_kwargs={"net_arch": [32, 32]}))
    assert why_not_fast(agent) is None
    compare(agent, 1e-3, steps=20)


# ---------------------------------------------------------------------- SB3's objects stay the truth


@pytest.mark.parametrize("fast", [True, False])
def test_either_continues_the_other(fast, in_double):
    """SB3's own train goes on where the fast one stopped, and the other way round; copies too."""
    agent = make(double=True)
    reference = copy.deepcopy(agent)
    for now in (fast, not fast, fast):
        agent = copy.deepcopy(run(agent, now)[0])
        run(reference, False)
        assert difference(agent, reference) < 1e-12


def test_parameters_travel(in_double):
    """``get_parameters`` and ``set_parameters`` carry weights and moments to another agent, new or trained."""
    agent, reference = make(double=True, ent_coef=0.1), make(double=True, ent_coef=0.1)
    run(agent, True)
    run(reference, False)
    run(reference, False)
    for other in (make(double=True, ent_coef=0.1, seed=1), run(make(double=True, ent_coef=0.1, seed=1), True)[0]):
        # A copy: two optimizers that load the same state share its tensors.
        other.set_parameters(copy.deepcopy(agent.get_parameters()))
        assert difference(run(other, True)[0], reference) < 1e-12


def test_new_weights_take_effect(in_double):
    agent, other = make(double=True), make(double=True, seed=1)
    reference = copy.deepcopy(agent)
    for learner, fast in ((agent, True), (reference, False)):
        run(learner, fast)
        learner.policy.load_state_dict(other.policy.state_dict())
        run(learner, fast)
    assert difference(agent, reference) < 1e-12


@pytest.mark.parametrize("fast", [True, False])
def test_save_and_load(fast):
    """Bit for bit as without saving, by either train."""
    agent = run(make(), True)[0]
    loaded = saved_and_loaded(agent)
    assert why_not_fast(loaded) is None
    assert difference(loaded, agent) == 0
    assert difference(run(loaded, fast)[0], run(agent, fast)[0]) == 0


def test_optimizer_states_are_those_of_adam():
    agent, reference = make(), make()
    train(agent, batches(agent, 2))
    SAC.train(reference, 2, BATCH)
    pairs = [(agent.actor.optimizer, reference.actor.optimizer), (agent.critic.optimizer, reference.critic.optimizer)]
    for ours, theirs in [*pairs, (agent.ent_coef_optimizer, reference.ent_coef_optimizer)]:
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        kinds = [
            {i: {key: (value.dtype, value.shape) for key, value in state.items()} for i, state in states["state"].items()}
            for states in (ours, theirs)
        ]
        assert kinds[0] == kinds[1]
        assert all(state["step"] == 2 for state in ours["state"].values())


def test_autograd_goes_on_as_before():
    """Nothing is left behind that a loss of the user's own would trip over."""
    agent = make()
    train(agent, batches(agent, 2))
    assert th.is_grad_enabled() and all(p.requires_grad and p.grad is None for p in agent.policy.parameters())
    obs = th.zeros(3, 4)
    agent.critic(obs, agent.actor(obs))[0].mean().backward()
    assert all(p.grad is not None for p in agent.actor.parameters())


def test_no_gradient_of_an_earlier_update_stays():
    """It would look like that of the newest one."""
    agent = make()
    for step in (SAC.train, lambda agent, *_: train(agent, batches(agent, 1))):
        step(agent, 1, BATCH)
    assert all(p.grad is None for p in [*agent.actor.parameters(), *agent.critic.parameters(), agent.log_ent_coef])
