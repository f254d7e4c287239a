"""Two sides in turns: what benchmarks/speed.py does with a pair of functions that each measure one round."""

import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass

# What a side measured in one round, by name.
Figures = dict[str, float]


@dataclass
class Comparison:
    """
    :param ours: measures one round
    :param theirs: the same for the other side, by the same names
    :param target: of the first figure's ratio, such as ">= 1.7"
    :param times: the figures are times, of which the ratio is theirs over ours; else ours over theirs
    :param versions: of the other side, where it is a peer
    """

    ours: Callable[[], Figures]
    theirs: Callable[[], Figures]
    target: str
    times: bool = False
    versions: str = ""

    def ratio(self, ours: float, theirs: float) -> float:
        return theirs / ours if self.times else ours / theirs


def measure(comparison: Comparison, rounds: int, warm_ups: int) -> list[dict[str, object]]:
    """The lines of all rounds, in which ours and theirs take turns to be first."""
    lines: list[dict[str, object]] = []
    for i in range(1 - warm_ups, rounds + 1):
        order = -1 if i % 2 == 0 else 1
        ours, theirs = [side() for side in (comparison.ours, comparison.theirs)[::order]][::order]
        for name in ours if i > 0 else ():
            values = {"ours": ours[name], "theirs": theirs[name], "ratio": comparison.ratio(ours[name], theirs[name])}
            line = {"measure": name, "round": i, **{key: float(f"{value:.5g}") for key, value in values.items()}}
            lines.append({**line, "target": comparison.target if name == next(iter(ours)) else ""})
        if i > 0:
            name = next(iter(ours))
            print(f"    round {i}: {name} {ours[name]:.4g} against {theirs[name]:.4g}", flush=True)
    return lines


def report(lines: list[dict[str, object]]) -> None:
    """One line per measure: the medians of both sides, then of the ratio, between its least and greatest."""
    for name in dict.fromkeys(str(line["measure"]) for line in lines):
        mine = [line for line in lines if line["measure"] == name]
        ours, theirs, ratios = ([float(str(line[key])) for line in mine] for key in ("ours", "theirs", "ratio"))
        ratio, target = statistics.median(ratios), str(mine[0]["target"])
        text = f"  {name:34} {statistics.median(ours):9.4g} against {statistics.median(theirs):9.4g}: "
        text += f"{min(ratios):.3g} - {ratio:.3g} - {max(ratios):.3g}"
        if target:
            sign, bound = target.split()
            met = (operator.ge if sign == ">=" else operator.le)(ratio, float(bound))
            text += f" (wanted {target}: {'met' if met else 'MISSED'})"
        print(text, flush=True)
