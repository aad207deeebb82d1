"""Tables for people; machines get --json."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from thermocline.errors import printable

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
    """On standard output (or error), as wide as the terminal, or as their contents need where there is none."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 1000
    for table in tables:
        console.print(table)


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
