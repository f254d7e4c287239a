import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common import policies
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from test_sac_update import BATCH, CASES, batches, box, compare, difference, make, parts, run, saved_and_loaded
from tiny import FAST
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_mbpo import MBPO
from sb3_mbpo.fast_sac import cuda_graph as cuda_update
from sb3_mbpo.fast_sac.cuda_graph import train
from sb3_mbpo.fast_sac.eligibility import why_not_fast
from sb3_mbpo.fast_sac.side_stream import SideStream

# A capture exists on a GPU only; its arithmetic is tested below without one.
gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def in_double(monkeypatch):
    """SB3 casts observations to float32 at the door of its networks: not here."""
    for module in (policies, cuda_update):
        monkeypatch.setattr(module, "preprocess_obs", lambda obs, *_, **__: obs.double())


def fast(agent: SAC, steps: int = 5) -> SAC:
    return run(agent, True, steps, train)[0]


# ---------------------------------------------------------------------- the same algorithm: on a CPU, uncaptured


@pytest.mark.parametrize("case", CASES)
def test_equals_sb3_in_float64(case, in_double):
    agent = make(double=True, **CASES[case])
    agent._current_progress_remaining = 0.5
    compare(agent, 1e-12, steps=50, update=train)


def test_equals_sb3_where_log_std_is_clamped(in_double):
    """See test_sac_update.py."""
    agent = make(double=True)
    agent.actor.log_std.bias.data[0] = 2.0
    compare(agent, 1e-10, steps=20, update=train)
    assert (agent.actor.log_std.bias.detach() != 2.0).all()


@pytest.mark.parametrize("bias", [-40.0, 10.0])
def test_no_gradient_beyond_the_bounds_of_log_std(bias):
    agent = make()
    agent.actor.log_std.bias.data.fill_(bias)
    weight = agent.actor.log_std.weight.detach().clone()
    assert train(agent, batches(agent, 3))
    assert th.equal(agent.actor.log_std.weight, weight) and (agent.actor.log_std.bias == bias).all()


@pytest.mark.parametrize("case", [{}, {"obs": box(3, 2)}, {"policy_kwargs": {"n_critics": 3}}, {"ent_coef": 0.2}], ids=str)
def test_equals_sb3_in_float32(case):
    compare(make(**case), 1e-3, steps=20, update=train)


def test_one_row():
    agent = make()
    train(agent, batches(agent, 2, 1))
    assert all(value.isfinite().all() for value in parts(agent).values())


@pytest.mark.parametrize("first", [True, False])
def test_either_continues_the_other(first, in_double):
    """SB3's own train goes on where ours stopped, and the other way round; copies too."""
    agent = make(double=True)
    reference = copy.deepcopy(agent)
    for now in (first, not first, first):
        agent = copy.deepcopy(run(agent, now, 5, train)[0])
        run(reference, False)
        assert difference(agent, reference) < 1e-12


@pytest.mark.parametrize("own", [{"betas": [0.5, 0.9]}, {"eps": 1e-5}, {"lr": 0.5}], ids=str)
def test_alpha_may_have_an_adam_of_its_own(own, in_double, monkeypatch):
    """Actor and alpha take a step together only while they can."""
    monkeypatch.setattr(SAC, "_update_learning_rate", lambda self, optimizers: None)
    agent = fast(make(double=True))
    group = agent.ent_coef_optimizer.param_groups[0]  # type: ignore[union-attr]
    for settings in (own, {key: group[key] for key in own}):
        group.update(settings)
        agent = fast(agent)
        compare_from_here(agent)


def test_optimizers_may_have_had_unequal_numbers_of_steps(in_double):
    agent = make(double=True)
    SAC.train(agent, 2, BATCH)
    agent.ent_coef_optimizer.state[agent.log_ent_coef]["step"] += 30  # type: ignore[union-attr, index]
    compare_from_here(agent)


