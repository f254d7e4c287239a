"""Shows executed notebooks as pages: the cells, printed text, tables and pictures. Nothing is run when the docs are built."""

import json
import re
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx


def joined(text: str | list[str]) -> str:
    """:return: text of a notebook, which may be stored as a list of lines"""
    return text if isinstance(text, str) else "".join(text)


def shown_output(output: dict[str, Any]) -> str:
    """
    :param output: an output of a code cell
    :return: the output in Markdown: a picture, a table or text
    """
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output of the cell above](data:image/png;base64,{joined(data['image/png']).strip()})"
    if "<table" in joined(data.get("text/html", "")):
        html = re.sub(r"<style.*?</style>|\n\s*", "", joined(data["text/html"]), flags=re.DOTALL)
        return f'<div class="table-wrapper">{html}</div>'
    text = joined(output.get("text", "") or data.get("text/plain", "")).rstrip()
    return f"```text\n{text}\n```" if text else ""


def as_markdown(notebook: dict[str, Any]) -> str:
    """
    :param notebook: content of an ``.ipynb`` file
    :return: the same as a page in Markdown
    """
    parts = []
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += [shown_output(output) for output in cell.get("outputs", [])]
    return "\n\n".join(part for part in parts if part) + "\n"


class NotebookParser(MystParser):
    """Parser of ``.ipynb`` files."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """
        :param inputstring: content of the file
        :param document: gets the page
        """
        super().parse(as_markdown(json.loads(inputstring)), document)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the parser; called by Sphinx."""
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True}
