import copy
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

from sb3_mbpo.arguments.user_functions import check_device, check_noise, check_schedule, dry_run, dry_run_filter
from sb3_mbpo.codec import Codec
from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.terminations.known import NeverTerminates
from sb3_mbpo.trust.filters import FilterResult, Macura, RolloutFilter

OBS = spaces.Box(np.array([-1.0, -np.inf, 0.0]), np.array([1.0, np.inf, np.inf]), dtype=np.float64)
ACTION = spaces.Box(-2.0, 3.0, (2,))


# ---------------------------------------------------------------- users' functions


def test_dry_run_hands_out_what_the_spaces_allow() -> None:
    seen = []

    def fn(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        seen.extend([obs, actions, next_obs])
        return obs[:, 0] > 0

    OBS.seed(3)
    before, space_before = th.get_rng_state(), copy.deepcopy(OBS)
    dry_run(fn, "termination_fn", Codec(OBS, ACTION), "cpu")
    obs, actions, next_obs = seen[:3]
    assert [len(part) for part in seen] == [13] * 3 + [1] * 3
    assert obs.shape == next_obs.shape == (len(obs), 3) and actions.shape == (len(obs), 2)
    assert all(x.dtype == th.float32 and x.isfinite().all() for x in seen)
    assert obs[:, 0].abs().max() <= 1 and obs[:, 2].min() >= 0 and obs[:, 1].abs().max() > 1
    assert actions.min() >= -2 and actions.max() <= 3 and actions.max() > 1
    assert th.equal(th.get_rng_state(), before)
    assert np.array_equal(OBS.sample(), space_before.sample())


@pytest.mark.parametrize(
    ("fn", "returns", "words"),
    [
        (lambda o, a, n: o[:, :1] > 0, "bool", "shape (13, 1)"),
        (lambda o, a, n: (o > 0).all(), "bool", "shape ()"),
        (lambda o, a, n: o[:, 0], "bool", "torch.float32"),
        (lambda o, a, n: (o[:, 0] > 0).float(), "bool", "torch.float32"),
        (lambda o, a, n: (o[:, 0] > 0).numpy(), "bool", "returned ndarray"),
        (lambda o, a, n: None, "bool", "returned NoneType"),
        (lambda o, a, n: th.zeros(13, dtype=th.bool, device="meta"), "bool", "on meta"),
        (lambda o, a, n: (o[:, :1] > 0).squeeze(), "bool", "shape ()"),
        (lambda o, a, n: o.clamp_(0, 0)[:, 0] > 0, "bool", "modifies its inputs"),
        (lambda o, a, n: o[:, 7] > 0, "bool", "raised IndexError"),
        (lambda o, a: o[:, 0] > 0, "bool", "raised TypeError"),
        (lambda o, a, n: o[:, 0] > 0, "float", "torch.bool"),
        (lambda o, a, n: o, "float", "shape (13, 3)"),
    ],
)
def test_dry_run_refuses(fn: Any, returns: Any, words: str) -> None:
    name = "termination_fn" if returns == "bool" else "reward_fn"
    with pytest.raises(ValueError) as error:
        dry_run(fn, name, Codec(OBS, ACTION), "cpu", returns)
    message = str(error.value)
    assert message.startswith(f"{name}=test_dry_run") or message.startswith(f"{name}=<lambda>")
    assert words in message and f"must return a {returns} tensor of shape (B,)" in message
    assert (error.value.__cause__ is not None) == ("raised" in words)


def test_dry_run_and_non_finite_values() -> None:
    """Refused where any observation may come; made-up ones of an unbounded space may be none the function is made for."""

    def log_of_room(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return (obs[:, 0] - 2).log()

    with pytest.raises(ValueError, match="non-finite"):
        dry_run(log_of_room, "reward_fn", Codec(spaces.Box(-1, 1, (3,)), ACTION), "cpu", "float")
    dry_run(log_of_room, "reward_fn", Codec(OBS, ACTION), "cpu", "float")


def test_dry_run_accepts() -> None:
    dry_run(NeverTerminates(), "termination_fn", Codec(OBS, ACTION), "cpu")
    dry_run(lambda o, a, n: a[:, 0] > n[:, 0], "termination_fn", Codec(OBS, ACTION), "cpu", "bool")
    dry_run(lambda o, a, n: o[:, 0].double(), "reward_fn", Codec(OBS, ACTION), "cpu", "float")
    huge = spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (3,))
    dry_run(lambda o, a, n: o.square().sum(1), "reward_fn", Codec(huge, ACTION), "cpu", "float")


# ---------------------------------------------------------------- learning rates


@pytest.mark.parametrize("rate", [lambda progress: progress * 1e-3, lambda progress: np.float32(0.1)])
def test_learning_rates(rate):
    check_schedule(rate)


def ends_badly(progress):
    return 1e-3 if progress > 0 else math.nan


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (ends_badly, "learning_rate=.*ends_badly returned nan at progress_remaining=0, where it must return a number"),
        (lambda progress: progress - 0.5, "returned -0.5 at progress_remaining=0"),
        (lambda progress: "fast", "learning_rate=.* raised ValueError: .* at progress_remaining=1"),
        (lambda: 1e-3, "learning_rate=.* raised TypeError"),
        (lambda progress: 1 / (1 - progress), "learning_rate=.* raised ZeroDivisionError"),
    ],
)
def test_no_learning_rates(rate, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(rate)


# ---------------------------------------------------------------- noise


def test_noise_is_tried_on_a_copy():
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))
    np.random.seed(1)
    expected = np.random.get_state()[1].tolist()
    check_noise(noise, 1, (2,))
    assert np.random.get_state()[1].tolist() == expected and (noise.noise_prev == 0).all()
    check_noise(VectorizedActionNoise(noise, 3), 3, (2,))
    check_noise(NormalActionNoise(np.zeros(1), np.ones(1)), 4, (2,))


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (NormalActionNoise(np.zeros(3), np.ones(3)), "could not be broadcast"),
        (NormalActionNoise(np.zeros(2), np.full(2, np.nan)), "it returned"),
        (NormalActionNoise(np.zeros(2), -np.ones(2)), "ValueError"),
        (VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), 3), "could not be broadcast"),
    ],
)
def test_noise_that_fits_no_action(noise, words):
    with pytest.raises(ValueError, match=f"(?s)action_noise=.* finite noise of shape .*{words}"):
        check_noise(noise, 1, (2,))