def compare_from_here(agent: SAC, steps: int = 5, tolerance: float = 1e-12) -> None:
    reference = copy.deepcopy(agent)
    run(reference, False, steps)
    assert difference(fast(agent, steps), reference) < tolerance


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weights": lambda agent: agent.policy.load_state_dict(make(seed=1).policy.state_dict()),
    "weights in place": lambda agent: agent.actor.mu.weight.data.mul_(2),
    "parameters": lambda agent: agent.set_parameters(copy.deepcopy(run(make(double=True, seed=1), False)[0].get_parameters())),
    "moments": lambda agent: agent.critic.optimizer.state[next(agent.critic.parameters())]["exp_avg"].zero_(),
    "fresh optimizer": lambda agent: setattr(
        agent.critic, "optimizer", th.optim.Adam(agent.critic.parameters(), betas=(0.5, 0.9))
    ),
    "gamma": lambda agent: setattr(agent, "gamma", 0.5),
    "tau": lambda agent: setattr(agent, "tau", 0.5),
    "target entropy": lambda agent: setattr(agent, "target_entropy", -5.0),
    "target_update_interval": lambda agent: setattr(agent, "target_update_interval", 3),
    "learning rate": lambda agent: setattr(agent, "lr_schedule", lambda progress: 1e-2),
    "betas": lambda agent: agent.actor.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls_take_effect(change, in_double):
    agent, unchanged = (fast(make(double=True)) for _ in range(2))
    CHANGES[change](agent)
    compare_from_here(agent)
    assert difference(agent, fast(unchanged)) > 1e-9


def test_other_batch_sizes():
    agent, reference = make(), make()
    for size in (BATCH, 8, BATCH):
        for learner in (agent, reference):
            set_random_seed(size)
            if learner is agent:
                train(agent, batches(agent, 2, size))
            else:
                SAC.train(reference, 2, size)
    assert difference(agent, reference) < 1e-3


@pytest.mark.parametrize("continued", [True, False])
def test_save_and_load(continued):
    agent = fast(make())
    loaded = saved_and_loaded(agent)
    assert difference(loaded, agent) == 0
    assert difference(run(loaded, continued, 5, train)[0], run(agent, continued, 5, train)[0]) == 0


def test_nothing_sticks_to_the_agent():
    agent = make()
    before = set(vars(agent)), len(pickle.dumps(agent.policy.state_dict()))
    train(agent, batches(agent, 2))
    assert (set(vars(agent)), len(pickle.dumps(agent.policy.state_dict()))) == before
    assert all(p.requires_grad and p.grad is None for p in agent.policy.parameters()) and th.is_grad_enabled()
    SAC.train(agent, 1, BATCH)
    train(agent, batches(agent, 1))
    assert all(p.grad is None for p in [*agent.actor.parameters(), *agent.critic.parameters(), agent.log_ent_coef])
    assert agent in cuda_update._UPDATES and copy.deepcopy(agent) not in cuda_update._UPDATES
    known = len(cuda_update._UPDATES)
    del agent
    gc.collect()
    assert len(cuda_update._UPDATES) == known - 1


def test_optimizer_states_are_those_of_adam():
    """Kept in the same order, too."""
    agent, reference = make(), make()
    train(agent, batches(agent, 2))
    SAC.train(reference, 2, BATCH)
    for name in ("actor", "critic"):
        ours, theirs = (getattr(learner, name).optimizer.state_dict() for learner in (agent, reference))
        assert ours["param_groups"] == theirs["param_groups"]
        described = [
            [
                (i, key, value.dtype, value.shape, value.device)
                for i, state in states["state"].items()
                for key, value in state.items()
            ]
            for states in (ours, theirs)
        ]
        assert described[0] == described[1]


# ---------------------------------------------------------------------- fit to be captured


@th.no_grad()
def captured_part(agent: SAC, size: int = BATCH) -> Any:
    batch = batches(agent, 1, size)[0]
    update = cuda_update._Update(agent, batch)
    update.read(agent)
    update.put(agent, batch, 0.1)
    return update


