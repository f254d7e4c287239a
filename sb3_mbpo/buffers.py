"""Where transitions wait for SAC: the imagined ones in a ModelBuffer, mixed with the real ones by a MixedReplayBuffer."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

# What is drawn at once, at most: enough to make the calls cheap, too little to leave a CPU's caches.
BLOCK_NUMBERS = 2**20


def normalize_obs(obs: th.Tensor, env: VecNormalize | None) -> th.Tensor:
    """
    ``VecNormalize.normalize_obs`` for tensors, with its current statistics.

    :param obs: raw observations ``(B, *obs_shape)``
    :param env: the normalising env, if there is one
    :return: same shape, float32
    """
    if env is None or not env.norm_obs:
        return obs
    assert isinstance(env.obs_rms, RunningMeanStd)
    mean = th.as_tensor(env.obs_rms.mean, dtype=th.float32, device=obs.device)
    std = th.as_tensor(np.sqrt(env.obs_rms.var + env.epsilon), dtype=th.float32, device=obs.device)
    return ((obs - mean) / std).clamp(-env.clip_obs, env.clip_obs)


def normalize_rewards(rewards: th.Tensor, env: VecNormalize | None) -> th.Tensor:
    """
    ``VecNormalize.normalize_reward`` for tensors, with its current statistics.

    :param rewards: raw rewards, any shape
    :param env: the normalising env, if there is one
    :return: same shape, float32
    """
    if env is None or not env.norm_reward:
        return rewards
    std = float(np.sqrt(env.ret_rms.var + env.epsilon))
    return (rewards / std).clamp(-env.clip_reward, env.clip_reward)


class ModelBuffer:
    """
    The imagined transitions of the last ``retained_rollouts`` refills, on the training device.

    Rows are packed side by side in one tensor that grows with its content and is used as a ring: the oldest refill leaves as a
    whole when a new one begins; within ``max_rows`` the oldest rows leave as new ones come.

    :param obs_dim: size of a flat observation
    :param action_dim: size of a flat action
    :param retained_rollouts: refills kept
    :param max_rows: most rows kept; ``None``: as many as the retained refills bring
    :param device: where the rows live
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        retained_rollouts: int = 4,
        max_rows: int | None = None,
        device: th.device | str = "cpu",
    ) -> None:
        # The order of the fields of ReplayBufferSamples.
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1]
        self.max_rows = max_rows
        self.rows = th.empty((0, sum(self.widths)), device=device)
        self.start = 0
        #: Number of rows of each retained refill, oldest first.
        self.refills: deque[int] = deque(maxlen=retained_rollouts)

    def __len__(self) -> int:
        return sum(self.refills)

    def begin_refill(self) -> None:
        """Open a new refill; the oldest leaves if ``retained_rollouts`` are there already."""
        if len(self.refills) == self.refills.maxlen:
            self._forget(self.refills[0])
            self.refills.popleft()
        self.refills.append(0)

    def add(self, transitions: ReplayBufferSamples) -> None:
        """
        Put transitions into the refill that was begun last.

        :param transitions: raw, flat, on this buffer's device; rewards and dones ``(N, 1)``
        """
        new = th.cat(list(transitions[:5]), dim=1).to(self.rows.dtype)
        if self.max_rows is not None:
            new = new[-self.max_rows :]
            self._forget(len(self) + len(new) - self.max_rows)
        if len(self) + len(new) > len(self.rows):
            self._grow(len(self) + len(new))
        end = self.start + len(self)
        self.rows[th.arange(end, end + len(new), device=new.device) % max(len(self.rows), 1)] = new
        self.refills[-1] += len(new)

    def _forget(self, n_rows: int) -> None:
        """Drop the oldest ``n_rows``."""
        for i, size in enumerate(self.refills):
            dropped = min(max(n_rows, 0), size)
            self.refills[i] -= dropped
            self.start += dropped
            n_rows -= dropped
        self.start %= max(len(self.rows), 1)

    def _grow(self, n_rows: int) -> None:
        """Make room for ``n_rows``, half as much again as now at least, so that growing stays cheap on the whole."""
        capacity = max(n_rows, len(self.rows) * 3 // 2)
        rows = self.rows.new_empty((capacity if self.max_rows is None else min(capacity, self.max_rows), sum(self.widths)))
        rows[: len(self)] = self.rows[self._places(th.arange(len(self), device=self.rows.device))]
        self.rows, self.start = rows, 0

    def _places(self, ages: th.Tensor) -> th.Tensor:
        """Where the rows with these ages (0 is the oldest) stand in the ring."""
        return (self.start + ages) % max(len(self.rows), 1)

    def sample(self, n_rows: int, generator: th.Generator) -> th.Tensor:
        """
        :param n_rows: drawn uniformly with replacement
        :param generator: source of the draw, on this buffer's device
        :return: packed rows ``(n_rows, sum(widths))``, raw, float32
        """
        ages = th.randint(len(self), (n_rows,), generator=generator, device=self.rows.device)
        return self.rows.index_select(0, self._places(ages))


class MixedReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer, filled with the real transitions as ever, whose batches are ``real_ratio`` real and the rest imagined.

    A batch of ``batch_size`` has ``int(batch_size * real_ratio)`` real rows, first, then the imagined ones (the paper's 5 % of
    256 is 12): whoever cuts a batch into pieces has to shuffle it. While nothing is imagined, everything is real.
    Both kinds are stored raw and normalised when sampled. A pickle holds the real transitions only.

    :param buffer_size: most real transitions, over all envs
    :param observation_space: a Box
    :param action_space: a Box
    :param device: where batches go and imagined rows live
    :param n_envs: parallel environments
    :param optimize_memory_usage: refused by MBPO
    :param handle_timeout_termination: tell time limits from terminations (see SB3)
    :param real_ratio: share of real rows; 1: SB3's ``sample``, untouched
    :param retained_rollouts: refills kept in the model buffer
    :param model_buffer_size: most imagined rows; ``None``: no bound of its own
    :param seed: of the draws among the imagined rows and among start states; ``None``: one from the system
    """

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
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs,
            optimize_memory_usage=optimize_memory_usage,
            handle_timeout_termination=handle_timeout_termination,
        )
        self._set_up_mixing(real_ratio, retained_rollouts, model_buffer_size, seed)

    def adopt(self, buffer: ReplayBuffer) -> None:
        """
        Take over the transitions of another replay buffer, plain or mixed; nothing imagined is left.

        :param buffer: its arrays are shared, not copied
        :raises ValueError: it was made for other envs, or without next observations
        """
        for name in ("n_envs", "obs_shape", "action_dim", "optimize_memory_usage"):
            theirs, ours = getattr(buffer, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(f"this replay buffer has {name}={theirs}, but the agent's must have {name}={ours}")
        own = ("real_ratio", "model_buffer", "generator", "device")
        self.__dict__.update({key: value for key, value in buffer.__dict__.items() if key not in own})
        self.model_buffer.refills.clear()

    def _set_up_mixing(
        self, real_ratio: float, retained_rollouts: int, model_buffer_size: int | None, seed: int | None
    ) -> None:
        self.real_ratio = real_ratio
        obs_dim = int(np.prod(self.obs_shape))
        self.model_buffer = ModelBuffer(
            obs_dim, get_action_dim(self.action_space), retained_rollouts, model_buffer_size, self.device
        )
        self.generator = th.Generator(self.device)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """:param seed: start of this buffer's own random stream; ``None``: one from the system"""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __getstate__(self) -> dict[str, Any]:
        # Imagined rows are cheap to imagine again, and a pickle must not be tied to the device they live on.
        state = self.__dict__.copy()
        model_buffer, generator = state.pop("model_buffer"), state.pop("generator")
        state["_mixing"] = {
            "real_ratio": self.real_ratio,
            "retained_rollouts": model_buffer.refills.maxlen,
            "model_buffer_size": model_buffer.max_rows,
            "seed": generator.initial_seed(),
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        mixing = state.pop("_mixing")
        self.__dict__.update(state)
        self.device = th.device("cpu") if not th.cuda.is_available() else self.device
        self._set_up_mixing(**mixing)

    def reset(self) -> None:
        """Forget real and imagined transitions."""
        super().reset()
        self.model_buffer.refills.clear()

    def real_rows(self, batch_size: int) -> int:
        """How many of ``batch_size`` rows are real now."""
        return batch_size if len(self.model_buffer) == 0 else int(batch_size * self.real_ratio + 1e-9)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: rows
        :param env: normalises observations and rewards of both kinds, if given
        :return: ``real_rows(batch_size)`` real rows, then the imagined ones; as SB3's own while all are real
        """
        return next(self.batches(1, batch_size, env))

    def batches(self, n: int, batch_size: int, env: VecNormalize | None = None) -> Iterator[ReplayBufferSamples]:
        """
        ``n`` batches like those of :meth:`sample`, drawn many at a time: that is where the time of small batches goes.

        :param n: number of batches
        :param batch_size: rows of each
        :param env: see :meth:`sample`
        """
        n_real = self.real_rows(batch_size)
        if n_real == batch_size:
            for _ in range(n):
                yield super().sample(batch_size, env=env)
            return
        widths = self.model_buffer.widths
        while n > 0:
            drawn = min(n, max(1, BLOCK_NUMBERS // (batch_size * sum(widths))))
            real = self._real_rows(np.random.randint(self.size() * self.n_envs, size=drawn * n_real))
            imagined = self.model_buffer.sample(drawn * (batch_size - n_real), self.generator)
            rows = th.cat([real.unflatten(0, (drawn, n_real)), imagined.unflatten(0, (drawn, -1))], dim=1)
            obs, actions, next_obs, dones, rewards = rows.split(widths, dim=2)
            obs, next_obs = (normalize_obs(raw.unflatten(2, self.obs_shape), env) for raw in (obs, next_obs))
            fields = (obs, actions, next_obs, dones, normalize_rewards(rewards, env))
            yield from map(ReplayBufferSamples, *(field.unbind() for field in fields))
            n -= drawn

    def _flat(self, array: np.ndarray) -> np.ndarray:
        """The filled part of a storage array as ``(size() * n_envs, -1)``."""
        return array[: self.size()].reshape(self.size() * self.n_envs, -1)

    def _tensor(self, array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, dtype=th.float32, device=self.device)

    def _real_rows(self, rows: np.ndarray | slice) -> th.Tensor:
        """Real transitions, packed like those of the model buffer; dones without time limits, as SB3's samples have them."""
        arrays = (self.observations, self.actions, self.next_observations, self.dones, self.rewards)
        parts = [self._flat(array)[rows] for array in arrays]
        parts[3] = parts[3] * (1 - self._flat(self.timeouts)[rows])
        # MuJoCo's observations are float64 in SB3's buffer; the networks are float32.
        return self._tensor(np.concatenate(parts, axis=1, dtype=np.float32))

    def real_transitions(self) -> ReplayBufferSamples:
        """All real transitions, raw, flat, float32."""
        return ReplayBufferSamples(*self._real_rows(slice(None)).split(self.model_buffer.widths, dim=1))

    def start_states(self, n: int) -> th.Tensor:
        """:return: observations of ``n`` real transitions, uniform with replacement, raw ``(n, obs_dim)``, float32"""
        rows = th.randint(self.size() * self.n_envs, (n,), generator=self.generator, device=self.device).cpu().numpy()
        return self._tensor(self._flat(self.observations)[rows])
