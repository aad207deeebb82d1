"""What to tell of files that went in from PowerInfer or out to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thermocline.cli.output import status, write_json
from thermocline.cli.tables import facts, print_tables

if TYPE_CHECKING:
    from thermocline.api import Exchanged


def show_exchange(done: Exchanged, *, as_json: bool, verbose: bool) -> None:
    """What was written, and notes on standard error."""
    for note in done.notes:
        status(f"note: {note}", always=verbose)
    if as_json:
        record = {"output": str(done.path), "n_layer": done.n_layer, "n_ff": done.n_ff, "notes": list(done.notes)}
        write_json(record)
    else:
        print_tables(facts([("written", str(done.path)), ("neurons", f"{done.n_layer} layers of {done.n_ff}")]))
