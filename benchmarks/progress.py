"""The bar of a long run: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Before it is entered, and where nobody looks, it does nothing."""

    def __init__(self, title: str, cases: int | None, console: Console | None = None) -> None:
        self._title, self._cases = title, cases
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._begun = 0

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(
                *columns,
                console=self._console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # figures then stand above the bar; in a file they are left alone
            )
            self._task = self._progress.add_task(self._title, total=self._cases)
            self._progress.start()
        return self

    def goes_on_to(self, case: str) -> None:
        """The case before is done."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self._title}: {case}", completed=self._begun)
        self._begun += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
