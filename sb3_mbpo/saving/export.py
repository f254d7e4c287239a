"""Exports an agent's policy as a file that runs without this package: ONNX or TorchScript."""

import copy
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_mbpo.saving.save_load import Saving
from sb3_mbpo.saving.whole_files import written_whole
from sb3_mbpo.validation.rules import shown

# Names of the input and the output in an ONNX file.
OBSERVATIONS, ACTIONS = "observations", "actions"
# Packages that PyTorch needs to write ONNX files.
ONNX = ("onnx", "onnxscript")
# Maximum difference from `predict`, as a fraction of half the range of an action.
TOLERANCE = 1e-4
# Number of observations that are compared before a file is written.
N_TRIED = 32


class Normalizer(nn.Module):
    """
    Normalizes observations like ``VecNormalize``, with a copy of its statistics.

    ``VecNormalize`` computes in float64. Here, the mean is stored as the sum of two float32 numbers, so that the difference
    from a mean far from 0 is as exact.

    :param statistics: A ``VecNormalize``
    """

    mean_high: th.Tensor
    mean_low: th.Tensor
    scale: th.Tensor

    def __init__(self, statistics: Any) -> None:
        super().__init__()
        mean, scale = statistics.obs_rms.mean, 1 / np.sqrt(statistics.obs_rms.var + statistics.epsilon)
        high = np.asarray(mean, np.float32)
        self.register_buffer("mean_high", th.as_tensor(high))
        self.register_buffer("mean_low", th.as_tensor(np.asarray(mean - high, np.float32)))
        self.register_buffer("scale", th.as_tensor(np.asarray(scale, np.float32)))
        self.clip = float(statistics.clip_obs)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: raw observations ``(B, *obs_shape)``
        :return: normalized observations, same shape
        """
        centred = (observations - self.mean_high) - self.mean_low
        return (centred * self.scale).clamp(-self.clip, self.clip)


def _within(bound: np.ndarray, inside: float) -> np.ndarray:
    """:return: the float32 number that is nearest to a bound and not outside of it"""
    rounded = np.asarray(bound, np.float32)
    is_outside = rounded < bound if inside > 0 else rounded > bound
    return np.where(is_outside, np.nextafter(rounded, np.float32(inside)), rounded)


class ActionScale(nn.Module):
    """
    Scales actions from [-1, 1] to the units of the env.

    :param low: Lower bounds of the env's actions ``(*action_shape,)``
    :param high: Upper bounds ``(*action_shape,)``
    """

    low: th.Tensor
    high: th.Tensor
    half_range: th.Tensor

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("low", th.as_tensor(_within(low, np.inf)))
        self.register_buffer("high", th.as_tensor(_within(high, -np.inf)))
        self.register_buffer("half_range", th.as_tensor(np.asarray((np.float64(high) - np.float64(low)) / 2, np.float32)))

    def forward(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: actions in [-1, 1], ``(B, action_dim)``
        :return: actions in the env's units, within the bounds, ``(B, *action_shape)``
        """
        actions = actions.reshape(-1, *self.low.shape)
        scaled = self.low + (actions + 1) * self.half_range
        # Rounding may exceed a bound in the last digit, and a robot may refuse that.
        return th.minimum(th.maximum(scaled, self.low), self.high)


