"""How a model-based agent is saved and loaded, starts from existing transitions, and becomes a model-free agent."""

import copy
import inspect
import io
import json
import warnings
import weakref
import zipfile
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import open_path, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv

from sb3_mbpo.arguments.user_functions import check_device
from sb3_mbpo.buffers.checks import check_fits
from sb3_mbpo.buffers.model_buffer import ModelBuffer
from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer
from sb3_mbpo.codec import Codec
from sb3_mbpo.saving.agent_state import AgentState
from sb3_mbpo.saving.buffer_files import SUFFIX, load_tensors, means_tensors, save_tensors, starts_as_zip
from sb3_mbpo.saving.checked_tensors import check_weights
from sb3_mbpo.saving.description import other_class
from sb3_mbpo.saving.offline_data import read_transitions, rows_of_steps
from sb3_mbpo.saving.safe_files import check_whole
from sb3_mbpo.saving.safe_loading import MEMBER, description_text, load_safely
from sb3_mbpo.saving.whole_files import check_checksum, skip_checksum, with_checksum, written_whole
from sb3_mbpo.validation.class_registry import AGENTS, register_agent
from sb3_mbpo.validation.misuse import missing_statistics
from sb3_mbpo.validation.rules import did_you_mean, shown
from sb3_mbpo.validation.unsupported import check_env

SelfSaving = TypeVar("SelfSaving", bound="Saving")

# Arguments that determine which networks and optimizers exist.
_SHAPING = ("use_sde", "ent_coef", "dynamics_class", "dynamics_kwargs")


def _glance(path: Any, cls: type | None = None) -> dict[str, Any] | None:
    """
    :param path: an agent's zip
    :param cls: the algorithm that is to be loaded; ``None``: any
    :return: the JSON in it; ``None``: it contains no dynamics
    :raises ValueError: it is not a zip file, it is damaged, or another algorithm of this package wrote it
    """
    file: Any = open_path(path, "r", suffix="zip")
    with nullcontext() if file is path else file:
        start = file.tell()
        archive = check_whole(file)
        if "dynamics.pth" not in archive.namelist():
            return None
        try:
            if cls is not None and MEMBER in archive.namelist():
                _check_class(json.loads(archive.read(MEMBER)).get("class"), cls)
            return json.loads(archive.read("data")) if "data" in archive.namelist() else {}
        finally:
            file.seek(start)


def _check_class(name: Any, cls: type) -> None:
    saved = AGENTS.get(name) if isinstance(name, str) else None
    if saved is not None and not issubclass(cls, saved) and not issubclass(saved, cls):
        raise other_class(name, cls)


def _check_names(cls: type, kwargs: dict[str, Any], more: set[str]) -> None:
    known = ({*inspect.signature(cls).parameters} - {"policy"} | more) - {"kwargs"}
    for name in set(kwargs) - known:
        raise ValueError(f"load: {cls.__name__} has no argument {name!r}{did_you_mean(name, known)}")


def _loaded(agent: SelfSaving, path: Any) -> SelfSaving:
    """
    Check a loaded agent, and warn if its env is not normalized like the env that it learned in.

    :return: the agent
    :raises ValueError: weights are not finite
    """
    try:
        check_weights(agent)
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
    if (warning := missing_statistics(agent)) is not None:
        warnings.warn(warning, stacklevel=3)
    return agent


class _Plain(NamedTuple):
    """A model-free agent that was made from a model-based one and shares its env."""

    agent: weakref.ref[OffPolicyAlgorithm]
    env: weakref.ref[Any]
    #: Its ``start_time`` when it was last compared: each ``learn`` changes it.
    began: float


