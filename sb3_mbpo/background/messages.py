"""What the acting and the learning process send each other: pickled, with the kind in front."""

import copy
import io
import pickle
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger

from sb3_mbpo.buffers.replay_buffer import ROWS
from sb3_mbpo.checkpoints.training_state import plain_attributes, reach
from sb3_mbpo.saving.agent_state import HINTS

# Attributes that belong to the env and the acting process.
_OF_ACTING = {"num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_earlier_timesteps", "_episode_num"}
_OF_ACTING |= {"_current_progress_remaining", "_last_obs", "_last_original_obs", "_last_episode_starts"}
_OF_ACTING |= {"ep_info_buffer", "ep_success_buffer", "learns_in_background", "updates_owed", "normalized_observations"}
# Attributes that the learner has no use for, and that may not be picklable.
_STAYS = ("env", "_logger", "_custom_logger", "_arrays", "resume_callback", "_learner", "warmup_actions", "action_noise")


def packed_agent(agent: Any) -> bytes:
    """:return: a pickle of the agent without its env; it has a logger that writes nowhere"""
    learner = copy.copy(agent)
    for name in _STAYS:
        vars(learner).pop(name, None)
    vars(learner).update(env=None, warmup_actions=None, action_noise=None, verbose=0, learns_in_background=False)
    learner._logger, learner._custom_logger = Logger(None, []), False
    return cloudpickle.dumps(learner)


def newest_step(agent: Any) -> dict[str, Any]:
    """:return: the newest rows of the replay buffer, the counters, and the statistics of ``VecNormalize``"""
    buffer, normalizer = agent.replay_buffer, agent._vec_normalize_env
    row = (buffer.pos - 1) % buffer.buffer_size
    statistics = {} if normalizer is None else {name: getattr(normalizer, name, None) for name in ("obs_rms", "ret_rms")}
    return {
        "rows": {name: getattr(buffer, name)[row : row + 1] for name in ROWS},
        "num_timesteps": agent.num_timesteps,
        "progress": agent._current_progress_remaining,
        "statistics": statistics,
    }


def acting_weights(policy: Any) -> dict[str, np.ndarray]:
    """:return: parameters and buffers of the policy that its actions depend on; they share memory with it on a CPU"""
    state = policy.state_dict()
    return {name: value.detach().cpu().numpy() for name, value in state.items() if not name.startswith("critic")}


@th.no_grad()
def put_weights(policy: Any, weights: dict[str, np.ndarray]) -> None:
    """Copy ``acting_weights`` into another policy of the same kind."""
    own = policy.state_dict()
    for name, value in weights.items():
        own[name].copy_(th.as_tensor(value))


def packed_learning(agent: Any, settled: int, forgets: int, imagined: bool) -> bytes:
    """
    All that learning has changed.

    :param agent: the learner's
    :param settled: number of updates that were due and are made, or were left out
    :param forgets: number of calls of ``forget_transitions`` that it knows of
    :param imagined: with the imagined transitions
    :return: for :func:`put_learning`
    """
    _, variables = agent._get_torch_save_params()
    state = {
        "settled": settled,
        "forgets": forgets,
        "parameters": agent.get_parameters(),
        "variables": {name: reach(agent, name) for name in variables},
        "state": {name: getattr(agent, name) for name in HINTS if name not in _OF_ACTING},
        "attributes": {name: value for name, value in plain_attributes(agent) if name not in _OF_ACTING},
    }
    if imagined:
        rows, refills = agent.replay_buffer.model_buffer.contents()
        state["imagined"] = (rows.clone(), list(refills))
    file = io.BytesIO()
    th.save(state, file)
    return file.getvalue()


def put_learning(agent: Any, packed: bytes, forgets: int) -> int:
    """
    Continue with what was learned.

    :param agent: the acting process's
    :param packed: from :func:`packed_learning`, of this machine's own learner
    :param forgets: number of calls of ``forget_transitions``. If the learner did not know of all, its measurements and
        imagined transitions are of forgotten ones, and are left out
    :return: its ``settled``
    """
    state = th.load(io.BytesIO(packed), map_location=agent.device, weights_only=False)
    agent.set_parameters(state["parameters"], exact_match=True, device=agent.device)
    for name, value in state["variables"].items():
        if value is not None:
            reach(agent, name).data.copy_(value)
    if state["forgets"] < forgets:
        return int(state["settled"])
    vars(agent).update(state["state"] | state["attributes"])
    if "imagined" in state:
        agent.replay_buffer.model_buffer.restore(*state["imagined"])
    return int(state["settled"])


def pack(kind: str, content: Any = None) -> bytes:
    """:return: a message; the content is pickled unless it is bytes"""
    return kind.encode().ljust(8) + (content if isinstance(content, bytes) else pickle.dumps(content))


def unpack(message: bytes) -> tuple[str, bytes]:
    """:return: kind and content of a message, see ``pack``"""
    return message[:8].decode().strip(), message[8:]
