"""Checks tensors from a file that anyone may have written, and puts them into an agent."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch as th
from stable_baselines3.common.save_util import recursive_getattr
from torch.utils._python_dispatch import TorchDispatchMode

VARIABLES = "pytorch_variables"


class Bounded(TorchDispatchMode):
    """
    Limits the tensors that are created in this context. A file may describe networks that are larger than its own tensors.

    :param n_bytes: Size of the tensors in the file, in bytes. As many numbers may be created, and a few more
    """

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.left = n_bytes + 2**20
        # Each tensor takes more than a hundred bytes in a file, and a network creates few tensors that are not in the file.
        self.made_left = 1000 + n_bytes // 128

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], list | tuple) and all(isinstance(size, int) for size in args[0]):
            self.left -= math.prod(args[0])
            self.made_left -= 1
            if min(self.left, self.made_left) < 0:
                raise ValueError("the described networks are larger than the tensors in the file")
        return func(*args, **(kwargs or {}))


def check_weights(agent: Any) -> None:
    """
    :param agent: a ModelBased algorithm
    :raises ValueError: a weight is NaN or infinite, or an optimizer of the policy contains NaN, which would spread
    """
    names, variables = agent._get_torch_save_params()
    of_policy = {id(module) for module in agent.policy.modules()}
    found: list[tuple[str, th.Tensor]] = []
    for name in names:
        part, root = recursive_getattr(agent, name), getattr(agent, name.split(".")[0])
        learned = isinstance(root, th.nn.Module) and id(root) not in of_policy
        if isinstance(part, th.nn.Module):
            # The dynamics' state also contains hold-out errors, which are infinite before the first fit.
            state = part.named_parameters() if learned else part.state_dict().items()
            found += [(f"{name}: {key}", value) for key, value in state]
        elif not learned:
            # Squares of large gradients may be infinite in an intact optimizer.
            found += [(f"{name}: {key}", value.nan_to_num(nan=th.nan, posinf=0, neginf=0)) for key, value in _tensors_of(part)]
    for name, value in [*found, *((name, recursive_getattr(agent, name)) for name in variables)]:
        n_wrong = int((~value.isfinite()).sum()) if value is not None else 0
        if n_wrong:
            raise ValueError(
                f"{name} is not finite in {n_wrong:,} of {value.numel():,} numbers: learning had diverged, or the file was "
                "altered. Load an agent or a checkpoint that was saved before"
            )


def _tensors_of(optimizer: th.optim.Optimizer) -> Iterator[tuple[str, th.Tensor]]:
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, th.Tensor):
                yield f"{key} of parameter {number}", value


def check_like(expected: Any, given: Any, where: str) -> None:
    """
    Check that a value has the structure of another one.

    :param expected: a tensor, a plain value, or a container of them
    :param given: must have the same keys, lengths, types, shapes and dtypes; text, bools and ``None`` must be equal
    :param where: name of the value in the error
    :raises ValueError: the structures differ
    """
    if isinstance(expected, th.Tensor):
        if not isinstance(given, th.Tensor) or given.layout != th.strided or given.is_quantized:
            raise ValueError(f"{where} must be a tensor")
        if given.shape != expected.shape or given.dtype != expected.dtype:
            raise ValueError(
                f"{where} must be {expected.dtype} of shape {tuple(expected.shape)}, not {given.dtype} of {tuple(given.shape)}"
            )
    elif isinstance(expected, Mapping):
        if not isinstance(given, Mapping) or set(given) != set(expected):
            _complain_of_keys(set(expected), given, where)
        for key, value in expected.items():
            check_like(value, given[key], f"{where}: {key}")
    elif isinstance(expected, list | tuple):
        if type(given) is not type(expected) or len(given) != len(expected):
            raise ValueError(f"{where} must be a {type(expected).__name__} of {len(expected)}")
        for i, value in enumerate(expected):
            check_like(value, given[i], f"{where}: {i}")
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise ValueError(f"{where} must be a finite number")
    elif type(given) is not type(expected) or given != expected:
        raise ValueError(f"{where} must be {expected!r}, not {str(given)[:50]}")


def _complain_of_keys(expected: set[Any], given: Any, where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping")
    missing, unknown = sorted(map(str, expected - set(given))), sorted(map(str, set(given) - expected))
    raise ValueError(f"{where} lacks {missing[:5]} or has unknown keys {[key[:50] for key in unknown[:5]]}")


def check_optimizer(optimizer: th.optim.Optimizer, given: Any, where: str) -> None:
    """
    Check the state of an optimizer.

    :param optimizer: a new optimizer
    :param given: must be a ``state_dict`` of such an optimizer, before or after its first step
    :param where: name of the value in the error
    :raises ValueError: it is not such a ``state_dict``
    """
    expected = optimizer.state_dict()
    if not isinstance(given, Mapping) or set(given) != {"state", "param_groups"}:
        _complain_of_keys({"state", "param_groups"}, given, where)
    check_like(expected["param_groups"], given["param_groups"], f"{where}: param_groups")
    for ours, theirs in zip(expected["param_groups"], given["param_groups"], strict=True):
        if ours["params"] != theirs["params"]:
            raise ValueError(f"{where}: param_groups must be of the same parameters")
    if not isinstance(given["state"], Mapping):
        raise ValueError(f"{where}: state must be a mapping")
    if given["state"]:
        states = _states_after_a_step(optimizer)
        for key, state in given["state"].items():
            if isinstance(key, bool) or not isinstance(key, int) or key not in states:
                raise ValueError(f"{where}: state is of an unknown parameter {str(key)[:50]}")
            check_like(states[key], state, f"{where}: state: {key}")


def _states_after_a_step(optimizer: th.optim.Optimizer) -> dict[int, Any]:
    """:return: what such an optimizer stores for each parameter, found by a step of a copy"""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = th.zeros_like(parameter)
    twin.step()
    return twin.state_dict()["state"]


def restore(agent: Any, tensors: dict[str, Any]) -> None:
    """
    Put the tensors of a file into an agent, after all of them were checked.

    :param agent: a newly built agent of the same kind as the saved one
    :param tensors: the loaded state dicts of ``_get_torch_save_params``, and ``"pytorch_variables"``, by name
    :raises ValueError: names, shapes or dtypes are not those of the agent
    """
    names, variables = agent._get_torch_save_params()
    if set(tensors) != {*names, VARIABLES}:
        _complain_of_keys({*names, VARIABLES}, tensors, "the file")
    parts = {name: recursive_getattr(agent, name) for name in names}
    # A policy may convert tensors that were saved with other arguments.
    fitting = {name: part.fitting for name, part in parts.items() if hasattr(part, "fitting")}
    fitted = {name: fit(tensors[name]) for name, fit in fitting.items() if isinstance(tensors[name], Mapping)}
    tensors = {**tensors, **fitted}
    for name, part in parts.items():
        if isinstance(part, th.optim.Optimizer):
            check_optimizer(part, tensors[name], name)
        else:
            check_like(part.state_dict(), tensors[name], name)
    check_like({name: recursive_getattr(agent, name) for name in variables}, tensors[VARIABLES], VARIABLES)
    for name, part in parts.items():
        if isinstance(part, th.optim.Optimizer):
            part.load_state_dict(tensors[name])
        else:
            # Without attributes that the mapping from the file may have.
            state = OrderedDict(tensors[name])
            state._metadata = part.state_dict()._metadata  # type: ignore[attr-defined]
            try:
                part.load_state_dict(state, strict=True)
            except RuntimeError as error:
                raise ValueError(f"{name}: {error}") from error
    with th.no_grad():
        for name in variables:
            recursive_getattr(agent, name).copy_(tensors[VARIABLES][name])
