"""Where transitions wait for SAC: the real ones, mixed with the imagined ones of a ModelBuffer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.buffers.model_buffer import ModelBuffer
from sb3_mbpo.validation.episode_ends import Steps, lost_ends, reported_limit

# What is drawn at once, at most: enough to make the calls cheap, too little to leave a CPU's caches.
BLOCK_NUMBERS = 2**20
# Newest steps among which a time limit is looked for that the env reports as a termination.
ENDS_LOOKED_AT = 20_000
# Rows whose numbers are looked at together: no second copy of a large buffer is made for it.
_ROWS_AT_ONCE = 10_000
# SB3's storage arrays, one row a step: (buffer_size, n_envs, ...).
ROWS = ("observations", "actions", "next_observations", "dones", "rewards", "timeouts")


def sent(array: np.ndarray, device: th.device) -> th.Tensor:
    """
    A small array as float32 on a device, for whose copy the host does not wait.

    On the way to a GPU its memory is pinned, and what was pinned once stays so: not for large ones.
    """
    tensor = th.as_tensor(array, dtype=th.float32, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
    mean, std = (sent(part, obs.device) for part in (env.obs_rms.mean, np.sqrt(env.obs_rms.var + env.epsilon)))
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


def balanced_ratio(updates: float) -> float:
    """
    The share of real rows with which a real row is drawn as often as by SAC with one update a transition.

    With 20 updates this is the paper's 0.05. Fewer updates at 0.05 would learn less from what really happened than SAC does.
    At most 0.5: half of each batch is left to the dynamics.

    :param updates: gradient updates for each env transition
    """
    return min(max(1 / max(updates, 1e-9), 0.05), 0.5)


def check_fits(buffer: ReplayBuffer, n_envs: int, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param buffer: plain or mixed
    :param n_envs: of the agent, as its spaces
    :raises ValueError: the buffer was made for other envs, or without next observations
    """
    expected = {"n_envs": n_envs, "obs_shape": get_obs_shape(observation_space), "action_dim": get_action_dim(action_space)}
    for name, ours in {**expected, "optimize_memory_usage": False}.items():
        theirs = getattr(buffer, name)
        if theirs != ours:
            raise ValueError(f"this replay buffer has {name}={theirs}, but the agent's must have {name}={ours}")


def check_finite(rows: Mapping[str, np.ndarray], imagined: th.Tensor) -> None:
    """
    :param rows: filled parts of SB3's storage arrays, by name: ``(N, n_envs, ...)``, in any order
    :param imagined: packed rows of a model buffer
    :raises ValueError: a number that is not finite in float32, of which all weights would become NaN; names the first
    """
    for name, array in rows.items():
        for start in range(0, len(array) if array.dtype.kind == "f" else 0, _ROWS_AT_ONCE):
            block = array[start : start + _ROWS_AT_ONCE]
            with np.errstate(over="ignore"):
                wrong = ~np.isfinite(block.astype(np.float32, copy=False))
            if wrong.any():
                step, env, *place = (int(i) for i in np.argwhere(wrong)[0])
                where = f" {place if len(place) > 1 else place[0]}" if place else ""
                raise ValueError(
                    f"{name}{where} of env {env} in step {start + step} is {block[step, env][tuple(place)]}, and an agent "
                    "that learns from it becomes NaN. Use a replay buffer from before, or pass the finite transitions "
                    "to prefill"
                )
    for start in range(0, len(imagined), _ROWS_AT_ONCE):
        if not imagined[start : start + _ROWS_AT_ONCE].isfinite().all():
            raise ValueError(
                f"imagined transitions after number {start} are not finite, and an agent that learns from them becomes NaN. "
                "Save the buffer without imagined=True"
            )


class MixedReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer, filled with the real transitions as ever, whose batches are ``real_ratio`` real and the rest imagined.

    A batch of ``batch_size`` has ``int(batch_size * real_ratio)`` real rows, first, then the imagined ones (the paper's 5 % of
    256 is 12): whoever cuts a batch into pieces has to shuffle it. While nothing is imagined, everything is real.
    Both kinds are stored raw and normalised when sampled, in float32 (SB3 subtracts the mean in float64 first). A pickle holds
    what is filled, not what is allocated.

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

    #: Called before each batch; may break a long ``train()`` off.
    check: Callable[[], None] | None = None
    #: Last observations of episodes are known to have been copied, see :func:`.episode_ends.lost_ends`.
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
        Take over the transitions of another replay buffer, plain or mixed; what was imagined here is left behind.

        :param buffer: its arrays are shared, not copied
        :raises ValueError: it was made for other envs, or without next observations, or has numbers that are not finite; then
            this buffer is as it was
        """
        check_fits(buffer, self.n_envs, self.observation_space, self.action_space)
        imagined = self.model_buffer.rows[:0]
        refills: list[int] = []
        if isinstance(buffer, MixedReplayBuffer):
            imagined, refills = buffer.model_buffer.contents()
        check_finite({name: getattr(buffer, name)[: buffer.size()] for name in ROWS}, imagined)
        own = ("real_ratio", "model_buffer", "generator", "device", "check", "copies_ends")
        self.__dict__.update({key: value for key, value in buffer.__dict__.items() if key not in own})
        self.model_buffer.restore(imagined, refills)

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
        # What is filled, not what is allocated; and nothing that is tied to the device imagined rows live on.
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
            filled = state[name]
            # Untouched zeros cost no memory.
            rows = np.zeros((self.buffer_size, *filled.shape[1:]), dtype=filled.dtype)
            rows[: len(filled)] = filled
            setattr(self, name, rows)
        self.device = th.device("cpu") if not th.cuda.is_available() else self.device
        self._set_up_mixing(**mixing)
        self.model_buffer.restore(*imagined)
        if self.generator.device.type == device:
            self.generator.set_state(random_state)

    def reset(self) -> None:
        """Forget real and imagined transitions."""
        super().reset()
        self.model_buffer.refills.clear()

    def forget(self, keep: int = 0) -> None:
        """
        Remove all imagined transitions, and all real ones but the newest.

        :param keep: real transitions that stay, rounded up to whole steps of all envs
        """
        steps = np.arange(self.pos - min(-(-keep // self.n_envs), self.size()), self.pos)
        kept = {name: getattr(self, name)[steps] for name in ROWS}
        self.reset()
        self.insert(kept)

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
                self._check()
                yield super().sample(batch_size, env=env)
            return
        widths = self.model_buffer.widths
        while n > 0:
            self._check()
            drawn = min(n, max(1, BLOCK_NUMBERS // (batch_size * sum(widths))))
            rows = np.random.randint(self.size() * self.n_envs, size=drawn * n_real)
            real = sent(self._real_rows(rows, self.handle_timeout_termination), self.device)
            imagined = self.model_buffer.sample(drawn * (batch_size - n_real), self.generator)
            mixed = th.cat([real.unflatten(0, (drawn, n_real)), imagined.unflatten(0, (drawn, -1))], dim=1)
            obs, actions, next_obs, dones, rewards = mixed.split(widths, dim=2)
            obs, next_obs = (normalize_obs(raw.unflatten(2, self.obs_shape), env) for raw in (obs, next_obs))
            fields = (obs, actions, next_obs, dones, normalize_rewards(rewards, env))
            for i, batch in enumerate(map(ReplayBufferSamples, *(field.unbind() for field in fields))):
                # A block may hold many updates' worth.
                if i > 0:
                    self._check()
                yield batch
            n -= drawn

    def _check(self) -> None:
        if self.check is not None:
            self.check()

    def add(self, *args: Any) -> None:
        """See SB3. Time limits are noted in any case: the dynamics and the termination have to know them."""
        place, infos = self.pos, args[-1]
        super().add(*args)
        if not self.handle_timeout_termination:
            self.timeouts[place] = [info.get("TimeLimit.truncated", False) for info in infos]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        if self.handle_timeout_termination:
            return super()._get_samples(batch_inds, env)
        # SB3 leaves the noted ones out of ``dones`` whatever was asked for.
        noted, self.timeouts = self.timeouts, np.broadcast_to(np.float32(0), self.timeouts.shape)
        try:
            return super()._get_samples(batch_inds, env)
        finally:
            self.timeouts = noted

    def insert(self, transitions: dict[str, np.ndarray]) -> None:
        """
        Put many real transitions in at once, as ``add`` would one by one; the oldest leave when the buffer is full.

        :param transitions: for each of SB3's storage arrays ``(N, n_envs, ...)``, in order of time
        """
        n_rows = len(transitions["rewards"])
        places = (self.pos + np.arange(n_rows)) % self.buffer_size
        for name in ROWS:
            # Assignment to a place that comes twice would keep either.
            getattr(self, name)[places[-self.buffer_size :]] = transitions[name][-self.buffer_size :]
        self.full = self.full or self.pos + n_rows >= self.buffer_size
        self.pos = (self.pos + n_rows) % self.buffer_size

    def _flat(self, array: np.ndarray) -> np.ndarray:
        """The filled part of a storage array as ``(size() * n_envs, -1)``."""
        return array[: self.size()].reshape(self.size() * self.n_envs, -1)

    def _tensor(self, array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, dtype=th.float32, device=self.device)

    def _real_rows(self, rows: np.ndarray | slice, without_limits: bool) -> np.ndarray:
        """Real transitions, packed like those of the model buffer; dones with or without those of time limits."""
        *parts, timeouts = (self._flat(getattr(self, name))[rows] for name in ROWS)
        if without_limits:
            parts[3] = parts[3] * (1 - timeouts)
        # MuJoCo's observations are float64 in SB3's buffer; the networks are float32.
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def _newest_rows(self, n: int | None) -> slice | np.ndarray:
        """
        Places of the newest transitions in the flattened storage arrays.

        :param n: transitions, rounded up to whole steps of all envs; ``None``, or more than there are: all, in no order
        """
        n_steps = self.size() if n is None else -(-n // self.n_envs)
        if n_steps >= self.size():
            return slice(None)
        steps = (self.pos - n_steps + np.arange(n_steps)) % self.buffer_size
        return (steps[:, None] * self.n_envs + np.arange(self.n_envs)).flatten()

    def real_transitions(self, newest: int | None = None) -> ReplayBufferSamples:
        """
        Real transitions, raw, flat, float32; dones without those of time limits, whatever SAC makes of them. Left out are
        those whose last observation was lost, see :func:`.episode_ends.lost_ends`.

        :param newest: only so many newest ones, rounded up to whole steps of all envs; ``None``: all
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
        :param rows: of the filled part of the storage; with an array, the last of them counts as the newest
        :return: these real transitions, raw
        """
        obs, next_obs, dones, limits = (
            getattr(self, name)[: self.size()][rows] for name in ("observations", "next_observations", "dones", "timeouts")
        )
        obs, next_obs = (part.reshape(len(part), self.n_envs, -1) for part in (obs, next_obs))
        newest = (self.pos - 1) % self.size() if isinstance(rows, slice) else len(obs) - 1
        return Steps(obs, next_obs, dones > 0.5, limits > 0.5, newest)

    def newest(self, n: int) -> ReplayBufferSamples:
        """
        The last real steps in order of time, raw and flat, float32; unlike SB3's samples, dones are those of time limits too.

        :param n: steps of each env, if there are so many
        :return: each part ``(n, n_envs, dim)``
        """
        rows = self._newest_steps(n)
        parts = (getattr(self, name)[rows] for name in ROWS[:-1])
        # No -1 in place of the last size, which numpy cannot tell where there are no rows.
        shapes = ((len(rows), self.n_envs, width) for width in self.model_buffer.widths)
        return ReplayBufferSamples(*(self._tensor(part.reshape(s)) for part, s in zip(parts, shapes, strict=True)))

    def newest_lost_ends(self, n: int) -> th.Tensor:
        """:return: which of the steps of :meth:`newest` have lost their last observation, bool ``(n, n_envs)``"""
        return th.as_tensor(self.lost_ends()[self._newest_steps(n)], device=self.device)

    def _newest_steps(self, n: int) -> np.ndarray:
        """Places of the last steps, oldest first; negative where the storage has wrapped around."""
        return np.arange(self.pos - min(n, self.size()), self.pos)

    def start_states(self, n: int, newest: int | None = None) -> th.Tensor:
        """
        :param n: rows
        :param newest: drawn from so many newest transitions, see :meth:`real_transitions`
        :return: observations of real transitions, uniform with replacement, raw ``(n, obs_dim)``, float32
        """
        there = self._newest_rows(newest)
        size = self.size() * self.n_envs if isinstance(there, slice) else len(there)
        rows = th.randint(size, (n,), generator=self.generator, device=self.device).cpu().numpy()
        return self._tensor(self._flat(self.observations)[rows if isinstance(there, slice) else there[rows]])
