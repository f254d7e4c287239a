"""The register of classes that a file may name. They register themselves, so that loading imports nothing by its name."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T", bound=type)


class Field(NamedTuple):
    """
    An argument from which an equal object is made.

    :param attribute: name of the attribute that holds its value
    :param types: types that the value may have in a file
    :param item_type: type of each item, if the value is a list or a tuple
    """

    attribute: str
    types: tuple[type, ...]
    item_type: type = object


class Described(NamedTuple):
    """
    A class whose objects may be in a file.

    :param name: its name in the file
    :param make: makes an object from the fields
    :param fields: the arguments of ``make``, by name
    """

    name: str
    make: Callable[..., Any]
    fields: dict[str, Field]


#: Classes whose objects may be in a file.
DESCRIBED: dict[type, Described] = {}
#: Classes that a file may name, such as activation functions.
NAMED: dict[str, type] = {}
#: Our algorithms, by name.
AGENTS: dict[str, type] = {}
#: Classes whose objects an argument of our algorithms may be in a file, by the name of the argument.
OF_ARGUMENT: dict[str, list[type]] = {}


def describe_as(cls: type, name: str, make: Callable[..., Any], **fields: Field) -> None:
    """
    Allow objects of a class in files.

    :param cls: the class; objects of its subclasses are not allowed
    :param name: its name in the file
    :param make: makes an object from the fields
    :param fields: the arguments of ``make``
    """
    DESCRIBED[cls] = Described(name, make, fields)


def described(argument: str | None = None) -> Callable[[T], T]:
    """
    Decorator of a dataclass or named tuple of ours: its objects may be in a file, described by its fields.

    :param argument: the argument of our algorithms that such an object may be; ``None``: only a part of another object
    """

    def register(cls: T) -> T:
        fields = {name: _field(name, hint) for name, hint in typing.get_type_hints(cls).items()}
        assert dataclasses.is_dataclass(cls) or issubclass(cls, tuple)
        describe_as(cls, f"sb3_mbpo.{cls.__name__}", cls, **fields)
        if argument is not None:
            OF_ARGUMENT.setdefault(argument, []).append(cls)
        return cls

    return register


def _field(name: str, hint: Any) -> Field:
    """:return: a field of a dataclass with this type hint, such as ``float``, ``int | None`` or ``tuple[Part, ...]``"""
    if isinstance(hint, types.UnionType):
        return Field(name, sum((_field(name, part).types for part in hint.__args__), ()))
    item_type = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else object
    kind = typing.get_origin(hint) or hint
    return Field(name, (int, float) if kind is float else (kind,), item_type)


def named(cls: T) -> T:
    """Decorator: a file may name this class of ours."""
    NAMED[f"sb3_mbpo.{cls.__name__}"] = cls
    return cls


def register_agent(cls: type) -> None:
    """:param cls: an algorithm; if it is one of this package, a file may name it from now on"""
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        AGENTS[cls.__name__] = cls
