"""The codec: converts observations and actions between the env's own form and flat vectors."""

from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch as th
from gymnasium import spaces

# An array or a tensor, or a dict of these if the observation space is a Dict.
Observation: TypeAlias = Any


class Codec:
    """
    Converts observations and actions between the env's form and the form of everything that is learned.

    The env's observations are arrays, or dicts of arrays if the space is a Dict, and its actions are in the units of the
    action space. Dynamics, learned reward and termination, model buffer and model rollouts use flat vectors: observations of
    size ``obs_dim``, and actions of size ``action_dim`` in [-1, 1], as in SB3's replay buffer. The entries of a Dict are
    concatenated in the order of the space, as ``gymnasium.wrappers.FlattenObservation`` does.

    All methods take NumPy arrays or tensors, with any number of batch dimensions in front.

    :param observation_space: A Box, or a Dict of Boxes
    :param action_space: A Box with finite bounds
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        assert isinstance(observation_space, spaces.Box | spaces.Dict) and isinstance(action_space, spaces.Box)
        self.observation_space, self.action_space = observation_space, action_space
        #: Whether observations are dicts.
        self.is_dict = isinstance(observation_space, spaces.Dict)
        # The space of each entry; a Box is a single entry without a name.
        self._boxes: dict[Any, Any] = {None: observation_space}
        if isinstance(observation_space, spaces.Dict):
            self._boxes = dict(observation_space.spaces)
        self._sizes = [prod(box.shape) for box in self._boxes.values()]
        self.obs_dim, self.action_dim = sum(self._sizes), prod(action_space.shape)

    @property
    def entries(self) -> list[list[Any]]:
        """Name and shape of each entry of an observation, in their order; a Box is one entry without a name."""
        return [[name, list(box.shape)] for name, box in self._boxes.items()]

    @property
    def flat_space(self) -> spaces.Box:
        """The space of flat observations ``(obs_dim,)``, with a dtype that holds the values of all entries."""
        dtype = np.result_type(*(box.dtype for box in self._boxes.values()))
        bounds = ([getattr(box, name).ravel() for box in self._boxes.values()] for name in ("low", "high"))
        low, high = (np.concatenate(bound).astype(dtype) for bound in bounds)
        return spaces.Box(low, high, dtype=dtype.type)

    @property
    def stored_space(self) -> spaces.Box:
        """The space of observations in the replay buffer: a Box as it is, as in SB3, and a Dict as :attr:`flat_space`."""
        return self.flat_space if isinstance(self.observation_space, spaces.Dict) else self.observation_space

    def flatten(self, obs: Observation) -> Any:
        """
        :param obs: observations ``(..., *obs_shape)``, or a dict of these
        :return: ``(..., obs_dim)``
        """
        parts = [_flat(obs[key] if self.is_dict else obs, box.shape) for key, box in self._boxes.items()]
        if not self.is_dict:
            return parts[0]
        return th.cat(parts, dim=-1) if isinstance(parts[0], th.Tensor) else np.concatenate(parts, axis=-1)

    def unflatten(self, flat: Any) -> Observation:
        """
        :param flat: flat observations ``(..., obs_dim)``
        :return: observations ``(..., *obs_shape)``, or a dict of these; arrays in a dict have the dtype of their space
        """
        batch = flat.shape[:-1]
        if not self.is_dict:
            return flat.reshape((*batch, *self._boxes[None].shape))
        ends = np.cumsum(self._sizes).tolist()
        parts = {key: flat[..., end - n : end] for key, n, end in zip(self._boxes, self._sizes, ends, strict=True)}
        obs = {key: part.reshape((*batch, *self._boxes[key].shape)) for key, part in parts.items()}
        if isinstance(flat, th.Tensor):
            return obs
        return {key: part.astype(self._boxes[key].dtype, copy=False) for key, part in obs.items()}

    def encode_actions(self, actions: Any) -> Any:
        """
        :param actions: in the env's units, ``(..., *action_shape)``
        :return: flat and in [-1, 1], ``(..., action_dim)``
        """
        low, high = self._bounds(actions)
        return _flat(2.0 * ((actions - low) / (high - low)) - 1.0, low.shape)

    def decode_actions(self, actions: Any) -> Any:
        """
        :param actions: flat and in [-1, 1], ``(..., action_dim)``
        :return: in the env's units, ``(..., *action_shape)``
        """
        low, high = self._bounds(actions)
        return low + 0.5 * (actions.reshape((*actions.shape[:-1], *low.shape)) + 1) * (high - low)

    def decode(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> tuple[Observation, th.Tensor, Observation]:
        """
        Convert flat transitions to the inputs of a ``termination_fn`` or a ``reward_fn``.

        :param obs: ``(B, obs_dim)``
        :param actions: in [-1, 1], ``(B, action_dim)``
        :param next_obs: ``(B, obs_dim)``
        :return: all three in the env's form
        """
        return self.unflatten(obs), self.decode_actions(actions), self.unflatten(next_obs)

    def _bounds(self, actions: Any) -> tuple[Any, Any]:
        """:return: bounds of the action space, as arrays, or as float32 tensors on the device of ``actions``"""
        low, high = self.action_space.low, self.action_space.high
        if isinstance(actions, th.Tensor):
            return tuple(th.as_tensor(bound, dtype=th.float32, device=actions.device) for bound in (low, high))  # type: ignore
        return low, high


def _flat(array: Any, shape: tuple[int, ...]) -> Any:
    """:return: an array or tensor ``(..., *shape)`` as ``(..., prod(shape))``"""
    return array.reshape((*array.shape[: array.ndim - len(shape)], prod(shape)))
