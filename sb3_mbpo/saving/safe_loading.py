"""Loads an agent from a zip that anyone may have written. JSON and tensors are read, pickles are not."""

import io
from typing import Any

import torch as th

from sb3_mbpo.saving.checked_tensors import Bounded, restore
from sb3_mbpo.saving.description import build, describe
from sb3_mbpo.saving.safe_files import read_bytes, read_json, read_members, read_tensors, write_json

#: The member that describes the agent.
MEMBER = "sb3_mbpo.json"
# Members of Stable-Baselines3 that are never opened here: "data" contains pickles.
_UNREAD = ("data", "_stable_baselines3_version", "system_info.txt")


def description_text(agent: Any) -> str:
    """
    :param agent: a ModelBased algorithm
    :return: the content of :data:`MEMBER`
    """
    return write_json(describe(agent))


def load_safely(cls: type, path: Any, env: Any, device: th.device | str, overrides: dict[str, Any]) -> Any:
    """
    :param cls: the algorithm that was saved
    :param path: see SB3
    :param env: see SB3
    :param device: see SB3
    :param overrides: arguments of the constructor, including those that no file can hold
    :return: the agent
    :raises ValueError: the file is damaged, hostile or another algorithm's. The message names the file and the reason
    """
    content = read_bytes(path, "zip")
    try:
        members = read_members(content)
        if MEMBER not in members:
            raise ValueError(_without_description(members, cls.__name__))
        for name in members:
            if name not in (MEMBER, *_UNREAD) and not name.endswith(".pth"):
                raise ValueError(f"{name[:50]!r} in it is not a member of an agent's file")
        description = _about(MEMBER, read_json, members[MEMBER])
        tensors = {
            name[:-4]: _about(name, read_tensors, io.BytesIO(data)) for name, data in members.items() if name.endswith(".pth")
        }
        with Bounded(sum(len(data) for name, data in members.items() if name.endswith(".pth"))):
            agent = build(description, env, cls=cls, device=device, **overrides)
        restore(agent, tensors)
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
    if agent.use_sde:
        agent.policy.reset_noise()
    return agent


def _without_description(members: dict[str, bytes], name: str) -> str:
    if "dynamics.pth" not in members:
        return (
            "it holds no dynamics; it is not an agent's, or was saved by a model-free algorithm. To start from the networks "
            f"of one, make a new agent of the same net_arch and load them into it: agent = {name}(...); "
            "agent.set_parameters(path, exact_match=False)"
        )
    return (
        f"it has no {MEMBER}, which safe=True reads: it was saved by an earlier version of sb3_mbpo. Save it again with this "
        "version, or load it with safe=False if you trust its author"
    )


def _about(name: str, read: Any, content: Any) -> Any:
    try:
        return read(content)
    except ValueError as error:
        raise ValueError(f"{name[:50]}: {error}") from error
