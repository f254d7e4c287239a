"""Parses the algorithms of a comparison: ``sac``, ``sac:gradient_steps=20,gamma=0.98``."""

import ast
import json
from collections.abc import Collection
from typing import Any, NamedTuple

import yaml

from sb3_mbpo.validation.rules import did_you_mean, numbers_in


class Spec(NamedTuple):
    """An algorithm with settings."""

    #: The text that the user wrote.
    label: str
    algo: str
    #: JSON values; expressions such as ``dict(net_arch=[64])`` are strings, for the Zoo.
    settings: dict[str, Any]


def parts(text: str) -> list[str]:
    """:return: parts of ``text`` between the commas outside of brackets and quotes"""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not (depth or quote):
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
    :param text: ``algo[:key=value[,key=value...]]``; commas inside brackets belong to the value
    :param known: names of algorithms
    :raises ValueError: the text is invalid
    """
    algo, colon, rest = text.partition(":")
    if algo not in known:
        raise ValueError(f"there is no algorithm {algo!r} among {', '.join(sorted(known))}{did_you_mean(algo, known)}")
    settings: dict[str, Any] = {}
    for item in parts(rest) if colon else []:
        key, _, value = (part.strip() for part in item.partition("="))
        if not key.isidentifier() or not value:
            raise ValueError(f"{text!r}: {item!r} is not a setting; write {algo}:key=value,key=value")
        if key in settings:
            raise ValueError(f"{text!r} sets {key} twice")
        settings[key] = value_of(value)
    return Spec(text, algo, settings)
