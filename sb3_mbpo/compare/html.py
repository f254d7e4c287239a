"""Helpers of the reports: formatted numbers, and a single-file HTML page."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

# Colors of Okabe and Ito, which colorblind readers can distinguish, without the pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NONE = "\N{EN DASH}"
STYLE = """
:root { color-scheme: light dark; background: light-dark(#fff, #18191b); }
body { font: 15px/1.5 system-ui, sans-serif; color: light-dark(#1b1b1b, #e4e4e4); }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
img { width: 100%; max-width: 62rem; display: block; border-radius: 4px; }
figure { margin: 1rem 0; }
figcaption, .note { color: light-dark(#555, #aaa); font-size: .87rem; max-width: 62rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid light-dark(#ddd, #444); }
thead th { font-weight: 600; border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 11rem; }
td small { color: light-dark(#555, #aaa); display: block; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .87rem; }
dt { color: light-dark(#555, #aaa); }
dd { margin: 0; }
code, pre { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere; white-space: pre-wrap; }
pre { margin: 0; }
.failed { border-left: 4px solid #D55E00; padding: .2rem 1rem; background: light-dark(#fff4ec, #3a2415); }
"""


def number(value: float) -> str:
    """:return: number with at least three digits (two below 0.1), thousands separators and a minus sign"""
    if not np.isfinite(value):
        return NONE
    digits = 0 if float(value).is_integer() or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def counted(n: int, noun: str) -> str:
    """:return: number and noun, in the plural unless ``n`` is 1"""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def picture(image: bytes, alt: str, caption: str, kind: str = "png") -> str:
    """:return: an embedded ``"png"`` or ``"webp"``, HTML; ``caption`` is HTML as well"""
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">\n<figcaption>{caption}</figcaption></figure>'
    )


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """:return: names and descriptions as a list, HTML like the descriptions"""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in items) + "</dl>"


def table(head: Iterable[str], rows: Iterable[Sequence[str | tuple[str, str]]]) -> str:
    """:return: table of texts, HTML; a cell of two texts shows the second one below, in small letters"""
    titles = "".join(f"<th>{escape(title).replace(', ', ',&nbsp;')}</th>" for title in head)
    lines = (
        "".join(
            (
                f"<td>{escape(cell)}</td>"
                if isinstance(cell, str)
                else f"<td>{escape(cell[0])}<small>{escape(cell[1])}</small></td>"
            )
            for cell in row
        )
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """:return: a page of HTML from parts of HTML, a title and additional CSS"""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{escape(title)}</h1>
{chr(10).join(parts)}
</body></html>
"""
