"""Numbers as people read them, and pages that need no other file."""

import base64
import re

import numpy as np
import pytest

from sb3_mbpo.compare.html import definitions, number, page, picture, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (7.0, "7"),
        (0.0123, "0.012"),
        (-0.00001234, "\N{MINUS SIGN}1.2e\N{MINUS SIGN}05"),
        (-0.5, "\N{MINUS SIGN}0.50"),
        (np.inf, "\N{EN DASH}"),
        (np.nan, "\N{EN DASH}"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_page() -> None:
    parts = [picture(b"content", 'a "picture"', "of <i>something</i>", "webp"), definitions([("x<", "<b>y</b>")])]
    html = page("a <b", [*parts, table(["<", "a, b"], [["c", ("d", "<e")]])], "p { }")
    assert "<title>a &lt;b</title>" in html and "<h1>a &lt;b</h1>" in html and "p { }</style>" in html
    kind, data = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', html)[0]
    assert kind == "webp" and base64.b64decode(data) == b"content"
    assert 'alt="a &quot;picture&quot;"' in html and "<figcaption>of <i>something</i></figcaption>" in html
    assert "<dl><dt>x&lt;</dt><dd><b>y</b></dd></dl>" in html
    assert "<th>&lt;</th><th>a,&nbsp;b</th>" in html and "<tr><td>c</td><td>d<small>&lt;e</small></td></tr>" in html
