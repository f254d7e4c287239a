"""Tables in the documentation that scripts renew: each stands between two comments that Markdown does not show."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks"
PAGE = BENCHMARKS / "index.md"
README = ROOT / "README.md"


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- begin {name} -->\n\n).*?(?=\n\n<!-- end {name} -->)", re.DOTALL)


def table_in(page: Path, name: str) -> str:
    """
    :param page: in Markdown
    :param name: of the table
    :return: what stands between ``<!-- begin name -->`` and ``<!-- end name -->``
    :raises ValueError: the page has not one such place
    """
    found = _between(name).findall(page.read_text(encoding="utf-8"))
    if len(found) != 1:
        raise ValueError(f"{page} has {len(found)} places for the table {name!r}, not one")
    return str(found[0])


def put_table(page: Path, name: str, text: str) -> None:
    """
    :param page: in Markdown
    :param name: of the table, whose old text is replaced
    :param text: of the table
    :raises ValueError: the page has not one such place
    """
    table_in(page, name)
    page.write_text(_between(name).sub(lambda _: text, page.read_text(encoding="utf-8")), encoding="utf-8")
