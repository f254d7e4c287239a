"""
The folders of the package and who imports whom: the table and the picture of docs/architecture.md.

    python benchmarks/architecture.py

Reads the source, imports nothing of it. ``tests/test_architecture.py`` uses the same functions.
"""

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sb3_mbpo"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
PICTURE = ROOT / "docs" / "architecture.svg"


def module_of(file: Path) -> str:
    """:return: a file's dotted name inside the package: ``dynamics.layers``, ``mbpo``; a folder's for its ``__init__.py``"""
    parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(file) for file in FILES}


def room_of(module: str) -> str:
    """:return: the folder that a module is in, or the module itself where it is in none"""
    return module.partition(".")[0]


def imported_modules(source: str, own: str = "__init__") -> Iterator[str]:
    """
    Our modules that a source imports, wherever the import stands: at the top, in a function, for type checking.

    :param source: code
    :param own: the module that it is, for relative imports
    :return: dotted names inside the package; the package itself is ``__init__``
    """
    folder = own.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(folder, node.level, node.module) if node.level else node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            name = target.value if isinstance(target, ast.Constant) and isinstance(target.value, str) else ""
            names = [PACKAGE + name if name.startswith(".") else name]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE:
                yield next((prefix for prefix in _prefixes(rest) if prefix in MODULES), "__init__")


def _absolute(folder: str, level: int, module: str | None) -> str:
    """:return: what ``from ..module`` means in a folder of the package"""
    parts = [PACKAGE, *folder.split(".")] if folder else [PACKAGE]
    return ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])


def _prefixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


@cache
def arrows() -> dict[str, set[str]]:
    """:return: of each folder and each file beside them, the others that it imports; the front door is left out"""
    found: dict[str, set[str]] = {}
    for file in FILES:
        module = module_of(file)
        if module not in ("__init__", "__main__"):
            row = found.setdefault(room_of(module), set())
            row |= {room_of(other) for other in imported_modules(file.read_text(encoding="utf-8"), module)}
    return {room: others - {room, "__init__"} for room, others in found.items()}


def sizes() -> dict[str, tuple[int, int]]:
    """:return: of each folder and each file beside them, files and lines"""
    found: dict[str, tuple[int, int]] = {}
    for file in FILES:
        room, lines = room_of(module_of(file)), file.read_text(encoding="utf-8").count("\n")
        files, before = found.get(room, (0, 0))
        found[room] = (files + (lines > 1), before + lines)
    return found


# From the bottom up: a folder, or a file beside the folders, imports only what is in a row below its own.
ORDER = [
    ["codec", "validation", "fast_sac", "theory", "restarting_env"],
    ["buffers", "dynamics"],
    ["rewards", "terminations"],
    ["trust"],
    ["rollouts", "rollout_schedule", "arguments"],
    ["runtime"],
    ["saving"],
    ["checkpoints"],
    ["background"],
    ["model_based"],
    ["mbpo", "dhmbpo", "variants"],
    ["zoo"],
    ["compare"],
    ["diagnostics"],
    ["__main__"],
]

# What a newcomer reads to understand MBPO.
CORE = ("mbpo", "model_based", "rollouts", "rollout_schedule", "buffers", "dynamics")


def reduced(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """:return: the arrows without those that follow from others: a -> c where a -> b -> c"""

    def reached(room: str) -> set[str]:
        return found[room] | {further for other in found[room] for further in reached(other)}

    return {room: others - {one for other in others for one in reached(other)} for room, others in found.items()}


def table() -> str:
    """:return: Markdown: files, lines, the median and the longest file, and lines of tests a line of code"""
    lines = [file.read_text(encoding="utf-8").count("\n") for file in FILES]
    tests = sum(file.read_text(encoding="utf-8").count("\n") for file in (ROOT / "tests").rglob("*.py"))
    code = [n for n in lines if n > 1]
    return (
        "| files | lines | median / longest file | tests : code |\n|---|---|---|---|\n"
        f"| {len(code)} | {sum(code):,} | {statistics.median(code):.0f} / {max(code)} | {tests / sum(code):.2f} |"
    )


def draw() -> None:
    """Write ``PICTURE``: folders in rows, the core in another colour, arrows to what is below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = PACKAGE
    from matplotlib import pyplot as plt

    rows = [row for row in ORDER if row != ["__main__"]]
    size, shown = sizes(), reduced(arrows())
    figure, axes = plt.subplots(figsize=(8, 10))
    place = {}
    for level, row in enumerate(rows):
        for i, room in enumerate(row):
            place[room] = ((i + 1) / (len(row) + 1) + 0.09 * (level % 3 - 1), level)
    for room, others in shown.items():
        for other in others:
            axes.annotate(
                "",
                xy=(place[other][0], place[other][1] + 0.3),
                xytext=(place[room][0], place[room][1] - 0.3),
                arrowprops={"arrowstyle": "->", "color": "0.55", "lw": 1, "shrinkA": 0, "shrinkB": 0},
            )
    for room, (x, y) in place.items():
        files, lines = size[room]
        label = f"{room}/\n{files} files, {lines:,} lines" if files > 1 else f"{room}.py\n{lines:,} lines"
        box = {"boxstyle": "round,pad=0.35", "fc": "#cfe3f7" if room in CORE else "#f0f0f0", "ec": "0.4"}
        axes.text(x, y, label, ha="center", va="center", fontsize=8.5, bbox=box)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    print(table())
    draw()
