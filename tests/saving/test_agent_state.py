"""What an agent counts is saved by everything that saves an agent; and nothing that changes while it learns is forgotten."""

import json
import random
import typing
from typing import Annotated, Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecEnv
from tiny import FAST

from sb3_mbpo import DHMBPO, MBPO, MBTD3
from sb3_mbpo.checkpoints.training_state import put_agent, take_agent
from sb3_mbpo.saving.agent_state import DERIVED, HINTS, OURS, decode_state, encode_state
from sb3_mbpo.variants import MBTQC, MBCrossQ

# Saved as tensors or as states of generators; a replay buffer is saved by itself.
SAVED_ELSEWHERE = (th.nn.Module, th.Tensor, th.optim.Optimizer, VecEnv, th.Generator, np.random.Generator, random.Random)
# Attributes of SB3's modules and ours that follow from the parameters, or are written before they are read.
OF_MODULES = {"_parameters", "_buffers", "_modules", "q_networks", "action_dist", "_input_gradient"}


def seen(owner: Any) -> dict[str, bytes]:
    """The content of each attribute that nothing else saves."""
    plain = {name: value for name, value in vars(owner).items() if not isinstance(value, SAVED_ELSEWHERE)}
    return {name: cloudpickle.dumps(value) for name, value in plain.items() if name not in ("replay_buffer", "_logger")}


def all_seen(agent: Any) -> dict[tuple[str, str], bytes]:
    found = {("agent", name): value for name, value in seen(agent).items()}
    for part, module in [(name, value) for name, value in vars(agent).items() if isinstance(value, th.nn.Module)]:
        for name, inside in module.named_modules(prefix=part):
            found |= {(name, key): value for key, value in seen(inside).items() if key not in OF_MODULES}
    return found


def forgotten(agent: Any) -> set[tuple[str, str]]:
    """What changes while an agent learns, and is lost when it is saved."""
    agent.learn(40)
    before = all_seen(agent)
    base: Any = next(kind for kind in type(agent).__mro__ if not kind.__module__.startswith(("sb3_mbpo", "test_")))
    of_sb3 = set(vars(base("MlpPolicy", "Pendulum-v1", buffer_size=10)))
    agent.learn(40, reset_num_timesteps=False)
    after = all_seen(agent)
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    # SB3's own go into checkpoints; what is left out belongs to the process.
    kept = set(HINTS) | set(DERIVED) | ({*take_agent(agent, {})["attributes"], "start_time"} & of_sb3)
    return {(owner, name) for owner, name in changed if owner != "agent" or name not in kept}


def made(cls: type = MBPO, **settings: Any) -> Any:
    busy: dict[str, Any] = {"rollout_filter": "macura", "model_train_freq": 35, "termination_fn": "learned"}
    busy["rollout_schedule"] = 2 if cls is DHMBPO else "auto"
    return cls("MlpPolicy", "Pendulum-v1", **{**FAST, **busy, "min_explained_variance": 0.1, "gradient_steps": 1, **settings})


@pytest.mark.filterwarnings("ignore:The dynamics was not used", "ignore:rollout_schedule=")
@pytest.mark.parametrize("cls", [MBPO, DHMBPO, MBTD3, MBTQC, MBCrossQ])
def test_nothing_is_forgotten(cls: type) -> None:
    """A new counter gets a line in AgentState. What may be lost, or follows from what is saved, gets one in DERIVED."""
    assert forgotten(made(cls)) == set()


class Counts(MBPO):
    """Counts in three places."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.n_trains, self.dynamics.n_trains = 0, 0  # type: ignore[assignment]
        self.details = {"trains": [0]}

    def train(self, *args: Any, **kwargs: Any) -> None:
        super().train(*args, **kwargs)
        self.n_trains += 1
        self.dynamics.n_trains += 1  # type: ignore[assignment, operator]
        self.details["trains"][0] += 1


@pytest.mark.filterwarnings("ignore:The dynamics was not used", "ignore:rollout_schedule=")
def test_the_test_sees_a_counter_that_is_not_declared() -> None:
    assert forgotten(made(Counts)) == {("agent", "n_trains"), ("agent", "details"), ("dynamics", "n_trains")}


# With three observations.
SIZES = {"forward_errors": 4, "explained_at_fit": 2, "prediction_bounds": 12}


def another(hint: Any) -> Any:
    """A valid value that is not the initial one."""
    if typing.get_origin(hint) is Annotated:
        kind, low, high = typing.get_args(hint)
        return kind((low + high) / 2)
    return {int: 7, float: 0.25, bool: True, list[float]: [0.5, 2.0], list[str]: ["gate"]}.get(hint, 7)


@pytest.fixture(scope="module")
def changed() -> Any:
    agent = made().learn(25)
    vars(agent).update({name: another(hint) for name, hint in HINTS.items()})
    vars(agent).update({name: [0.5] * size for name, size in SIZES.items()})
    return agent


def state(agent: Any) -> dict[str, Any]:
    """A loaded agent repeats its warnings."""
    return {name: getattr(agent, name) for name in HINTS if name != "_warned_of"}


@pytest.mark.parametrize("safe", [False, True])
def test_saved_and_loaded(tmp_path: Any, changed: Any, safe: bool) -> None:
    changed.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", safe=safe)
    assert state(loaded) == state(changed) and loaded._warned_of == []


def test_in_a_checkpoint(changed: Any) -> None:
    tensors: dict[str, th.Tensor] = {}
    taken = json.loads(json.dumps(take_agent(changed, tensors)))
    agent = made().learn(5)
    put_agent(agent, taken, {name: tensor.clone() for name, tensor in tensors.items()})
    assert state(agent) == state(changed) and agent._warned_of == changed._warned_of


def test_a_new_agent_has_its_own() -> None:
    first, second = made(), made()
    assert encode_state(first) == encode_state(second)
    for name in OURS:
        value = getattr(first, name)
        assert value != another(HINTS[name]) and (not isinstance(value, list) or value is not getattr(second, name))


def test_a_model_free_agent_has_none() -> None:
    assert not set(vars(made()._model_free())) & set(OURS)


WRONG: dict[Any, list[Any]] = {
    int: [-1, 2**63 - 1 + 1, 0.5, True, None, "3", [1]],
    float: [True, None, "x", {"$float": "nan"}, {"$float": "inf"}],
    bool: [0, 1, None, "true"],
    list[float]: [3, None, ["x"], [True], [{"$float": "nan"}], {"$tuple": [1.0]}],
    list[str]: [3, None, [1], "gate"],
}


@pytest.mark.parametrize("name", HINTS)
def test_what_no_file_may_say(changed: Any, name: str) -> None:
    hint, good = HINTS[name], encode_state(changed)
    assert decode_state(good, 3)[name] == getattr(changed, name) != []
    kind, *bounds = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    wrong = WRONG.get(kind) or [-1, 0.5, True, "3"]
    for value in [*wrong, *(bound + sign for bound, sign in zip(bounds, (-1, 1), strict=False)), {"$class": "os.system"}]:
        with pytest.raises(ValueError, match=rf"^state: {name}( is of an unknown kind|=)"):
            decode_state({**good, name: value}, 3)
    with pytest.raises(ValueError, match=r"^state must have num_timesteps"):
        decode_state({key: value for key, value in good.items() if key != name}, 3)


@pytest.mark.parametrize("hostile", [None, [], 3, {}, {"num_timesteps": 3}])
def test_what_is_no_state(hostile: Any) -> None:
    with pytest.raises(ValueError, match=r"^state must have"):
        decode_state(hostile, 3)
