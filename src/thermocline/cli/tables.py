"""Tables for people; machines get --json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from thermocline.errors import printable

UNBOUNDED = 1000
"""Characters of a line where no terminal says how many there are."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one a line. Values may come from hostile files: control characters are shown, not obeyed."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text("\n".join(printable(line, 500) for line in value.split("\n"))))
    return table


def print_tables(*tables: Table, stderr: bool = False) -> None:
    """On standard output (or error), as wide as the terminal, or as their contents need where there is none.

    A table that is wider than the terminal is printed in parts that each begin with its first column.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
    for table in tables:
        for part in parts_of(table, console):
            console.print(part)


def parts_of(table: Table, console: Console) -> list[Table]:
    """Tables of some of the columns of `table` each, as many as the console is wide enough for, and one at least."""
    left = list(range(1, len(table.columns)))
    if not table.show_header or len(left) < 2 or _width(table, console) <= console.width:
        return [table]
    parts: list[Table] = []
    while left:
        count = 1
        while count < len(left) and _width(_columns(table, [0, *left[: count + 1]]), console) <= console.width:
            count += 1
        parts.append(_columns(table, [0, *left[:count]], table.title if not parts else None))
        del left[:count]
    return parts


def _width(table: Table, console: Console) -> int:
    """Characters that a table takes where nothing is in its way."""
    return console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum


def _columns(table: Table, columns: list[int], title: Any = None) -> Table:
    """The table with these columns only."""
    part = Table(title=title, title_justify=table.title_justify)
    chosen = [table.columns[i] for i in columns]
    for column in chosen:
        part.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap, overflow=column.overflow)
    for row in zip(*(column.cells for column in chosen), strict=True):
        part.add_row(*row)
    return part


def counted(number: int, noun: str) -> str:
    """So many of something: 1 thread, 2,000 tokens."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
