"""What the GPU is to show, beside what a run measured: a table to read first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]

OF_COPY, OF_BOUND = 0.75, 0.70
"""Shares of the copy bandwidth that kernels at 7B shapes reach, and a resident model's whole decode step."""
CROSSING, SAMPLER = 30.0, 100.0
"""Microseconds of a crossing, and between two tokens."""
OVER_SPLIT, OFF = 2.0, 0.25
"""Times a split by whole layers, and how far off a prediction may be."""
OFF_LEDGER = 0.05


def claims(results: Mapping[str, Any]) -> list[Row]:
    """Each claim with what was measured; what no figure was measured for is not met."""
    rows = [
        *_kernels(results.get("kernels", ())),
        *_resident(results),
        *_crossing(results),
        *_splits(results.get("models", ())),
        *_memory(results.get("models", ())),
    ]
    tests = results.get("tests") or {}
    rows.append(_row("tests on the device", "all pass", tests.get("passed"), bool(tests.get("passed"))))
    return rows


def _row(claim: str, wanted: str, measured: Any, met: bool) -> Row:
    return {"claim": claim, "wanted": wanted, "measured": "-" if measured is None else measured, "met": met}


def _kernels(kernels: Iterable[Row]) -> list[Row]:
    found = {f"{row['kernel']}, {row['format']}, of copies": row.get("of copy") for row in kernels}
    rows = [_row(name, f">= {OF_COPY}", x, x is not None and x >= OF_COPY) for name, x in found.items()]
    return rows or [_row("kernels, of copies", f">= {OF_COPY}", None, False)]


def _ours(models: Iterable[Row], placement: str = "ours", mode: str = "predicted") -> dict[tuple[str, str], Row]:
    return {
        (row["model"], row["budget"]): row
        for row in models
        if row["placement"] == placement and row["mode"] == mode and "tok/s" in row
    }


def _resident(results: Mapping[str, Any]) -> list[Row]:
    row = _ours(results.get("models", ()), mode="exact").get(("7b", "100%"))
    copy = results.get("copy GB/s", 0.0)
    share = round(row["GB/s"] / copy, 3) if row and copy else None
    return [_row("7b resident, exact, of copies", f">= {OF_BOUND}", share, share is not None and share >= OF_BOUND)]


def _crossing(results: Mapping[str, Any]) -> list[Row]:
    each = [row["µs a layer"] for row in results.get("crossings", ()) if "µs a layer" in row]
    best = min(each, default=None)
    samplers = [row["sampler µs"] for row in results.get("models", ()) if "sampler µs" in row]
    slowest = max(samplers, default=None)
    return [
        _row("crossing, µs a layer", f"<= {CROSSING:g}", best, best is not None and best <= CROSSING),
        _row("sampler, µs", f"<= {SAMPLER:g}", slowest, slowest is not None and slowest <= SAMPLER),
    ]


def _splits(models: Iterable[Row]) -> list[Row]:
    models = list(models)
    ours, splits, dense = _ours(models), _ours(models, "layer split"), _ours(models, "layer split, dense")
    rows = []
    for model, budget in [("7b", "25%"), ("7b", "50%"), ("13b", "25%"), ("13b", "50%")]:
        mine, shown = ours.get((model, budget)), f"{model}, {budget}"
        for name, others in (("the layer split", splits), ("a dense layer split", dense)):
            split, more = others.get((model, budget)), ""
            times = round(mine["tok/s"] / split["tok/s"], 2) if mine and split else None
            if mine and split:  # whether the machine or the placement falls short, or no placement could do it
                more = f" (planned {mine['predicted'] / split['predicted']:.2f}"
                allowed = mine.get("bytes allow", 0.0)
                more += f", RAM's bytes allow {allowed / split['tok/s']:.2f})" if allowed else ")"
            met = bool(times and times >= OVER_SPLIT)
            rows.append(_row(f"{shown}: times {name}{more}", f">= {OVER_SPLIT:g}", times, met))
        off = round(mine["tok/s"] / mine["predicted"] - 1, 3) if mine else None
        rows.append(_row(f"{shown}: off the prediction", f"<= {OFF:.0%}", off, off is not None and abs(off) <= OFF))
    return rows


def _memory(models: Iterable[Row]) -> list[Row]:
    held = [row for row in models if "held GB" in row]
    over = max((round(row["held GB"] - row["budget GB"], 3) for row in held), default=None)
    off = max((round(abs(row["torch peak GB"] / row["ledger GB"] - 1), 3) for row in held), default=None)
    return [
        _row("memory held beyond the budget, GB", "<= 0", over, over is not None and over <= 0),
        _row("torch's peak off the ledger", f"<= {OFF_LEDGER:.0%}", off, off is not None and off <= OFF_LEDGER),
    ]
