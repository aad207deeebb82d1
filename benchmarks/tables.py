"""Prints tables and keeps results as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

from thermocline.files.atomic import atomic_write

RESULTS = Path(__file__).parent / "results"


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows, their keys as headings."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [[str(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    for line in [heads, ["-" * w for w in widths], *cells]:
        print(
            "  ".join(
                cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )


def add_keeping(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the flags that say where results are kept."""
    parser.add_argument("--dry", action="store_true", help="keep no results")
    parser.add_argument(
        "--into",
        type=lambda name: RESULTS / name,
        default=RESULTS,
        metavar="NAME",
        help="keep them in a folder of their own under benchmarks/results, as those of another machine",
    )


def write_results(name: str, results: Mapping[str, object], folder: Path = RESULTS, *, say: bool = True) -> None:
    """Write `NAME.json` among the results, or to another folder, and `say` so."""
    plain = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in results.items()}
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(plain, indent=1) + "\n").encode())
    if say:
        print(f"\nwritten: {path.relative_to(RESULTS.parent.parent) if path.is_relative_to(RESULTS) else path}")
