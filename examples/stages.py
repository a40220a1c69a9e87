"""How the quickstart shows itself: a line a stage with a progress bar, everything else in a log file.

A `Stages` is made before anything heavy is imported. From then on standard output and error lead to the log, and only
what it prints itself is shown. An error that ends the run is shown as well, with its traceback.
"""

import faulthandler
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Stages:
    """Shows the stages of one run, in a terminal as they go, elsewhere as a line when each is over.

    Args:
        log: where everything else goes; replaced if it exists.
    """

    def __init__(self, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.begin, self._stage = log, time.perf_counter(), None
        self._shown = [os.dup(1), os.dup(2)]
        faulthandler.enable(os.dup(2))
        self.console = Console(file=os.fdopen(os.dup(1), "w"))
        with log.open("w") as file:
            self._point_to([file.fileno()] * 2)
        sys.excepthook = self._fail

    def start(self, name: str, total: int | None = None) -> None:
        """End the stage before and start another, of `total` units where they can be counted."""
        self.end()
        print(f"\n===== {name} =====", flush=True)
        self._stage = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn(f"{name:<22}"),
            BarColumn(9),
            TextColumn("{task.completed:>3}/{task.total:<3}" if total else " " * 7),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            refresh_per_second=4,
            redirect_stdout=False,  # they lead to the log
            redirect_stderr=False,
        )
        self._stage.add_task(name, total=total, figures="")
        self._stage.start()

    def update(self, completed: int | None = None, **figures: str) -> None:
        """Move the bar, and replace the figures beside it if there are any."""
        (task,) = self._stage.tasks
        figures = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        self._stage.update(task.id, completed=completed, **({"figures": figures} if figures else {}))

    def end(self) -> None:
        if self._stage is not None:
            (task,) = self._stage.tasks
            self._stage.update(task.id, total=task.total or 1, completed=task.total or 1)
            self._stage.stop()
            self._stage = None

    def show(self, title: str, rows: dict[str, str]) -> None:
        """End the last stage and print a table of names and values."""
        self.end()
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")  # a path is shown whole
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print("", table)

    def _fail(self, kind, error, traceback) -> None:
        if self._stage is not None:
            self._stage.stop()
        self._point_to(self._shown)
        sys.__excepthook__(kind, error, traceback)
        print(f"The log is in {self.log}", file=sys.stderr)

    def _point_to(self, targets: list[int]) -> None:
        """Standard output and error, also those of libraries in C."""
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in enumerate(targets, 1):
            os.dup2(target, descriptor)
