"""Progress of long work: a rich bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column

from segdeconv.errors import printable


class _Console(Console):
    """Shows the control characters that names of files and classes may hold, instead of sending them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = _Console(highlight=False, soft_wrap=True, markup=False)  # names may hold square brackets
notes = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)  # beside what was asked for
T = TypeVar("T")
_LINE_EVERY = 20.0  # seconds between plain lines


class Bar(Generic[T]):
    """Iterate with progress; ``note`` is shown behind the bar and may be set at any time."""

    def __init__(self, items: Iterable[T], total: int, title: str, console: Console = console) -> None:
        self.items, self.total, self.title, self.note, self.console = items, total, title, "", console

    def __iter__(self) -> Iterator[T]:
        yield from self._on_terminal() if self.console.is_terminal else self._as_lines()

    def _on_terminal(self) -> Iterator[T]:
        whole = Column(no_wrap=True)  # where there is little room the note gives way
        columns = (
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as progress:
            task = progress.add_task(self.title, total=self.total, note="")
            for item in self.items:
                yield item
                progress.update(task, advance=1, note=self.note)

    def _as_lines(self) -> Iterator[T]:
        start = last = time.monotonic()
        for done, item in enumerate(self.items, 1):
            yield item
            now = time.monotonic()
            if now - last >= _LINE_EVERY and done < self.total:
                left = (now - start) / done * (self.total - done)
                line = f"{self.title}: {done}/{self.total}, {left:.0f} s left {self.note}"
                self.console.print(line.rstrip())
                last = now
