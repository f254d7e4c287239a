"""What an agent counts and measures while it learns, in one place."""

import math
import types
import typing
from typing import Annotated, Any

from sb3_mbpo.saving.serialization import decode, encode, is_a
from sb3_mbpo.validation.argument_table import LONGEST_AUTO
from sb3_mbpo.validation.rules import shown


class SB3State:
    """Counters of SB3 that are saved with ours."""

    num_timesteps: int
    _total_timesteps: int
    _num_timesteps_at_start: int
    _episode_num: int
    _n_updates: int
    _current_progress_remaining: float


class AgentState(SB3State):
    """
    Everything that an agent counts or measures while it learns, apart from networks, optimizers, generators and buffers.

    A line here is all that a new attribute needs: ``save``, ``load``, safe loading, checkpoints and undone fits include it. It
    starts as the value given here, otherwise as 0, ``False``, ``None`` or an empty list. Whole numbers must be at least 0, and
    numbers finite; ``Annotated`` adds a minimum and a maximum.
    """

    #: Env transitions of earlier ``learn`` calls, see ``lifetime_timesteps``.
    _earlier_timesteps: int
    #: ``lifetime_timesteps`` at the last fit.
    dynamics_fitted_at: int | None
    #: k of ``rollout_schedule="auto"``, measured before each fit except the first.
    auto_rollout_length: Annotated[int, 1, LONGEST_AUTO] = 1
    #: Fraction of the imagined rows allowed by ``real_ratio`` that batches really have, see ``min_explained_variance``.
    imagined_fraction: Annotated[float, 0, 1] = 1.0
    #: Squared errors of the reward and of each dimension on the steps after each fit, smoothed over the fits.
    forward_errors: list[float]
    #: ``dynamics/explained_reward`` and ``dynamics/explained_obs`` of the last fit; empty before the first one.
    explained_at_fit: list[float]
    #: Bounds of rewards and observations at the last fit, see ``prediction_clip_margin``; only DHMBPO stores them.
    prediction_bounds: list[float]
    #: Number of successive fits after which the dynamics explained too little to be used.
    unused_fits: int
    #: State of the rule of ``rollout_filter`` that is kept from one model rollout to the next.
    filter_state: list[float]
    #: Whether :meth:`.ModelBased.forget_transitions` was called. The next fit then needs fewer rows, and updates wait for it.
    forgot_transitions: bool
    #: Whether the last ``learn`` saw observations that a ``VecNormalize`` had normalized.
    normalized_observations: bool
    #: Updates that the learner of ``learn(background=True)`` had not made when it ended; the next one begins with them.
    updates_owed: Annotated[int, 0, 10**7] = 0
    #: Updates of ``pretrain``, which belong to no env transition of this agent.
    pretraining_updates: int
    #: Names of warnings that were issued and are not repeated. A loaded agent repeats them.
    _warned_of: list[str]

    def begin_state(self) -> None:
        """Initialize our counters, but not SB3's, which SB3 initializes."""
        for name in OURS:
            kind = _kind(HINTS[name])
            value = getattr(AgentState, name, None if kind is None else kind())
            setattr(self, name, value)


HINTS = typing.get_type_hints(AgentState, include_extras=True)
#: Our counters, without SB3's.
OURS = [name for name in HINTS if name not in typing.get_type_hints(SB3State)]
#: Attributes that change during ``learn``, are not in :class:`AgentState`, and may be lost or follow from what is saved.
DERIVED = {
    "_rollout_block": "found again when memory runs out",
    "_printed_threads": "printed at most once more",
    "_arrays": "made anew by each learn",
    "_stepped_at": "set by each step, and used within it",
    "resume_callback": "of the learn under way",
    "_plain_agents": "of this process",
}


def _kind(hint: Any) -> Any:
    """:return: the class that a hint stands for; ``None``: the value may be ``None``"""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return None if isinstance(hint, types.UnionType) else typing.get_origin(hint) or hint


def _is_valid(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        hint, low, high = typing.get_args(hint)
        return _is_valid(value, hint) and bool(low <= value <= high)
    if isinstance(hint, types.UnionType):
        return any(_is_valid(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return type(value) is list and all(_is_valid(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return is_a(value, (int, float)) and math.isfinite(value)
    return is_a(value, (hint,)) and (hint is not int or 0 <= value < 2**63)


def encode_state(agent: Any) -> dict[str, Any]:
    """
    :param agent: a ModelBased algorithm
    :return: all of its :class:`AgentState`, as JSON
    """
    return {name: encode(getattr(agent, name), name=name) for name in HINTS}


def decode_state(encoded: Any, obs_dim: int) -> dict[str, Any]:
    """
    :param encoded: the result of :func:`encode_state`, read from JSON; anyone may have written it
    :param obs_dim: size of the agent's flat observations
    :return: the attributes of an agent, by name
    :raises ValueError: an attribute is missing, unknown, or of a wrong type or range
    """
    if not isinstance(encoded, dict) or set(encoded) != set(HINTS):
        raise ValueError(f"state must have {', '.join(HINTS)}")
    values = {name: decode(item, where=f"state: {name}") for name, item in encoded.items()}
    for name, value in values.items():
        if not _is_valid(value, HINTS[name]):
            raise ValueError(f"state: {name}={shown(value)} is out of range, or of a wrong type")
    # Empty before the first fit.
    for name, size in {"forward_errors": 1 + obs_dim, "explained_at_fit": 2, "prediction_bounds": 6 + 2 * obs_dim}.items():
        if len(values[name]) not in (0, size):
            raise ValueError(f"state: {name} has {len(values[name])} numbers, but must have {size}")
    return values
