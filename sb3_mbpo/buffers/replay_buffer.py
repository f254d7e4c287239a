"""The replay buffer: it stores real transitions, and mixes them with the imagined ones of a ModelBuffer when sampled."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.buffers.checks import check_finite, check_fits, other_n_envs
from sb3_mbpo.buffers.model_buffer import ModelBuffer
from sb3_mbpo.buffers.normalization import normalize_obs, normalize_rewards, to_device_async
from sb3_mbpo.codec import Codec, Observation
from sb3_mbpo.validation.argument_table import REPLAY_BUFFERS
from sb3_mbpo.validation.episode_ends import Steps, lost_ends, reported_limit

# Maximum number of values drawn at once: enough to make the calls cheap, few enough for a CPU's caches.
BLOCK_NUMBERS = 2**20
# Number of newest steps that are checked for time limits reported as terminations.
ENDS_LOOKED_AT = 20_000
# SB3's storage arrays, one row per step: (buffer_size, n_envs, ...).
ROWS = ("observations", "actions", "next_observations", "dones", "rewards", "timeouts")


def balanced_ratio(updates: float) -> float:
    """
    The fraction of real rows for which each real row is drawn as often as by SAC with one update per transition.

    For 20 updates, this is the paper's 0.05. With fewer updates and 0.05, the agent would learn less from real transitions
    than SAC does. It is at most 0.5, so that half of each batch can be imagined.

    :param updates: number of gradient updates per env transition
    :return: fraction of real rows, from 0.05 to 0.5
    """
    return min(max(1 / max(updates, 1e-9), 0.05), 0.5)


def _with_room(filled: np.ndarray, buffer_size: int) -> np.ndarray:
    """:return: a storage array of ``buffer_size`` rows that begins with the filled ones"""
    # Zeros that are never written take no memory.
    rows = np.zeros((buffer_size, *filled.shape[1:]), dtype=filled.dtype)
    rows[: len(filled)] = filled
    return rows


def _unbind(field: Observation) -> Iterable[Observation]:
    """:return: the parts of a tensor, or of a dict of tensors, along the first dimension"""
    if isinstance(field, th.Tensor):
        return field.unbind()
    return (dict(zip(field, parts, strict=True)) for parts in zip(*(part.unbind() for part in field.values()), strict=True))


class MixedReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer for real transitions, with batches that also contain imagined ones.

    The first ``int(batch_size * real_ratio)`` rows of a batch are real, the others imagined (the paper's 5 % of 256 is 12
    rows). Shuffle a batch before splitting it. As long as there are no imagined transitions, all rows are real. Both kinds are
    stored raw and normalized when sampled, in float32 (SB3 subtracts the mean in float64 first). A pickle contains only the
    filled rows, not all allocated ones. Dict observations are stored as flat vectors; batches have dicts, as those of SB3's
    ``DictReplayBuffer``.

    :param buffer_size: Maximum number of real transitions, over all envs
    :param observation_space: A Box, or a Dict of Boxes
    :param action_space: A Box
    :param device: Device of the batches and of the imagined transitions
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Not supported by MBPO
    :param handle_timeout_termination: Distinguish time limits from terminations, see SB3
    :param real_ratio: Fraction of real rows in a batch; 1: SB3's ``sample``, unchanged
    :param retained_rollouts: Number of model rollouts kept in the model buffer
    :param model_buffer_size: Maximum number of imagined transitions; ``None``: no limit beyond ``retained_rollouts``
    :param seed: Seed for drawing imagined rows and start states; ``None``: a random seed from the system
    """

    #: Called before each batch; it may raise to abort a long ``train()``.
    check: Callable[[], None] | None = None
    #: Whether the VecEnv is known to keep the last observation of each episode, see :func:`.episode_ends.lost_ends`.
    copies_ends = False

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        real_ratio: float = 0.05,
        retained_rollouts: int = 4,
        model_buffer_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.codec = Codec(observation_space, action_space)
        super().__init__(
            buffer_size,
            self.codec.stored_space,
            action_space,
            device,
            n_envs,
            optimize_memory_usage=optimize_memory_usage,
            handle_timeout_termination=handle_timeout_termination,
        )
        self.observation_space, self.obs_shape = observation_space, get_obs_shape(observation_space)  # type: ignore
        self._set_up_mixing(real_ratio, retained_rollouts, model_buffer_size, seed)

    def adopt(self, buffer: ReplayBuffer) -> None:
        """
        Use the transitions of another replay buffer, SB3's or a mixed one. Imagined transitions of this buffer are removed.

        :param buffer: the other buffer; its arrays are shared, except those of SB3's ``DictReplayBuffer``
        :raises ValueError: it was created for other envs, or without next observations, or has numbers that are not finite;
            then this buffer stays as it was
        """
        check_fits(buffer, self.n_envs, self.observation_space, self.action_space)
        imagined = self.model_buffer.rows[:0]
        refills: list[int] = []
        if isinstance(buffer, MixedReplayBuffer):
            imagined, refills = buffer.model_buffer.contents()
        taken = dict(buffer.__dict__)
        for name in ("observations", "next_observations"):
            if isinstance(taken[name], dict):
                filled = self.codec.flatten({key: array[: buffer.size()] for key, array in taken[name].items()})
                taken[name] = _with_room(filled, buffer.buffer_size)
        check_finite({name: taken[name][: buffer.size()] for name in ROWS}, imagined)
        own = ("real_ratio", "model_buffer", "generator", "device", "check", "codec")
        self.__dict__.update({"copies_ends": False} | {key: value for key, value in taken.items() if key not in own})
        self.model_buffer.restore(imagined, refills)

    def contents(self, imagined: bool = True) -> dict[str, Any]:
        """
        :param imagined: with the imagined transitions
        :return: the filled rows, which are not copied, with their places in the storage, and the imagined rows
        """
        rows, refills = self.model_buffer.contents() if imagined else (self.model_buffer.rows[:0].clone(), [])
        return {
            "rows": {name: getattr(self, name)[: self.size()] for name in ROWS},
            **{name: getattr(self, name) for name in ("buffer_size", "pos", "full", "copies_ends")},
            # Flat rows do not say where an entry of a Dict ends.
            "entries": self.codec.entries,
            **{"imagined": rows, "refills": refills},
        }

    def restore(self, contents: Mapping[str, Any]) -> None:
        """
        Replace all transitions by other ones. If there are more than this buffer has room for, the newest.

        :param contents: from :meth:`contents` of a buffer for the same envs; anyone may have written them
        :raises ValueError: the contents do not fit, or a number is not finite; this buffer stays as it was
        """
        n_rows = self._check_contents(contents)
        rows = contents["rows"]
        check_finite(rows, contents["imagined"])
        self.reset()
        if contents["buffer_size"] == self.buffer_size:
            for name in ROWS:
                getattr(self, name)[:n_rows] = rows[name]
            self.pos, self.full = contents["pos"], contents["full"]
        else:
            oldest = contents["pos"] if contents["full"] else 0
            self.insert({name: np.roll(rows[name], -oldest, axis=0) for name in ROWS})
        self.copies_ends = contents["copies_ends"]
        self.model_buffer.restore(contents["imagined"], contents["refills"])

    def _check_contents(self, contents: Mapping[str, Any]) -> int:
        """:return: number of filled rows; raises ``ValueError`` as :meth:`restore` does"""
        names = ("rows", "buffer_size", "pos", "full", "copies_ends", "entries", "imagined", "refills")
        if not isinstance(contents, Mapping) or set(contents) != set(names):
            raise ValueError(f"the contents of a replay buffer must be {', '.join(names)}")
        rows, size, pos, full, copies_ends, entries, imagined, refills = (contents[name] for name in names)
        if entries != self.codec.entries:
            raise ValueError(f"its observations have the entries {entries!r:.200}, but this agent's have {self.codec.entries}")
        if not isinstance(rows, Mapping) or set(rows) != set(ROWS):
            raise ValueError(f"rows must be {', '.join(ROWS)}")
        for name, array in rows.items():
            ours = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != ours.dtype:
                raise ValueError(f"{name} must be an array of {ours.dtype}")
            if array.ndim == ours.ndim and array.shape[1] != self.n_envs:
                raise ValueError(other_n_envs(array.shape[1], self.n_envs))
            if array.ndim != ours.ndim or array.shape[1:] != ours.shape[1:]:
                raise ValueError(f"{name} has shape {array.shape}, but this agent's steps have {ours.shape[1:]}")
        lengths, n_rows = [len(array) for array in rows.values()], len(rows["rewards"])
        if len(set(lengths)) > 1:
            raise ValueError(f"rows must have the same number of steps, not {lengths}")
        if not isinstance(full, bool) or not isinstance(copies_ends, bool):
            raise ValueError("full and copies_ends must be true or false")
        if type(size) is not int or type(pos) is not int or not (0 <= pos < size and n_rows == (size if full else pos)):
            raise ValueError(f"buffer_size, pos and full do not fit {n_rows} steps")
        width = sum(self.model_buffer.widths)
        if not isinstance(imagined, th.Tensor) or imagined.dtype != th.float32 or imagined.shape[1:] != (width,):
            raise ValueError(f"imagined must be a float32 tensor of {width} columns")
        are_counts = isinstance(refills, list) and all(type(n) is int and n >= 0 for n in refills)
        if not are_counts or sum(refills) != len(imagined):
            raise ValueError("refills must be the numbers of imagined rows of each model rollout")
        return n_rows

    def _set_up_mixing(
        self, real_ratio: float, retained_rollouts: int, model_buffer_size: int | None, seed: int | None
    ) -> None:
        self.real_ratio = real_ratio
        self.model_buffer = ModelBuffer(
            self.codec.obs_dim, self.codec.action_dim, retained_rollouts, model_buffer_size, self.device
        )
        self.generator = th.Generator(self.device)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """:param seed: seed of this buffer's own random generator; ``None``: a random seed from the system"""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __getstate__(self) -> dict[str, Any]:
        # Only filled rows, and nothing that is tied to the device of the imagined rows.
        state = self.__dict__.copy()
        state.pop("check", None)
        state |= {name: state[name][: self.size()] for name in ROWS}
        model_buffer, generator = state.pop("model_buffer"), state.pop("generator")
        state["_mixing"] = {
            "real_ratio": self.real_ratio,
            "retained_rollouts": model_buffer.refills.maxlen,
            "model_buffer_size": model_buffer.max_rows,
            "seed": generator.initial_seed(),
        }
        rows, refills = model_buffer.contents()
        state["_imagined"] = (rows.cpu(), refills)
        state["_generator"] = (generator.device.type, generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        mixing, imagined, (device, random_state) = (state.pop(f"_{name}") for name in ("mixing", "imagined", "generator"))
        self.__dict__.update(state)
        for name in ROWS:
            setattr(self, name, _with_room(state[name], self.buffer_size))
        self.device = th.device("cpu") if not th.cuda.is_available() else self.device
        self._set_up_mixing(**mixing)
        self.model_buffer.restore(*imagined)
        if self.generator.device.type == device:
            self.generator.set_state(random_state)

    def reset(self) -> None:
        """Remove all real and imagined transitions."""
        super().reset()
        self.model_buffer.refills.clear()

    def cut(self) -> None:
        """End the episodes of the newest step, as by a time limit: the step after it was lost."""
        if self.size():
            newest = (self.pos - 1) % self.buffer_size
            self.timeouts[newest] = np.where(self.dones[newest] > 0.5, self.timeouts[newest], 1)
            self.dones[newest] = 1

    def forget(self, keep: int = 0) -> None:
        """
        Remove all imagined transitions, and all real ones except the newest.

        :param keep: number of real transitions to keep, rounded up to whole steps of all envs
        """
        steps = np.arange(self.pos - min(-(-keep // self.n_envs), self.size()), self.pos)
        kept = {name: getattr(self, name)[steps] for name in ROWS}
        self.reset()
        self.insert(kept)

    def real_rows(self, batch_size: int) -> int:
        """
        :param batch_size: number of rows of a batch
        :return: number of real rows that a batch has now
        """
        return batch_size if len(self.model_buffer) == 0 else int(batch_size * self.real_ratio + 1e-9)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: number of rows
        :param env: normalizes observations and rewards of both kinds, if given
        :return: ``real_rows(batch_size)`` real rows, then the imagined ones; equal to SB3's batch if all rows are real
        """
        return next(self.batches(1, batch_size, env))

    def batches(self, n: int, batch_size: int, env: VecNormalize | None = None) -> Iterator[ReplayBufferSamples]:
        """
        Like ``n`` calls of :meth:`sample`, but many batches are drawn at once, which is faster.

        :param n: number of batches
        :param batch_size: number of rows of each batch
        :param env: see :meth:`sample`
        :return: an iterator over the batches
        """
        n_real = self.real_rows(batch_size)
        if n_real == batch_size:
            for _ in range(n):
                self._check()
                yield super().sample(batch_size, env=env)
            return
        widths = self.model_buffer.widths
        while n > 0:
            self._check()
            drawn = min(n, max(1, BLOCK_NUMBERS // (batch_size * sum(widths))))
            rows = np.random.randint(self.size() * self.n_envs, size=drawn * n_real)
            real = to_device_async(self._real_rows(rows, self.handle_timeout_termination), self.device)
            imagined = self.model_buffer.sample(drawn * (batch_size - n_real), self.generator)
            mixed = th.cat([real.unflatten(0, (drawn, n_real)), imagined.unflatten(0, (drawn, -1))], dim=1)
            obs, actions, next_obs, dones, rewards = mixed.split(widths, dim=2)
            obs, next_obs = (normalize_obs(self.codec.unflatten(raw), env) for raw in (obs, next_obs))
            fields = (obs, actions, next_obs, dones, normalize_rewards(rewards, env))
            for i, batch in enumerate(map(self._samples, *map(_unbind, fields))):
                # A block may hold many updates' worth.
                if i > 0:
                    self._check()
                yield batch
            n -= drawn

    def _check(self) -> None:
        if self.check is not None:
            self.check()

    def _samples(self, *fields: Any) -> Any:
        """:return: a batch, of the type that SB3 has for these observations"""
        return (DictReplayBufferSamples if self.codec.is_dict else ReplayBufferSamples)(*fields)

    def add(self, obs: Observation, next_obs: Observation, *args: Any) -> None:
        """See SB3. Time limits are always stored, because the dynamics and the termination need them."""
        place, infos = self.pos, args[-1]
        if self.codec.is_dict:
            obs, next_obs = self.codec.flatten(obs), self.codec.flatten(next_obs)
        super().add(obs, next_obs, *args)
        if not self.handle_timeout_termination:
            self.timeouts[place] = [info.get("TimeLimit.truncated", False) for info in infos]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        noted = self.timeouts
        if not self.handle_timeout_termination:
            # SB3 would remove the stored time limits from ``dones`` all the same.
            self.timeouts = np.broadcast_to(np.float32(0), self.timeouts.shape)
        try:
            return self._samples(*super()._get_samples(batch_inds, env))
        finally:
            self.timeouts = noted

    def _normalize_obs(self, obs: np.ndarray, env: VecNormalize | None = None) -> Observation:  # type: ignore[override]
        # SB3's ``_get_samples`` calls this for observations as they are stored.
        return super()._normalize_obs(self.codec.unflatten(obs) if self.codec.is_dict else obs, env)

    def to_torch(self, array: Observation, copy: bool = True) -> Observation:
        """See SB3; also of a dict of arrays."""
        if isinstance(array, dict):
            return {key: super(MixedReplayBuffer, self).to_torch(part, copy) for key, part in array.items()}
        return super().to_torch(array, copy)

    def insert(self, transitions: dict[str, np.ndarray]) -> None:
        """
        Add many real transitions at once. The result equals repeated calls of ``add``: the oldest leave a full buffer.

        :param transitions: new rows ``(N, n_envs, ...)`` of each of SB3's storage arrays, ordered by time
        """
        n_rows = len(transitions["rewards"])
        places = (self.pos + np.arange(n_rows)) % self.buffer_size
        for name in ROWS:
            # With duplicate indices, it is undefined which row an assignment keeps.
            getattr(self, name)[places[-self.buffer_size :]] = transitions[name][-self.buffer_size :]
        self.full = self.full or self.pos + n_rows >= self.buffer_size
        self.pos = (self.pos + n_rows) % self.buffer_size

    def _flat(self, array: np.ndarray) -> np.ndarray:
        """:return: the filled part of a storage array as ``(size() * n_envs, -1)``"""
        return array[: self.size()].reshape(self.size() * self.n_envs, -1)

    def _tensor(self, array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, dtype=th.float32, device=self.device)

    def _real_rows(self, rows: np.ndarray | slice, without_limits: bool) -> np.ndarray:
        """:return: real transitions, packed like those of the model buffer, with dones of time limits or without"""
        *parts, timeouts = (self._flat(getattr(self, name))[rows] for name in ROWS)
        if without_limits:
            parts[3] = parts[3] * (1 - timeouts)
        # SB3's buffer stores MuJoCo's observations in float64; the networks use float32.
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def _newest_rows(self, n: int | None) -> slice | np.ndarray:
        """
        Indices of the newest transitions in the flattened storage arrays.

        :param n: number of transitions, rounded up to whole steps of all envs; ``None`` or too many: all, unordered
        """
        n_steps = self.size() if n is None else -(-n // self.n_envs)
        if n_steps >= self.size():
            return slice(None)
        steps = (self.pos - n_steps + np.arange(n_steps)) % self.buffer_size
        return (steps[:, None] * self.n_envs + np.arange(self.n_envs)).flatten()

    def real_transitions(self, newest: int | None = None) -> ReplayBufferSamples:
        """
        Real transitions for the dynamics. Dones of time limits are always removed. Transitions whose last observation was lost
        are left out, see :func:`.episode_ends.lost_ends`.

        :param newest: number of newest transitions, rounded up to whole steps of all envs; ``None``: all
        :return: transitions, raw, flat, float32
        """
        there = self._newest_rows(newest)
        rows, lost = self._real_rows(there, without_limits=True), self.lost_ends()
        rows = rows[~lost.flatten()[there]] if lost.any() else rows
        return ReplayBufferSamples(*self._tensor(rows).split(self.model_buffer.widths, dim=1))

    def lost_ends(self) -> np.ndarray:
        """:return: see :func:`.episode_ends.lost_ends`, bool ``(size(), n_envs)``"""
        return lost_ends(self.steps(slice(None)), self.copies_ends)

    def reported_limit(self) -> str | None:
        """:return: see :func:`.episode_ends.reported_limit`, of the newest steps"""
        n = min(self.size(), max(ENDS_LOOKED_AT // self.n_envs, 1))
        rows = (self.pos - n + np.arange(n)) % self.size()
        return reported_limit(self.steps(rows), from_start=n == self.size() and not self.full)

    def steps(self, rows: np.ndarray | slice) -> Steps:
        """
        :param rows: indices in the filled part of the storage; the last one of an array counts as the newest
        :return: these real transitions, raw
        """
        obs, next_obs, dones, limits = (
            getattr(self, name)[: self.size()][rows] for name in ("observations", "next_observations", "dones", "timeouts")
        )
        obs, next_obs = (part.reshape(len(part), self.n_envs, self.codec.obs_dim) for part in (obs, next_obs))
        newest = (self.pos - 1) % self.size() if isinstance(rows, slice) else len(obs) - 1
        return Steps(obs, next_obs, dones > 0.5, limits > 0.5, newest)

    def newest(self, n: int) -> ReplayBufferSamples:
        """
        The newest real steps, ordered by time. Unlike in SB3's samples, dones include time limits.

        :param n: number of steps of each env; fewer are returned if there are fewer
        :return: each field ``(n, n_envs, dim)``, raw, flat, float32
        """
        rows = self._newest_steps(n)
        parts = (getattr(self, name)[rows] for name in ROWS[:-1])
        # Not -1 for the last size: numpy cannot infer it if there are no rows.
        shapes = ((len(rows), self.n_envs, width) for width in self.model_buffer.widths)
        return ReplayBufferSamples(*(self._tensor(part.reshape(s)) for part, s in zip(parts, shapes, strict=True)))

    def newest_lost_ends(self, n: int) -> th.Tensor:
        """
        :param n: number of steps of each env, see :meth:`newest`
        :return: which of these steps lost their last observation, bool ``(n, n_envs)``
        """
        return th.as_tensor(self.lost_ends()[self._newest_steps(n)], device=self.device)

    def _newest_steps(self, n: int) -> np.ndarray:
        """:return: indices of the newest steps, oldest first; negative where the storage has wrapped around"""
        return np.arange(self.pos - min(n, self.size()), self.pos)

    def start_states(self, n: int, newest: int | None = None) -> th.Tensor:
        """
        Draw start states uniformly with replacement from the observations of real transitions.

        :param n: number of start states
        :param newest: draw from this many newest transitions, see :meth:`real_transitions`; ``None``: from all
        :return: raw observations ``(n, obs_dim)``, float32
        """
        there = self._newest_rows(newest)
        size = self.size() * self.n_envs if isinstance(there, slice) else len(there)
        rows = th.randint(size, (n,), generator=self.generator, device=self.device).cpu().numpy()
        return self._tensor(self._flat(self.observations)[rows if isinstance(there, slice) else there[rows]])


REPLAY_BUFFERS.append(MixedReplayBuffer)