class Saving(AgentState, OffPolicyAlgorithm):
    """The part of :class:`ModelBased` that saves and loads agents and replay buffers."""

    observation_space: spaces.Box | spaces.Dict
    action_space: spaces.Box
    #: Converts observations and actions of the env to flat vectors, and back.
    codec: Codec
    dynamics: Any
    dynamics_window: int | None
    model_train_freq: int
    retained_rollouts: int
    updates_per_transition: float | None

    #: Model-free agents that were made from this one.
    _plain_agents: tuple[_Plain, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.policy_aliases:  # an algorithm, no mixin
            register_agent(cls)

    @classmethod
    def load(
        cls: type[SelfSaving],
        path: Any,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        safe: bool = False,
        **kwargs: Any,
    ) -> SelfSaving:
        """
        Load an agent, see SB3. The real transitions are not in the zip, see ``save_replay_buffer``.

        :param path: see SB3
        :param env: an env, or the name of a registered one
        :param device: see SB3
        :param custom_objects: see SB3; not with ``safe``
        :param print_system_info: see SB3
        :param force_reset: see SB3
        :param safe: ``False``: load as SB3 does, which runs any code that the author of the file has put into it. ``True``:
            nothing is unpickled, and only JSON and tensors are read. Then arguments that JSON cannot hold (functions, and
            classes of yours) have to be passed again, and ``tensorboard_log``, too
        :param kwargs: arguments of the constructor that differ from the saved ones
        :return: the agent
        :raises ValueError: the zip is damaged, a model-free agent's or another algorithm's, its weights are not finite, or the
            constructor does not have an argument in ``kwargs``; with ``safe``, the file was not written by ``save``
        """
        _check_names(cls, kwargs, {*inspect.signature(super().load).parameters, *(["policy"] if safe else [])})
        if env is not None:
            env = maybe_make_env(env, verbose=0)
            check_env(env)
        # The constructor issues the warning.
        check_device(device)
        # Either of the two replaces the one in the file.
        if kwargs.get("updates_per_transition") is not None:
            kwargs = {"gradient_steps": -1, **kwargs}
        elif "gradient_steps" in kwargs:
            kwargs = {"updates_per_transition": None, **kwargs}
        if safe:
            if custom_objects is not None:
                raise ValueError("load: custom_objects are for pickles, which safe=True does not read; pass the arguments")
            return _loaded(load_safely(cls, path, env, device, kwargs), path)
        try:
            data = _glance(path, cls)
        except ValueError as error:
            raise ValueError(f"load: {path}: {error}") from error
        if data is None:
            raise ValueError(
                f"load: {path} holds no dynamics; it was saved by a model-free algorithm. To start from its networks, make a "
                f"new agent with a policy of the same kind and net_arch and load them into it: agent = {cls.__name__}(...); "
                "agent.set_parameters(path, exact_match=False)"
            )
        if kwargs.get("policy_kwargs") is not None and "use_sde" in (data.get("policy_kwargs") or {}):
            # SB3 adds this to the dictionary it is given, and compares with it. Our constructor does not change the caller's.
            kwargs["policy_kwargs"] = {"use_sde": data.get("use_sde", False), **kwargs["policy_kwargs"]}
        if "stats_window_size" in kwargs:
            # SB3 stores it under another name.
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        try:
            agent = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
            shaping = {name: kwargs[name] for name in _SHAPING if name in kwargs}
            if not shaping:
                raise
            passed = ", ".join(f"{name}={shown(value)}" for name, value in shaping.items())
            raise ValueError(
                f"load: the networks in {path} do not fit {passed} ({error}). Leave these out: they are in the file"
            ) from error
        return _loaded(agent, path)

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """
        Set the parameters of the agent, see SB3. If a file is refused, they are unchanged.

        :param load_path_or_dict: see SB3
        :param exact_match: see SB3
        :param device: see SB3
        :raises ValueError: the file is not a zip file, or a damaged one, or has weights that are not finite or do not fit
        """
        if isinstance(load_path_or_dict, dict):
            super().set_parameters(load_path_or_dict, exact_match, device)
            return
        before: Any = copy.deepcopy(self.get_parameters())
        try:
            _glance(load_path_or_dict)
            super().set_parameters(load_path_or_dict, exact_match, device)
            check_weights(self)
        except Exception as error:
            super().set_parameters(before, device=device)
            if isinstance(error, ValueError):
                raise ValueError(f"set_parameters: {load_path_or_dict}: {error}") from error
            raise

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save the agent, see SB3. The zip also contains the description that ``load(safe=True)`` reads.

        :param path: see SB3
        :param exclude: see SB3
        :param include: see SB3
        :raises OSError: it could not be written; an existing file is unchanged
        """
        whole = io.BytesIO()
        super().save(whole, exclude, include)
        with zipfile.ZipFile(whole, "a") as archive:
            archive.writestr(MEMBER, description_text(self))
        with written_whole(path, "zip") as file:
            file.write(whole.getbuffer())

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        optimizer = ["dynamics.optimizer"] if getattr(self.dynamics, "optimizer", None) is not None else []
        learned = ["learned_reward", "learned_termination", "learned_termination.optimizer"]
        return [*state_dicts, "dynamics", *optimizer, *learned], variables

    def _kept_refills(self) -> int:
        """:return: number of model rollouts that the model buffer keeps"""
        if self.dynamics_window is None:
            return self.retained_rollouts
        # Older fits have seen none of the newest transitions.
        return min(self.retained_rollouts, -(-self.dynamics_window // self.model_train_freq))

    def _make_replay_buffer(self) -> MixedReplayBuffer:
        try:
            return MixedReplayBuffer(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                self.device,
                self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **self.replay_buffer_kwargs,
                retained_rollouts=self._kept_refills(),
                **{name: getattr(self, name) for name in ("real_ratio", "model_buffer_size", "seed")},
            )
        except MemoryError as error:
            raise ValueError(f"buffer_size={self.buffer_size} does not fit into memory ({error}). Lower it") from error

    @property
    def replay_buffer(self) -> MixedReplayBuffer:
        """
        The real and imagined transitions.

        If a plain ``ReplayBuffer`` of SB3 is assigned, the agent gets a ``MixedReplayBuffer`` with the same transitions, which
        shares its arrays. ``None`` frees the memory.

        :raises ValueError: on assignment: it is not a replay buffer, or one for other envs, or a plain one with numbers that
            are not finite. A ``MixedReplayBuffer`` is not searched for such numbers
        """
        return self.__dict__["replay_buffer"]  # type: ignore[no-any-return]

    @replay_buffer.setter
    def replay_buffer(self, buffer: ReplayBuffer | None) -> None:
        if buffer is not None:
            if not isinstance(buffer, ReplayBuffer):
                raise ValueError(f"replay_buffer={shown(buffer)} must be a ReplayBuffer of Stable-Baselines3, or None")
            check_fits(buffer, self.n_envs, self.observation_space, self.action_space)
            if not isinstance(buffer, MixedReplayBuffer):
                plain, buffer = buffer, self._make_replay_buffer()
                buffer.adopt(plain)
        # SB3 also stores it there when it loads a zip.
        self.__dict__["replay_buffer"] = buffer

    def save_replay_buffer(self, path: Any, imagined: bool = False, safe: bool = False) -> None:
        """
        Save the replay buffer, see SB3. The file contains only the filled part, and a checksum at its end.

        :param path: see SB3; a name that ends in ``.pt`` implies ``safe``
        :param imagined: also save the imagined transitions. Otherwise, a loaded agent imagines new ones before it trains
        :param safe: save tensors instead of a pickle, so that nobody who loads the file has to trust you
        :raises ValueError: there is no buffer
        :raises OSError: it could not be written; an existing file is unchanged
        """
        buffer: MixedReplayBuffer | None = self.replay_buffer
        if buffer is None:
            raise ValueError("save_replay_buffer: the agent's replay_buffer is None: there is nothing to save")
        safe = safe or means_tensors(path)
        with written_whole(path, SUFFIX if safe else "pkl") as target, with_checksum(target) as file:
            if safe:
                save_tensors(buffer, file, imagined)
                return
            full = buffer.model_buffer
            if not imagined:
                buffer.model_buffer = ModelBuffer(full.widths[0], full.widths[1], full.refills.maxlen or 1, full.max_rows)
            try:
                super().save_replay_buffer(file)
            finally:
                buffer.model_buffer = full

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True, safe: bool = False) -> None:
        """
        Load a replay buffer, see SB3. It may also be that of a model-free agent. If the file is refused, the agent's buffer is
        unchanged.

        :param path: see SB3; a file whose name ends in ``.pt`` is never unpickled
        :param truncate_last_traj: see SB3
        :param safe: refuse a pickle, which runs any code that its author has put into it
        :raises ValueError: the file was not written by ``save_replay_buffer`` of such an agent, was altered, or has numbers
            that are not finite
        """
        file = open_path(path, "r", suffix=SUFFIX if safe else "pkl")
        with nullcontext() if file is path else file:
            mine = self.replay_buffer
            # It may be None, or on another device than the agent.
            target = mine if mine is not None and mine.device == self.device else self._make_replay_buffer()
            try:
                if safe or means_tensors(file) or starts_as_zip(file):
                    load_tensors(target, file)
                else:
                    target.adopt(self._unpickled(file, truncate_last_traj))
                    target.device = self.device
            except ValueError as error:
                raise ValueError(f"load_replay_buffer: {path}: {error}") from error
        self.replay_buffer = target

    def _unpickled(self, file: Any, truncate_last_traj: bool) -> MixedReplayBuffer:
        """:return: the pickled buffer, as a mixed one; the agent's own buffer is unchanged"""
        check_checksum(file)
        mine = self.replay_buffer
        try:
            super().load_replay_buffer(file, truncate_last_traj)
            skip_checksum(file)
            return self.replay_buffer
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"it is damaged, or no pickle of a replay buffer that can be read here ({type(error).__name__}: {error})"
            ) from error
        finally:
            self.replay_buffer = mine

    def prefill(self, data: Any) -> None:
        """
        Add existing transitions to the real ones, from which the dynamics learns, too.

        They are not counted as env transitions, so the rollout schedule and the next fit do not change. Earlier ones are kept
        as far as ``buffer_size`` allows. With ``verbose=1``, the numbers of transitions are printed.

        :param data: a Minari dataset, a replay buffer of SB3, or arrays by name, see :func:`.offline_data.read_transitions`
        :raises ValueError: the data do not fit this agent's spaces
        """
        rows = rows_of_steps(read_transitions(data, self.codec), self.n_envs, self.codec)
        if len(rows["rewards"]) > self.replay_buffer.buffer_size:
            room = self.replay_buffer.buffer_size * self.n_envs
            given = rows["rewards"].size
            warnings.warn(f"prefill: of {given} transitions the last {room} are kept; raise buffer_size", stacklevel=2)
        before = self.replay_buffer.size() * self.n_envs
        self.replay_buffer.insert(rows)
        if self.verbose >= 1:
            there = f" to the {before:,} that were there" if before else ""
            now = self.replay_buffer.size() * self.n_envs
            print(f"prefill: added {rows['rewards'].size:,} transitions{there}; the replay buffer holds {now:,}")

    def _model_free(self, policy: dict[str, th.Tensor] | None = None) -> Any:
        """
        Make an agent of SB3's own class with the same arguments, networks, optimizers, counters and env.

        Both agents may learn alternately in the same env: it is reset if the other agent has learned in between. Two agents
        that were made from this one do not notice each other.

        :param policy: state dict of the new agent's policy; ``None``: that of this agent's policy
        :return: the agent, with an empty replay buffer
        """
        algorithms = [kind for kind in type(self).__mro__ if issubclass(kind, OffPolicyAlgorithm)]
        base: Any = next(kind for kind in algorithms if not issubclass(kind, Saving))
        # Not the attributes of this package, nor those of a user's subclass.
        theirs = {*vars(base(self.policy_class, None, _init_setup_model=False)), "observation_space", "action_space", "n_envs"}
        excluded = {
            *self._excluded_save_params(),
            *(name.split(".")[0] for name in chain(*self._get_torch_save_params())),
        }
        data = {name: value for name, value in vars(self).items() if name in theirs - excluded}
        state_dicts, variables = base._get_torch_save_params(self)
        parameters = {name: value for name, value in self.get_parameters().items() if name in state_dicts}
        parameters |= {} if policy is None else {"policy": policy}
        file = io.BytesIO()
        save_to_zip_file(
            file,
            data | {"replay_buffer_class": None},
            parameters,
            {name: getattr(self, name) for name in variables},
        )
        file.seek(0)
        plain = base.load(file, env=self.env, device=self.device)
        if self.env is not None:
            self._plain_agents += (_Plain(weakref.ref(plain), weakref.ref(self.env), plain.start_time),)
        return plain

    def _env_was_stepped(self) -> bool:
        """:return: whether a model-free agent may have learned in this env since this agent did"""
        ours = [(one.agent(), one.began) for one in self._plain_agents if one.env() is self.env]
        return any(plain is None or plain.start_time != began for plain, began in ours)

    def _share_env(self) -> None:
        """
        Called when ``learn`` begins. If a model-free agent has stepped the env, this agent's last observation is removed, so
        that SB3 resets the env first. The same is done to the model-free agents, because this agent will step the env.
        """
        if not self._plain_agents:
            return
        if self._env_was_stepped():
            self._last_obs = None
        kept = []
        for one in self._plain_agents:
            plain, env = one.agent(), one.env()
            if env is not self.env:
                # This agent may get that env again.
                kept += [] if env is None else [one]
            elif plain is not None and plain.env is env:
                plain._last_obs = None
                kept.append(one._replace(began=plain.start_time))
        self._plain_agents = tuple(kept)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own env, in the state of the shared one.
        state = {name: value for name, value in vars(self).items() if name != "_plain_agents"}
        return state | ({"_last_obs": None} if self._env_was_stepped() else {})

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_plain_agents", "codec"]

    def check_parameters(self) -> None:
        """
        :raises ValueError: parameters of the policy are not finite, because learning has diverged
        """
        for name, value in self.policy.state_dict().items():
            if not value.isfinite().all():
                which = "gradient_steps" if self.updates_per_transition is None else "updates_per_transition"
                updates = f"{which}={getattr(self, which)}"
                raise ValueError(
                    f"Learning has diverged: after {self.num_timesteps} steps and {self._n_updates} updates, the policy's "
                    f"{name} is not finite. Lower learning_rate={shown(self.learning_rate)} or "
                    f"{updates}, and go back to an agent or a checkpoint that was saved before"
                )
