"""Progress of a comparison: bars in a terminal; otherwise, a line for each run that has ended."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sb3_mbpo.compare.run import EVALUATIONS, Run

# Seconds between two reads of the runs' files.
INTERVAL = 1.0


def latest(path: Path) -> tuple[int, float] | None:
    """
    :param path: evaluations of a run; the file may be missing or incomplete
    :return: step and mean return of the last evaluation; ``None`` if there is none
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    returns = [result for step, result in rows if step == rows[-1][0]]
    return (rows[-1][0], sum(returns) / len(returns)) if rows else None


class RunProgress:
    """
    A progress bar for all runs, and one for each active run.

    :param total: Number of runs
    :param skipped: Number of runs that had been finished before
    :param root: Folder of the comparison
    :param console: Where to print; ``None``: standard output
    """

    def __init__(self, total: int, skipped: int, root: Path, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total, self.done, self.failed, self.root = total, skipped, 0, root
        self.bars: dict[Path, TaskID] = {}
        self._looked = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        if skipped:
            self._say(f"{skipped} of {total} runs were finished before")
        self.overall = self.progress.add_task("all runs", total=total, completed=skipped, state="")

    def _say(self, line: str) -> None:
        # No markup, no highlighting, and no wrapping without a terminal.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "RunProgress":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def update(self, active: Sequence[Run]) -> None:
        """
        Update the bars.

        :param active: the active runs
        """
        if time.monotonic() - self._looked < INTERVAL:
            return
        self._looked = time.monotonic()
        for run in active:
            if run.folder not in self.bars:
                self.bars[run.folder] = self.progress.add_task(str(run), total=run.steps, state="")
            now = latest(self.root / run.folder / EVALUATIONS)
            if now is not None:
                self.progress.update(self.bars[run.folder], completed=now[0], state=f"step {now[0]:,}, return {now[1]:,.1f}")
        waiting = self.total - self.done - self.failed - len(active)
        state = f"{self.done} done, {len(active)} active, {waiting} waiting, {self.failed} failed"
        self.progress.update(self.overall, completed=self.done + self.failed, state=state)

    def ended(self, run: Run, failure: str | None) -> None:
        """
        Remove the bar of a run and print its result.

        :param run: a run that has ended
        :param failure: error message; ``None`` if it has finished
        """
        bar = self.bars.pop(run.folder, None)
        if bar is not None:
            self.progress.remove_task(bar)
        if failure is None:
            self.done += 1
            now = latest(self.root / run.folder / EVALUATIONS)
            outcome = "done" if now is None else f"done, return {now[1]:,.1f} at step {now[0]:,}"
        else:
            self.failed += 1
            outcome = "failed: " + failure.partition("\n")[0]
        self.progress.update(self.overall, completed=self.done + self.failed)
        self._say(f"[{self.done + self.failed}/{self.total}] {run}: {outcome}")