@pytest.mark.parametrize("case", ["plain", "unequal", "fixed alpha", "three-step returns", "deep, one critic"])
def test_depends_on_no_value(case):
    """Fake tensors have shapes and no values: whatever waits for a value, or has a shape that follows from one, raises."""
    agent = make(**CASES[case])
    batch = batches(agent, 1)[0]
    with th.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        cuda_update._Update(agent, batch).run()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            th.ones(3).nonzero().sum().item()


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU has to launch, which views are not."""

    views = frozenset(
        "view unsqueeze expand transpose slice select split split_with_sizes unbind alias detach t _unsafe_view".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.views:
            self.launches.append(str(func))
        return func(*args, **(kwargs or {}))


def test_few_launches():
    """The time of an update on a GPU goes by their number: 80 as of writing."""
    update = captured_part(make())
    with th.no_grad(), Launches() as counted:
        update.run()
    assert len(counted.launches) <= 80, counted.launches


def test_static_memory_is_not_replaced():
    """A replay reads and writes the addresses of the capture, whatever Python's attributes say later."""
    update = captured_part(make())
    addresses = [
        {name: value.data_ptr() for name, value in vars(part).items() if isinstance(value, th.Tensor)}
        for part in (update, update.memory)
    ]
    assert {"batch", "noise", "sums", "rate", "gamma"} <= addresses[0].keys()
    assert {"targets", "critics", "actor", "log_alpha", "alpha_grad"} <= addresses[1].keys()
    with th.no_grad():
        update.run()
    for part, expected in zip((update, update.memory), addresses, strict=True):
        assert {name: getattr(part, name).data_ptr() for name in expected} == expected


@pytest.fixture
def stand_ins(monkeypatch):
    """For all that a capture calls of CUDA; nothing is captured."""
    cuda = mock.MagicMock()
    for name in ("CUDAGraph", "Stream", "stream", "graph", "current_stream", "synchronize"):
        monkeypatch.setattr(th.cuda, name, getattr(cuda, name))
    # A context that swallows exceptions would hide them.
    for context in (cuda.stream, cuda.graph):
        context.return_value.__exit__.return_value = False
    monkeypatch.setattr(th.cuda, "default_generators", (cuda.generator,))
    monkeypatch.setattr(th.random, "fork_rng", lambda devices: nullcontext())
    return cuda


def test_order_of_a_capture(stand_ins):
    agent = make()
    with mock.patch.object(cuda_update._Update, "run", lambda self: stand_ins.run()):
        update = cuda_update._captured(agent, batches(agent, 1)[0], th.device("cuda", 0))
    assert update is not None and update.run is stand_ins.CUDAGraph.return_value.replay
    wanted = ["current_stream().wait_stream", "run", "graph().__enter__", "graph().__exit__", "Stream().wait_stream"]
    names = [name for name, *_ in stand_ins.mock_calls if name in wanted]
    assert names == [wanted[4], "run", "run", "run", wanted[2], "run", wanted[3], wanted[0]]
    stand_ins.graph.assert_called_once_with(stand_ins.CUDAGraph.return_value, stream=stand_ins.Stream.return_value)
    stand_ins.generator.graphsafe_set_state.assert_not_called()


# ---------------------------------------------------------------------- where a capture fails


def test_a_failed_capture_warns_and_repairs_the_generator(stand_ins):
    agent = make()
    with mock.patch.object(cuda_update._Update, "run", side_effect=RuntimeError("not permitted when stream is capturing")):
        with pytest.warns(UserWarning, match="could not be captured .*not permitted when stream is capturing"):
            assert cuda_update._captured(agent, batches(agent, 1)[0], th.device("cuda", 0)) is None
    stand_ins.generator.graphsafe_set_state.assert_called_once_with(stand_ins.generator.clone_state.return_value)


def test_after_a_failed_capture_others_are_captured_anew(stand_ins, in_double):
    """They would draw from what the generator's state was."""
    other, agent = fast(make(double=True)), make()
    assert other in cuda_update._UPDATES
    with mock.patch.object(cuda_update._Update, "run", side_effect=RuntimeError), pytest.warns(UserWarning):
        cuda_update._captured(agent, batches(agent, 1)[0], th.device("cuda", 0))
    assert other not in cuda_update._UPDATES
    compare_from_here(other)


