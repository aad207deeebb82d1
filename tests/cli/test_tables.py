"""Tables on terminals of every width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from thermocline.cli.tables import facts, parts_of

HEADS = [f"column {i:02}" for i in range(14)]


def wide() -> Table:
    table = Table(*HEADS, title="wide")
    for row in range(3):
        table.add_row(*(f"{row}.{column}" for column in range(14)))
    return table


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in parts_of(table, console):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_a_wide_table_is_printed_in_parts_that_can_be_read(width: int) -> None:
    text = printed(wide(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert all(text.count(head) == 1 for head in HEADS[1:])
    assert all(f"{row}.{column}" in text for row in range(3) for column in range(14))
    assert text.count("wide") == 1
    parts = text.count(HEADS[0])
    assert parts == text.count("┏")
    assert (parts == 13) == (width == 30)


@pytest.mark.parametrize("width", [1, 5, 20])
def test_a_terminal_that_is_too_narrow_for_two_columns_gets_them_all_the_same(width: int) -> None:
    assert len(parts_of(wide(), Console(width=width))) == 13


def test_what_fits_stays_whole() -> None:
    table = wide()
    assert parts_of(table, Console(width=400)) == [table]
    names = facts([("name", "value " * 100)])
    assert parts_of(names, Console(width=30)) == [names]
    bare = Table("only")
    bare.add_row("x" * 100)
    assert len(parts_of(bare, Console(width=30))) == 1