# ---------------------------------------------------------------- filters


def keeps(**other):
    """A rule that keeps everything, with some of what it returns replaced."""

    def rule(mean, var, rollout_step):
        everything = th.ones(mean.shape[1], dtype=th.bool)
        return FilterResult(mean[0], everything, everything)._replace(
            **{key: value(mean) if callable(value) else value for key, value in other.items()}
        )

    return rule


def tried(rule, **kwargs):
    dynamics = ProbabilisticEnsemble(3, 1, seed=0, net_arch=[4], **{"n_members": 3, "n_elites": 2, **kwargs})
    before = dynamics.generator.get_state()
    try:
        dry_run_filter(lambda transitions: RolloutFilter(rule, dynamics, transitions, []), rule, dynamics)
    finally:
        assert th.equal(dynamics.generator.get_state(), before)


@pytest.mark.parametrize("rule", [Macura(), keeps(), keeps(state=lambda mean: mean[0])], ids=["macura", "plain", "with state"])
def test_rules_that_fit(rule):
    tried(rule)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (3, "'int' object is not callable"),
        (print, "it returned NoneType"),
        (lambda mean, var: None, "TypeError"),
        (lambda mean, var, branches: 1 / 0, "ZeroDivisionError"),
        (lambda mean, var, branches: (mean[0], None, None, None), "it returned tuple"),
        (keeps(prediction=lambda mean: mean[0, :, :1]), r"its prediction has shape \(13, 1\), not \(13, 4\)"),
        (keeps(prediction=lambda mean: mean[0].long()), "its prediction is not floating point"),
        (keeps(keep=lambda mean: mean[0, :, :1] > 0), r"keep is torch.bool of shape \(13, 1\), not bool of shape \(13,\)"),
        (keeps(proceed=lambda mean: mean[0, :, 0]), "proceed is torch.float32"),
        (keeps(keep=True), "AttributeError"),
        # A lone row loses its dimension.
        (keeps(keep=lambda mean: (mean[0, :, 0] < 9).squeeze()), r"keep is torch.bool of shape \(\)"),
        (keeps(state=th.zeros(2, 3)), "its state has 2 rows, not 13"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_rules_that_do_not_fit(rule, words):
    with pytest.raises(
        ValueError, match=f"(?s)rollout_filter=.* must be None, 'macura', 'infoprop', 'm2ac', or a rule.*{words}"
    ):
        tried(rule)


def test_a_dynamics_that_no_rule_can_go_by():
    class NoMembers(DynamicsModel):
        def fit(self, transitions, progress=None):
            return {}

        def sample(self, obs, actions):
            return obs, obs[:, 0]

    with pytest.raises(
        ValueError, match="rollout_filter='macura' needs the predictions of members, but NoMembers has no method pre"
    ):
        dry_run_filter(lambda transitions: None, "macura", NoMembers(3, 1))
    with pytest.raises(ValueError, match=r"predict returned \(1, 13, 4\), not \(2 members or more, 13, 4\)"):
        tried(keeps(), n_elites=1)


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0", th.device("cpu")])
def test_devices(device):
    assert check_device(device) is None


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "meta", None, True, 0.5, ["cpu"], 10**30])
def test_no_devices(device):
    with pytest.raises(ValueError) as error:
        check_device(device)
    assert f"device={device!r} must be" in str(error.value) and '"auto", "cpu", "cuda"' in str(error.value)


@pytest.mark.parametrize("device", ["mps", th.device("mps")])
def test_a_device_without_float64(device):
    with pytest.raises(ValueError, match=r"MPS has no float64.*pass device='cpu'"):
        check_device(device)


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU, and so it is taken")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", th.device("cuda")])
def test_a_gpu_that_is_not_there(device):
    warning = check_device(device)
    assert warning is not None and repr(device) in warning and "CPU" in warning
