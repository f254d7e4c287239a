"""Whatever is passed for an argument: the agent learns, with finite parameters, or an error names argument and value."""

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sb3_mbpo import MBPO, MBTD3, MBTQC, MBCrossQ, ProbabilisticEnsemble
from sb3_mbpo.validation.rules import numbers_in

TINY: dict[str, Any] = {
    "policy": "MlpPolicy",
    "policy_kwargs": {"net_arch": [4]},
    "buffer_size": 50,
    "batch_size": 4,
    "learning_starts": 10,
    "rollout_batch_size": 5,
    "gradient_steps": 1,
    "seed": 0,
    "device": "cpu",
}
DYNAMICS: dict[str, Any] = {"net_arch": [4], "n_members": 2, "n_elites": 1, "max_updates": 1}


class Line(gym.Env):
    """A point on a line; an episode has five steps."""

    observation_space = spaces.Box(-10, 10, (2,))
    action_space = spaces.Box(-2, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.zeros(2, np.float32)
        self.steps = 0
        return self.place, {}

    def step(self, action):
        self.place = np.clip(self.place + np.array([action[0], 0.1]), -10, 10).astype(np.float32)
        self.steps += 1
        return self.place, float(-abs(self.place[0])), False, self.steps == 5, {}


def first_column(obs, actions, next_obs):
    return obs[:, 0]


def half(number):
    return number / 2


# Nothing between a few and 10^12, which is valid for some arguments, and would take hours there.
ANYTHING = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            10**12,
            2**63,
            10**30,
            10**400,
            -(10**12),
            math.nan,
            math.inf,
            -math.inf,
            1e30,
            1e300,
            -1e300,
            5e-324,
        ]
    ),
    st.sampled_from(
        ["", "auto", "auto_0.1", "auto_x", "many", "nan", "inf", "0.5", "3", "-1", "false", "math.sqrt", "no.such", "macura"]
    ),
    st.sampled_from(
        [(1, "step"), (2, "episode"), (0, "step"), (1, "day"), [3, "step"], [], [4], [4, 4], [0], (), {}, {"a": 1}]
    ),
    st.sampled_from([first_column, half, math.sqrt, print, object, object(), b"1", 1j, slice(3), range(3)]),
    st.sampled_from(
        [np.float32(0.5), np.float64("nan"), np.int64(2), np.bool_(True), np.array([1, 2]), np.array(1), th.tensor(0.5)]
    ),
    st.integers(-3, 6),
    st.floats(-2, 2),
    st.floats(1e12, None),
)
SCHEDULES = st.fixed_dictionaries({key: ANYTHING for key in ("min_length", "max_length", "start", "end")})
# tensorboard_log and env are texts that others judge, and so is policy.
SHARED = sorted(
    inspect.signature(MBPO).parameters.keys() - {"tensorboard_log", "env", "policy", "_init_setup_model", "verbose"}
)
OWN = {
    MBPO: [],
    MBTD3: ["policy_delay", "target_policy_noise", "target_noise_clip"],
    MBTQC: ["top_quantiles_to_drop_per_net"],
    MBCrossQ: ["policy_delay"],
}
ENSEMBLE = sorted((ProbabilisticEnsemble.__init__.__kwdefaults__ or {}).keys() - {"seed", "device"})


@st.composite
def passed(draw):
    """An algorithm, and one to three of its arguments or of its dynamics'."""
    cls = draw(st.sampled_from([MBPO, MBPO, MBPO, MBTD3, MBTQC, MBCrossQ]))
    names = OWN[cls] * 5 + [name for name in SHARED if name in cls.__signature__.parameters]
    arguments = draw(st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=2))
    if draw(st.booleans()):
        arguments.pop("dynamics_kwargs", None)
        arguments["dynamics_kwargs"] = draw(st.dictionaries(st.sampled_from(ENSEMBLE), ANYTHING, min_size=1, max_size=1))
    if draw(st.integers(0, 9)) == 0:
        arguments["rollout_schedule"] = draw(SCHEDULES)
    return cls, arguments


