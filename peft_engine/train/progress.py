"""Progress on standard error: a bar with the time left on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

LINES = 10  # about how many lines a long work prints where there is no terminal


class Bar:
    """Counts a work's steps; `update` says how many are done and what there is to tell."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.done, self.started = what, total, done, time.monotonic()
        self.first = done
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # what the numbers leave of a line
            columns: list[Any] = [TextColumn("{task.description}"), bar, MofNCompleteColumn()]
            columns += [
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            ]
            self.progress = Progress(*columns, console=Console(stderr=True), expand=True)
            self.task = self.progress.add_task(what, total=total, completed=done, told="")

    def update(self, done: int, told: str = "") -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done, told=told)
        elif done * LINES // self.total > self.done * LINES // self.total or self.done == self.first < done:
            spent = time.monotonic() - self.started
            left = spent / max(1, done - self.first) * (self.total - done)
            print(f"{self.what} {done}/{self.total}  {told}  ETA {_clock(left)}", file=sys.stderr, flush=True)
        self.done = done


@contextlib.contextmanager
def bar(what: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar for the length of the `with` block."""
    shown = Bar(what, max(1, total), done)
    if shown.progress is None:
        yield shown
    else:
        with shown.progress:
            yield shown


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