def test_a_failed_capture_leaves_nothing_beside(stand_ins, monkeypatch):
    """Else the end of the capture would raise an error of its own in place of the first."""
    agent = make()
    monkeypatch.setattr(SideStream, "join", lambda self: stand_ins.join())
    with mock.patch.object(cuda_update._Update, "run", side_effect=[None, None, None, RuntimeError("no")]):
        with pytest.warns(UserWarning, match=r"could not be captured .*\(no\)"):
            cuda_update._captured(agent, batches(agent, 1)[0], th.device("cuda", 0))
    names = [name for name, *_ in stand_ins.mock_calls]
    assert names.index("graph().__enter__") < names.index("join") < names.index("graph().__exit__")


def test_the_agent_survives_a_failed_capture(monkeypatch):
    tried = []
    monkeypatch.setattr(cuda_update, "_captured", lambda *args: tried.append(1))
    agent = run(make(), False)[0]
    before = copy.deepcopy(agent)
    for _ in range(3):
        assert train(agent, batches(agent, 2)) is False
    assert difference(agent, before) == 0 and agent._n_updates == before._n_updates
    assert len(tried) == 1
    train(agent, batches(agent, 2, 7))
    assert len(tried) == 2


def test_interrupted_within_a_capture(stand_ins):
    """The generator is repaired, and nobody is told that the capture failed."""
    agent = make()
    with mock.patch.object(cuda_update._Update, "run", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        cuda_update._captured(agent, batches(agent, 1)[0], th.device("cuda", 0))
    stand_ins.generator.graphsafe_set_state.assert_called_once_with(stand_ins.generator.clone_state.return_value)


# ---------------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.parametrize("case", [case for case in CASES if case != "schedule"])
def test_captured_equals_sb3(case):
    agent = make(device="cuda", **CASES[case])
    assert why_not_fast(agent) is None
    compare(agent, 1e-3, steps=20, update=train)
    assert "replay" in cuda_update._UPDATES[agent][1].run.__name__  # type: ignore[union-attr]


@gpu
def test_captured_equals_uncaptured(monkeypatch):
    agent, twin = (fast(make(device="cuda")) for _ in range(2))
    monkeypatch.setattr(cuda_update, "_captured", lambda agent, batch, device: cuda_update._Update(agent, batch))
    cuda_update._UPDATES.pop(twin)
    for learner in (agent, twin):
        learner._current_progress_remaining = 0.5
        learner.lr_schedule = lambda progress: 1e-2 * progress  # type: ignore[assignment]
        fast(learner, 20)
    assert difference(agent, twin) < 1e-4


@gpu
@pytest.mark.parametrize("case", ["plain", "fixed alpha", "three-step returns"])
def test_captured_equals_sb3_however_late_the_side_stream_is(case, monkeypatch):
    """What does not wait for it, or reuses what it still reads, would be found out."""
    beside = SideStream.beside

    @contextmanager
    def late(self):
        with beside(self):
            th.cuda._sleep(300_000)
            yield

    monkeypatch.setattr(SideStream, "beside", late)
    compare(make(device="cuda", **CASES[case]), 1e-3, steps=20, update=train)


@gpu
@pytest.mark.parametrize("owner, name", [(SideStream, "beside"), (cuda_update._Update, "_least_critic")])
def test_interrupted_in_a_capture_with_work_beside(owner, name, monkeypatch):
    """It is the interruption that arrives, and the next capture succeeds."""
    agent, original, calls = make(device="cuda"), getattr(owner, name), []

    def counted(self):
        calls.append(1)
        return original(self)

    with monkeypatch.context() as patch, th.no_grad():
        patch.setattr(owner, name, counted)
        captured_part(agent).run()
    per_run = len(calls)
    calls.clear()

    def interrupted(self):
        calls.append(1)
        # Of four times, the last is captured.
        if len(calls) > 3 * per_run:
            with original(self) if owner is SideStream else nullcontext():
                th.cuda._sleep(1)
                raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast(agent)
    compare(agent, 1e-3, steps=5, update=train)


@gpu
@pytest.mark.parametrize("change", [change for change in CHANGES if change != "parameters"])
def test_changes_take_effect_in_a_captured_update(change):
    agent, unchanged = (fast(make(device="cuda")) for _ in range(2))
    CHANGES[change](agent)
    compare_from_here(agent, tolerance=1e-2)
    assert difference(agent, fast(unchanged)) > 1e-6


@gpu
def test_schedule_in_a_captured_update():
    agent = make(device="cuda", learning_rate=lambda progress: 2e-3 * progress)
    fast(agent)
    agent._current_progress_remaining = 0.0
    before = copy.deepcopy(agent)
    fast(agent)
    assert th.equal(parts(agent)["actor"], parts(before)["actor"])


@gpu
def test_replays_draw_new_noise_from_the_default_generator():
    agent = make(device="cuda")
    batch = batches(agent, 1)[0]
    noises = []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        for _ in range(2):
            train(agent, [batch])
            noises.append(cuda_update._UPDATES[agent][1].noise.clone())  # type: ignore[union-attr]
    first, second, first_again, _, other, _ = noises
    assert not th.equal(first, second) and th.equal(first, first_again) and not th.equal(first, other)
    th.manual_seed(0)
    assert th.equal(first[0], th.empty_like(first[0]).normal_())


@gpu
def test_a_captured_agent_is_saved_loaded_and_copied():
    agent = fast(make(device="cuda"))
    loaded, copied = saved_and_loaded(agent), copy.deepcopy(agent)
    for other in (loaded, copied):
        assert difference(other, agent) == 0
    results = [fast(learner) for learner in (agent, loaded, copied)]
    assert max(difference(other, agent) for other in results) < 1e-4


def waits(call: Callable[[], Any]) -> list[str]:
    """What ``call`` has waited for the GPU for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        th.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            th.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]


@gpu
@pytest.mark.parametrize("loaded", [False, True])
def test_waits_for_the_gpu_once(loaded):
    agent = fast(make(device="cuda"))
    if loaded:
        agent = fast(saved_and_loaded(agent))
    ready = batches(agent, 10)
    th.cuda.synchronize()
    assert len(waits(lambda: train(agent, ready))) == 1


@gpu
@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_a_call_of_mbpo_waits_once(wrap):
    """Also for the real rows of its batches, which come from the host."""
    agent = MBPO("MlpPolicy", wrap(make_vec_env("Pendulum-v1")), device="cuda", **FAST)
    agent.learn(60)
    assert len(agent.replay_buffer.model_buffer) > 0  # type: ignore[union-attr]
    agent.train(5, 32)
    th.cuda.synchronize()
    assert len(waits(lambda: agent.train(5, 32))) == 1


@gpu
def test_a_capture_that_fails_leaves_agent_and_generator_intact(monkeypatch):
    run_ = cuda_update._Update.run

    def waiting(self) -> None:
        run_(self)
        self.sums.tolist()

    agent = run(make(device="cuda"), False)[0]
    before = copy.deepcopy(agent)
    monkeypatch.setattr(cuda_update._Update, "run", waiting)
    with pytest.warns(UserWarning, match="could not be captured"):
        assert not train(agent, batches(agent, 2))
    assert difference(agent, before) == 0
    assert not train(agent, batches(agent, 2))
    SAC.train(agent, 2, BATCH)
    assert all(value.isfinite().all() for value in parts(agent).values())


@gpu
def test_mbpo_on_a_gpu():
    agents = [MBPO("MlpPolicy", "Pendulum-v1", device="cuda", fast_update=how, **FAST) for how in (True, False)]
    for agent in agents:
        agent.learn(60)
    assert agents[0] in cuda_update._UPDATES and agents[1] not in cuda_update._UPDATES
    assert agents[0]._n_updates == agents[1]._n_updates
    assert all(np.isfinite(agents[0].logger.name_to_value[f"train/{key}"]) for key in ("actor_loss", "critic_loss"))