class ExportedPolicy(nn.Module):
    """
    A copy of the agent's policy on the CPU that maps raw observations to deterministic actions in the env's units.

    :param agent: An algorithm with an actor like SAC's or TD3's
    :param statistics: A ``VecNormalize``; ``None``: the agent learned from raw observations
    :raises ValueError: the actor is of another kind
    """

    def __init__(self, agent: Any, statistics: Any) -> None:
        super().__init__()
        policy: Any = getattr(agent.policy, "_orig_mod", agent.policy)
        # DHMBPO acts with averaged weights.
        actor = getattr(policy, "deterministic_actor", policy.actor)
        if not (isinstance(getattr(actor, "mu", None), nn.Module) and isinstance(actor.features_extractor, nn.Module)):
            raise ValueError(f"export: the actor {type(actor).__name__} has no features_extractor and mu, as SB3's have")
        parts: list[Any] = [] if statistics is None else [Normalizer(statistics)]
        parts.append(actor.features_extractor)
        # TD3's mu is the whole network, including tanh; SAC's is the last layer.
        parts += [actor.latent_pi, actor.mu, nn.Tanh()] if hasattr(actor, "latent_pi") else [actor.mu]
        parts.append(ActionScale(agent.action_space.low, agent.action_space.high))
        self.parts = nn.ModuleList(copy.deepcopy(part).cpu() for part in parts)
        self.train(False).requires_grad_(False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: observations of the env ``(B, *obs_shape)``, float32
        :return: actions in the env's units ``(B, *action_shape)``, float32
        """
        values = observations.float()
        for part in self.parts:
            values = part(values)
        return values


def _tried(agent: Any, statistics: Any) -> np.ndarray:
    """:return: random observations ``(N_TRIED, *obs_shape)`` with the given statistics, within the bounds of the space"""
    space = agent.observation_space
    drawn = np.random.default_rng(0).normal(size=(N_TRIED, *space.shape))
    if statistics is not None:
        drawn = drawn * np.sqrt(statistics.obs_rms.var) + statistics.obs_rms.mean
    return drawn.clip(space.low, space.high).astype(np.float32)


def check_equal(policy: Any, agent: Any, statistics: Any) -> None:
    """
    Compare an exported policy with ``predict`` of the agent.

    :param policy: maps float32 observations to actions
    :param agent: the agent
    :param statistics: see :class:`ExportedPolicy`
    :raises ValueError: the actions differ
    """
    observations = _tried(agent, statistics)
    seen = observations.astype(agent.observation_space.dtype)
    expected, _ = agent.predict(seen if statistics is None else statistics.normalize_obs(seen), deterministic=True)
    actions = policy(th.as_tensor(observations)).numpy()
    half_range = (np.float64(agent.action_space.high) - np.float64(agent.action_space.low)) / 2
    error = float(np.max(np.abs(actions - expected) / half_range))
    # Not `error > TOLERANCE`, which is false for NaN.
    if not error <= TOLERANCE:
        raise ValueError(
            f"export: the file's actions would differ from those of predict by {error:.2g} of their half range. The policy "
            f"{type(agent.policy).__name__} computes them in another way than Stable-Baselines3's does"
        )


def torchscript(policy: ExportedPolicy, example: th.Tensor) -> tuple[bytes, Any]:
    """
    :param policy: the policy
    :param example: observations to trace it with
    :return: content of a ``.pt`` file, and the program in it
    """
    with warnings.catch_warnings():
        # PyTorch recommends torch.export instead, but its files need the same version of PyTorch to run.
        warnings.simplefilter("ignore", DeprecationWarning)
        program = th.jit.trace(policy, example, check_trace=False)
        buffer = io.BytesIO()
        th.jit.save(program, buffer)
    return buffer.getvalue(), program


def onnx(policy: ExportedPolicy, example: th.Tensor) -> bytes:
    """
    :param policy: the policy
    :param example: observations to trace it with
    :return: content of an ``.onnx`` file
    :raises ImportError: packages that PyTorch needs for ONNX are missing
    """
    missing = [name for name in ONNX if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export: a path that ends in .onnx needs {' and '.join(missing)}: in the checkout of sb3_mbpo, "
            'pip install ".[export]". One that ends in .pt needs nothing more'
        )
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        # PyTorch's own deprecations, and packages for images that are not installed.
        warnings.simplefilter("ignore")
        logging.disable(max(level, logging.WARNING))
        try:
            program: Any = th.onnx.export(
                policy,
                (example,),
                dynamo=True,
                input_names=[OBSERVATIONS],
                output_names=[ACTIONS],
                dynamic_shapes=({0: th.export.Dim("batch")},),
                verbose=False,
            )
        finally:
            logging.disable(level)
    return program.model_proto.SerializeToString()


class Exporting(Saving):
    """The part of :class:`ModelBased` that exports its policy."""

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        statistics = self.get_vec_normalize_env()
        self.normalized_observations = statistics is not None and bool(statistics.norm_obs)
        return super()._setup_learn(*args, **kwargs)

    def export(self, path: str | Path, vec_normalize: VecNormalize | None = None) -> None:
        """
        Write the policy to one file that runs without this package and without Stable-Baselines3.

        Its input is ``observations``, float32 ``(B, *obs_shape)`` for any B, as the env returns them. The statistics of
        ``VecNormalize`` and the features extractor are in the file. Its output is ``actions``, float32 ``(B, *action_shape)``,
        in the env's units, equal to those of ``predict(deterministic=True)``. They are compared before the file is written.

        :param path: a name that ends in ``.onnx``, or in ``.pt`` for TorchScript
        :param vec_normalize: the statistics; ``None``: those of the agent's env, if it has any
        :raises ValueError: the name has another ending, observations are dicts or images, statistics are missing, the policy
            cannot be copied, or parameters are not finite
        :raises ImportError: the packages of the extra ``export`` are missing, which ONNX needs
        """
        path = Path(path)
        if path.suffix not in (".onnx", ".pt"):
            raise ValueError(f"export: path={shown(str(path))} must end in .onnx, or in .pt for TorchScript")
        if self.codec.is_dict:
            raise ValueError(
                "export: Dict observations are not supported. Learn with gymnasium.wrappers.FlattenObservation(env) and "
                "policy='MlpPolicy'"
            )
        if is_image_space(self.observation_space):
            raise ValueError(f"export: images are not supported: the observation space is {self.observation_space}")
        self.check_parameters()
        statistics = self._statistics(vec_normalize)
        policy = ExportedPolicy(self, statistics)
        check_equal(policy, self, statistics)
        # Two rows, because PyTorch's exporter treats 0 and 1 as constants.
        example = th.as_tensor(_tried(self, statistics)[:2])
        if path.suffix == ".onnx":
            content = onnx(policy, example)
        else:
            content, program = torchscript(policy, example)
            check_equal(program, self, statistics)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, "") as file:
            file.write(content)

    def _statistics(self, given: Any) -> VecNormalize | None:
        """:return: the statistics of the observations; ``None``: the policy gets them raw"""
        if given is not None and not isinstance(given, VecNormalize):
            raise ValueError(f"export: vec_normalize={shown(given)} must be a VecNormalize of Stable-Baselines3")
        statistics = self.get_vec_normalize_env() if given is None else given
        if statistics is not None and statistics.norm_obs:
            moments: Any = statistics.obs_rms
            shape = np.shape(moments.mean)
            if shape != self.observation_space.shape:
                raise ValueError(
                    f"export: the statistics of vec_normalize are of shape {shape}, observations of "
                    f"{self.observation_space.shape}; pass the VecNormalize that the agent learned with"
                )
            return statistics
        if self.normalized_observations:
            raise ValueError(
                "export: the agent learned from observations normalized by VecNormalize, and the statistics are missing. Pass "
                "vec_normalize=VecNormalize.load(path, env), or load the agent with such an env"
            )
        return None
