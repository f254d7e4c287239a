"""Algorithms as users name them."""

from typing import Any

import pytest

from sb3_mbpo.compare.specs import Spec, parts, read_spec, value_of

KNOWN = ("mbpo", "sac", "tqc")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20", 20),
        ("1e-3", 0.001),
        ("1e6", 1e6),
        ("True", True),
        ("true", True),
        ("null", None),
        ("None", None),
        ("auto", "auto"),
        ("lin_7e-4", "lin_7e-4"),
        ("my_tasks.fallen", "my_tasks.fallen"),
        ("'20'", "20"),
        ("[64, 64]", [64, 64]),
        # As JSON will have it.
        ("(2, 'step')", [2, "step"]),
        ("[2,step]", [2, "step"]),
        ("{net_arch: [8]}", {"net_arch": [8]}),
        # The Zoo evaluates these.
        ("dict(net_arch=[8,8])", "dict(net_arch=[8,8])"),
        ("dict(activation_fn=nn.ReLU)", "dict(activation_fn=nn.ReLU)"),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert value_of(text) == value and type(value_of(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        ("a=[1,2],b=2", ["a=[1,2]", "b=2"]),
        ("a=dict(x=1,y=[2,3],z=(4,5)),b={c: 1, d: 2}", ["a=dict(x=1,y=[2,3],z=(4,5))", "b={c: 1, d: 2}"]),
        ("a='1,2',b=\"3,4\",c=1", ["a='1,2'", 'b="3,4"', "c=1"]),
        ("a=\"it's\",b='3\"4',c=1", ['a="it\'s"', "b='3\"4'", "c=1"]),
    ],
)
def test_commas_in_brackets_and_quotes_part_nothing(text: str, expected: list[str]) -> None:
    assert parts(text) == expected


def test_spec() -> None:
    assert read_spec("sac", KNOWN) == Spec("sac", "sac", {})
    text = "mbpo:gradient_steps=20, policy_kwargs=dict(net_arch=[8,8]),ent_coef=auto_0.1"
    settings = {"gradient_steps": 20, "policy_kwargs": "dict(net_arch=[8,8])", "ent_coef": "auto_0.1"}
    assert read_spec(text, KNOWN) == Spec(text, "mbpo", settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sca", r"no algorithm 'sca' among mbpo, sac, tqc; did you mean 'sac'\?"),
        ("sac:", "'' is not a setting; write sac:key=value"),
        ("sac:gamma", "'gamma' is not a setting"),
        ("sac:gamma=", "'gamma=' is not a setting"),
        ("sac:=3", "'=3' is not a setting"),
        ("sac:gamma=0.9,", "'' is not a setting"),
        ("sac:gamma=0.9,gamma=0.8", "sets gamma twice"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(text, KNOWN)
