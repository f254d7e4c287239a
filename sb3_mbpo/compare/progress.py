"""Progress of a comparison: bars in a terminal; otherwise, a line for each run that has ended."""

import csv
import time
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sb3_mbpo.compare.run import EVALUATIONS, Run

# Seconds between two reads of the runs' files.
INTERVAL = 1.0


def latest(path: Path) -> tuple[int, float] | None:
    """:return: step and mean return of a run's last evaluation; ``None`` if there is none, or if it is being written"""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
        returns = [result for step, result in rows if step == rows[-1][0]]
        return rows[-1][0], sum(returns) / len(returns)
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


class RunProgress(Progress):
    """
    A progress bar for all runs, and one for each active run.

    :param total: Number of runs
    :param skipped: Number of runs that had been finished before
    :param root: Folder of the comparison
    :param console: Where to print; ``None``: standard output
    """

    def __init__(self, total: int, skipped: int, root: Path, console: Console | None = None) -> None:
        console = console or Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.total, self.done, self.failed, self.root = total, skipped, 0, root
        self.bars: dict[Path, TaskID] = {}
        self._looked = 0.0
        if skipped:
            self._say(f"{skipped} of {total} runs were finished before")
        self.overall = self.add_task("all runs", total=total, completed=skipped, state="")

    def _say(self, line: str) -> None:
        # No markup, no highlighting, and no wrapping without a terminal.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, active: Collection[Run]) -> None:
        """Update the bars, of which each active run has one."""
        if time.monotonic() - self._looked < INTERVAL:
            return
        self._looked = time.monotonic()
        for run in active:
            if run.folder not in self.bars:
                self.bars[run.folder] = self.add_task(str(run), total=run.steps, state="")
            if (now := latest(self.root / run.folder / EVALUATIONS)) is not None:
                self.update(self.bars[run.folder], completed=now[0], state=f"step {now[0]:,}, return {now[1]:,.1f}")
        waiting = self.total - self.done - self.failed - len(active)
        state = f"{self.done} done, {len(active)} active, {waiting} waiting, {self.failed} failed"
        self.update(self.overall, state=state)

    def ended(self, run: Run, failure: str | None) -> None:
        """Remove the bar of a run and print its result: finished, or failed with this message."""
        if run.folder in self.bars:
            self.remove_task(self.bars.pop(run.folder))
        now = latest(self.root / run.folder / EVALUATIONS)
        if failure is not None:
            self.failed += 1
            result = "failed: " + failure.partition("\n")[0]
        else:
            self.done += 1
            result = "done" if now is None else f"done, return {now[1]:,.1f} at step {now[0]:,}"
        self.update(self.overall, completed=self.done + self.failed)
        self._say(f"[{self.done + self.failed}/{self.total}] {run}: {result}")
