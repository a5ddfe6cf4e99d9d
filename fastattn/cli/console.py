"""Terminal output through rich where it is installed, plain text where it is not: `info` must work anywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

try:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    RichConsole = None  # type: ignore[assignment, misc]

_MARKUP = re.compile(r"(?<!\\)\[/?(?:bold |dim )?(?:bold|dim|red|green|yellow|cyan)?\]")
PLAIN_WIDTH = 132  # of output that goes to a file or a pipe


class Step(Protocol):
    """What a progress bar hands to its loop."""

    def __call__(self, text: str, done: int, total: int) -> None: ...


def escape(text: str) -> str:
    """Text in which brackets are brackets: what comes from outside, and commands such as pip install 'x[extra]'."""
    return text.replace("[", "\\[")


def plain(text: str) -> str:
    """Text without rich's markup."""
    return _MARKUP.sub("", text).replace("\\[", "[")


class Console:
    """Headings, key-value lists, tables and one progress bar.  Strings may hold rich markup."""

    def __init__(self) -> None:
        self._rich = None
        if RichConsole is not None:
            self._rich = RichConsole(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)

    def print(self, text: str = "") -> None:
        if self._rich is not None:
            self._rich.print(text)
        else:
            print(plain(text))

    def heading(self, text: str) -> None:
        self.print(f"\n[bold]{text}[/bold]")

    def pairs(self, items: Sequence[tuple[str, str]]) -> None:
        """Names in one column, what they are in the next."""
        if self._rich is not None:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="cyan", no_wrap=True)
            grid.add_column(overflow="fold")
            for name, text in items:
                grid.add_row("  " + name, text)
            self._rich.print(grid)
            return
        width = max((len(name) for name, _ in items), default=0)
        for name, text in items:
            print(f"  {name:<{width}}  {plain(text)}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1) -> None:
        """A table; the first `left` columns are aligned left, the others right."""
        if self._rich is not None:
            table = Table(title=title or None, title_justify="left", title_style="bold", header_style="cyan")
            for number, name in enumerate(columns):
                table.add_column(name, justify="left" if number < left else "right", overflow="fold")
            for row in rows:
                table.add_row(*row)
            self._rich.print(table)
            return
        cells = [[plain(c) for c in row] for row in [columns, *rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        if title:
            print(title)
        for row in cells:
            aligned = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            print("  ".join(aligned).rstrip())

    @contextmanager
    def progress(self) -> Iterator[Step]:
        """A bar that goes away when its work is done; silent where the output is no terminal."""
        if self._rich is None or not self._rich.is_terminal:
            yield lambda text, done, total: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
