"""Parses the algorithms of a comparison: ``sac``, ``sac:gradient_steps=20,gamma=0.98``."""

import ast
import difflib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sb3_mbpo.validation.rules import numbers_in


@dataclass(frozen=True)
class Spec:
    """
    An algorithm with settings.

    :param label: the text that the user wrote
    :param algo: name of the algorithm in the Zoo
    :param settings: the settings, as JSON values; expressions such as ``dict(net_arch=[64])`` are strings, for the Zoo
    """

    label: str
    algo: str
    settings: dict[str, Any]


def parts(text: str) -> list[str]:
    """:return: parts of ``text`` between the commas outside of brackets and quotes"""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return found


def value_of(text: str) -> Any:
    """:return: value of ``text`` as a Python literal, otherwise as YAML, where a word is a string and 1e-3 a number"""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            value = numbers_in(yaml.safe_load(text))
        except yaml.YAMLError:
            value = text
    # As it will be read from the JSON file of a run.
    return json.loads(json.dumps(value))


def read_spec(text: str, known: Collection[str]) -> Spec:
    """
    Parse an algorithm with settings.

    :param text: ``algo[:key=value[,key=value...]]``; commas inside brackets belong to the value
    :param known: names of algorithms
    :return: algorithm and settings
    :raises ValueError: the text is invalid
    """
    algo, colon, rest = text.partition(":")
    if algo not in known:
        near = difflib.get_close_matches(algo, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"there is no algorithm {algo!r}{hint} Known are {', '.join(sorted(known))}")
    settings = {}
    for item in parts(rest) if colon else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key.isidentifier() or not equals or not value:
            raise ValueError(f"{text!r}: {item!r} is not a setting; write {algo}:key=value,key=value")
        if key in settings:
            raise ValueError(f"{text!r} sets {key} twice")
        settings[key] = value_of(value)
    return Spec(text, algo, settings)


def read_specs(texts: Sequence[str], known: Collection[str]) -> list[Spec]:
    """
    Parse several algorithms.

    :param texts: see :func:`read_spec`
    :param known: names of algorithms
    :return: algorithms and settings
    :raises ValueError: a text is invalid, or two are the same
    """
    specs: list[Spec] = []
    for spec in (read_spec(text, known) for text in texts):
        for other in specs:
            if (spec.algo, spec.settings) == (other.algo, other.settings):
                raise ValueError(f"{other.label!r} and {spec.label!r} are the same; name it once")
        specs.append(spec)
    return specs
