"""Kinds of arguments: how their values are read, which are valid, and an error that says what to do."""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

# Maximum of counts: larger values are almost certainly typos, and would fill the memory or never end.
MOST = 10**9
# Maximum of numbers: the square of a larger one overflows float32, and Adam computes squares of gradients.
LARGEST = 1e15


def shown(value: Any) -> str:
    """
    :param value: any value
    :return: ``repr(value)``, or a function's dotted name, truncated if it is long
    """
    is_function = callable(value) and hasattr(value, "__qualname__") and not isinstance(value, type)
    try:
        text = f"{value.__module__}.{value.__qualname__}" if is_function else repr(value)
    except Exception as error:  # an int of 5000 digits, or a user's class
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= 300 else f"{text[:300]}..."


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """
    :param name: an unknown name
    :param known: the valid names
    :return: end of the error message with the most similar name; empty if no name is similar
    """
    guess = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {guess[0]!r}?" if guess else ""


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """
    :param value: any value
    :param low: minimum
    :param high: maximum
    :return: whether it is an integer in [low, high]; a bool or a float such as 1.0 is not
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(low <= value <= high)


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """
    :param value: any value
    :param low: minimum
    :param high: maximum
    :return: whether it is a number in [low, high]; a bool or NaN is not
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and bool(low <= value <= high)


def is_flag(value: Any) -> bool:
    """
    :param value: any value
    :return: whether it is a bool, 0 or 1; a string is not, because Python would treat "false" as true
    """
    return isinstance(value, bool | np.bool_) or is_whole(value, 0, 1)


def numbers_in(value: Any) -> Any:
    """
    Convert strings and NumPy scalars that are numbers, also in lists, tuples and mappings. YAML reads ``1e-3`` as a string.

    :param value: any value from YAML
    :return: the value with numbers converted; lists and mappings are copies
    """
    if isinstance(value, Mapping):
        return {key: numbers_in(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(numbers_in(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and isinstance(value, str) and number.is_integer() else number


def count_in(value: Any) -> Any:
    """:return: see :func:`numbers_in`; also an int for a float without a fraction, such as ``1e6``"""
    value = numbers_in(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def resolve(value: Any) -> Any:
    """
    Import the object with a dotted name. Other values are returned unchanged.

    :param value: ``"package.module.attribute"``, or anything else
    :return: the object
    :raises ImportError, AttributeError, ValueError, TypeError: there is no object with this name
    """
    if not isinstance(value, str) or "." not in value:
        return value
    module, _, attribute = value.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class ArgumentCheck:
    """
    How the value of an argument is read, and which values are valid.

    :param holds: returns whether a value is valid; must not raise for any value
    :param expected: end of the message "must be ..."
    :param convert: reads other forms of a value, such as a number that is a string; returns all other values unchanged
    :param words: valid strings of an argument whose other strings are names to be imported; ``None``: nothing is imported
    """

    holds: Callable[[Any], bool]
    expected: str
    convert: Callable[[Any], Any] = lambda value: value
    words: tuple[str, ...] | None = None

    def check(self, name: str, value: Any, remedy: str = "") -> None:
        """
        :param name: name of the argument, for the error
        :param value: value of the argument
        :param remedy: appended to the error
        :raises ValueError: the value is not valid
        """
        if not self.holds(value):
            raise ValueError(f"{name}={shown(value)} must be {self.expected}{remedy}")

    def read(self, name: str, value: Any, remedy: str = "") -> Any:
        """
        :param name: see :meth:`check`
        :param value: see :meth:`check`
        :param remedy: see :meth:`check`
        :return: the converted value
        :raises ValueError: the value is not valid, or cannot be imported
        """
        try:
            converted = self.convert(value)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{name}={shown(value)} must be {self.expected} ({error}){remedy}") from error
        self.check(name, converted, remedy)
        return converted

    def __or__(self, other: "ArgumentCheck") -> "ArgumentCheck":
        """:return: check that accepts what either of the two accepts; other forms are read by the second"""
        return replace(
            other, holds=lambda value: self.holds(value) or other.holds(value), expected=f"{self.expected} or {other.expected}"
        )


def whole(low: int, high: int | None = None) -> ArgumentCheck:
    """
    :param low: minimum
    :param high: maximum; ``None``: no maximum
    :return: check for a whole number in this range
    """
    most = "" if high is None else f" and at most {high:,}"
    limit = math.inf if high is None else high
    return ArgumentCheck(lambda value: is_whole(value, low, limit), f"a whole number of at least {low}{most}", count_in)


def number(low: float, high: float, meaning: str = "") -> ArgumentCheck:
    """
    :param low: minimum
    :param high: maximum
    :param meaning: end of the message "must be ..."; empty: the range
    :return: check for a number in this range
    """
    expected = meaning or f"a number from {low:g} to {high:g}"
    return ArgumentCheck(lambda value: is_number(value, low, high), expected, numbers_in)


def one_of(*values: Any, expected: str = "") -> ArgumentCheck:
    """
    :param values: ``None``, strings or whole numbers
    :param expected: end of the message "must be ..."; empty: the values
    :return: check for one of the values
    """
    return ArgumentCheck(
        lambda value: any(type(value) is type(one) and value == one for one in values),
        expected or " or ".join(", ".join(map(repr, values)).rsplit(", ", 1)),
    )


def imported(
    expected: str,
    *words: str,
    holds: Callable[[Any], bool] = callable,
    convert: Callable[[Any], Any] = numbers_in,
) -> ArgumentCheck:
    """
    :param expected: end of the message "must be ..."
    :param words: valid strings
    :param holds: returns whether another value is valid
    :param convert: reads other forms of a value
    :return: check for an object that may be given by its dotted name
    """
    return ArgumentCheck(
        lambda value: value in words if isinstance(value, str) else holds(value),
        f"{expected}, or its dotted name",
        lambda value: value if isinstance(value, str) and value in words else resolve(convert(value)),
        words,
    )


def like(default: Any) -> ArgumentCheck | None:
    """
    The rule for an argument without one, by its default: a flag must be true or false, and a number must not be text.

    :param default: default of the argument
    :return: the rule; ``None``: every value is valid
    """
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, int):
        return ArgumentCheck(lambda value: not isinstance(value, str | float), "a whole number", count_in)
    if isinstance(default, float):
        return ArgumentCheck(lambda value: not isinstance(value, str), "a number", numbers_in)
    return None


def read_all(
    values: Mapping[str, Any], table: Mapping[str, ArgumentCheck], where: str = "", defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Read and check arguments.

    :param values: the arguments by name
    :param table: a rule for each name; without one, see :func:`like`
    :param where: in front of the names in errors
    :param defaults: defaults by name, for errors and for arguments without a rule
    :return: the converted arguments
    :raises ValueError: a value is not valid
    """
    read = {}
    for name, value in values.items():
        default = (defaults or {}).get(name)
        rule = table.get(name) or like(default)
        remedy = "" if default is None else f". The default is {shown(default)}"
        read[name] = value if rule is None else rule.read(f"{where}{name}", value, remedy)
    return read


FLAG = ArgumentCheck(is_flag, "true or false")
POSITIVE = ArgumentCheck(
    lambda value: is_number(value, 0, LARGEST) and value > 0, f"a number above 0 and at most {LARGEST:g}", numbers_in
)
# Adam's steps are about as large as the learning rate, and useful weights are far below 1000.
RATE = number(0, 1e3, "a number from 0 to 1000, such as 3e-4")
NONE = one_of(None)
MAPPING = ArgumentCheck(lambda value: isinstance(value, Mapping), "a mapping of keyword arguments", numbers_in)