def words_of(value):
    """How a message may show a value: as it was passed, as it was read, or the part of it that was wrong."""
    if isinstance(value, Mapping):
        yield from (word for item in [*value.keys(), *value.values()] for word in words_of(item))
    if callable(value):
        yield getattr(value, "__qualname__", "")
    if isinstance(value, str) and "." in value:
        # A function by its dotted name: read as that function, which errors show without quotation marks.
        yield value
    read = numbers_in(value)
    for form in (value, read, tuple(read) if isinstance(read, list) else read):
        try:
            yield repr(form)
        except ValueError:
            yield "<int whose repr raises ValueError>"
        if isinstance(form, float) and form.is_integer():
            yield repr(int(form))


def names_it(error, arguments):
    """Whether a message has the name of an argument and its value."""
    message = str(error)
    return any(
        name in message and any(word[:300] in message for word in words_of(value) if word) for name, value in arguments.items()
    )


def outcome(act, arguments):
    """What comes of it; ``None`` after an error that says what is wrong."""
    with warnings.catch_warnings():
        # Batches larger than the buffer and the like.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return act()
        except (ValueError, TypeError) as error:
            # SB3 names an unknown key of policy_kwargs, but not this argument.
            if isinstance(error, TypeError) and set(arguments.get("policy_kwargs") or ()) & set(str(error).split("'")):
                return None
            assert names_it(error, arguments), f"{arguments} -> {type(error).__name__}: {error}"
            return None


def learns_or_says_why(cls, arguments):
    ensemble = {**DYNAMICS, **(arguments["dynamics_kwargs"] if isinstance(arguments.get("dynamics_kwargs"), dict) else {})}
    kwargs = {**TINY, "env": Line(), **arguments}
    if "dynamics_kwargs" not in arguments or isinstance(arguments["dynamics_kwargs"], dict):
        kwargs["dynamics_kwargs"] = ensemble
    if isinstance(kwargs["dynamics_kwargs"], dict) and callable(kwargs.get("dynamics_class")):
        kwargs["dynamics_kwargs"] = None
    agent = outcome(lambda: cls(**kwargs).learn(13), arguments)
    if agent is None:
        return
    assert agent.num_timesteps >= 13
    assert all(parameter.isfinite().all() for parameter in agent.policy.state_dict().values()), arguments
    assert agent.replay_buffer.model_buffer.contents()[0].isfinite().all(), arguments
    assert np.isfinite(agent.predict(np.zeros(2, np.float32))[0]).all(), arguments


QUICK = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=60, print_blob=False
)


@QUICK
@given(passed())
def test_any_arguments(given):
    learns_or_says_why(*given)


@pytest.mark.expensive
@settings(QUICK, max_examples=3000)
@given(passed())
@pytest.mark.timeout(3000)
def test_any_arguments_at_length(given):
    learns_or_says_why(*given)


@pytest.fixture(scope="module")
def agent():
    return MBPO(**TINY, env=Line(), dynamics_kwargs=DYNAMICS)


# A valid total_timesteps of 10^12 is one that is asked for, and a progress bar is another's work.
OF_LEARN = ["total_timesteps", "callback", "log_interval", "tb_log_name", "reset_num_timesteps", "progress_bar"]


def is_work(name, value):
    number = numbers_in(value)
    return (name == "total_timesteps" and isinstance(number, int | float) and number > 100) or (
        name == "progress_bar" and isinstance(value, int | np.bool_) and bool(value)
    )


@QUICK
@given(st.sampled_from(OF_LEARN), ANYTHING)
def test_any_arguments_of_learn(agent, name, value):
    # Callables are called with (locals, globals); these are none of that kind.
    if is_work(name, value) or (name == "callback" and callable(value) and not isinstance(value, type)):
        return
    outcome(lambda: agent.learn(**{"total_timesteps": 1, name: value}), {name: value})
    assert all(parameter.isfinite().all() for parameter in agent.policy.state_dict().values())
