"""The README's words and tables about placement: the disk tier, drift, and published figures beside predicted ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Result = dict[str, Any]
Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def disk(result: Result) -> str:
    """A model above its budget of RAM, beside llama.cpp's memory map under the same limit."""
    ours, free = result["with"], result["without"]
    same = "the same tokens as" if ours["tokens"] == free["tokens"] else "OTHER TOKENS than"
    size = sum(kind.get("megabytes_a_token", 0.0) for kind in ours["reads"].values())
    count = sum(kind.get("requests_a_token", 0.0) for kind in ours["reads"].values())
    scored = ours.get("predictor_bytes", 0)
    predictor = f" by a predictor of {scored / 1e6:.0f} MB" if scored else ""
    said = (
        f"{place(result)}{result['model']} under a RAM budget of {ours['budget']}, mode {result['mode']}{predictor}: "
        f"{same} without a budget, "
        f"{ours['tokens_per_second']:.2f} tokens/s (median of {len(ours['rates'])}, {min(ours['rates']):.2f} to "
        f"{max(ours['rates']):.2f}), {ours['VmHWM'] / 1e6:.0f} MB resident at most. Every token reads {size:.0f} MB in "
        f"{count:,.0f} reads; {ours['hit_rate']:.0%} of its neurons were in memory, and the reads alone, one kind "
        f"after the other at the rates that each reaches by itself, would take {ours['of_allowed']:.0%} of the time."
    )
    peer = result.get("llama", {})
    if "rates" not in peer:
        return said
    times = [a / b for a, b in zip(ours["rates"], peer["rates"], strict=True)]
    return (
        f"{said} llama.cpp's memory map under the same limit ({result['limited_by']}): "
        f"{peer['tokens_per_second']:.2f} tokens/s, so {statistics.median(times):.1f}× ({min(times):.1f} to "
        f"{max(times):.1f} by rounds)."
    )


def place(result: Result) -> str:
    """The processor that it ran on, as the beginning of a sentence."""
    return f"On {result['machine']['processor']}: " if result.get("machine") else ""


def drift(result: Result) -> str:
    """Whether moving neurons pays when the text changes: shares that are hot, and tokens/s."""
    parts = []
    for mode in ("exact", "predicted"):
        runs = result.get(mode, {})
        if not {"plain", "drift"} <= runs.keys():
            continue
        plain, moved = (_last(runs[name]["turns"]) for name in ("plain", "drift"))
        kind = "hot" if plain[0] else "in memory"
        hot, moved_hot = (part[0] or part[1] for part in (plain, moved))
        parts.append(
            f"{mode}: {hot:.0%} of what fires {kind} without, {moved_hot:.0%} with it, "
            f"{_rate(plain[2])} and {_rate(moved[2])} tokens/s"
        )
    budget = result.get("vram_budget", result.get("ram_budget"))
    return f"Drift, {result['model']}, budget {budget}, the last turn after the text changed: {'; '.join(parts)}."


def _last(turns: Sequence[Result]) -> tuple[float, float, float]:
    """Hot share, hit rate and tokens/s of the last turn before the text changes back."""
    kinds = [turn.get("kind") for turn in turns]
    end = len(kinds)
    if "prose" in kinds:
        end = len(kinds) - kinds[::-1].index("prose")
    turn = turns[end - 1]
    return turn["hot_share"], turn["hit_rate"] or 0.0, turn["tokens_per_second"]


def paper(result: Result, table: Table) -> str:
    """PowerInfer's published speed-ups beside those that the cost model predicts."""
    rows = [
        [
            f"{row['model']}, {row['computer']}", _number(row["published"]), _number(row["predicted"]),
            _number(row["hybrid tok/s"]), _number(row["predicted "]), _number(row["baseline tok/s"]),
            _number(row["predicted  "]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    heads = (
        "hybrid over layer split, as PowerInfer published it", "published ×", "predicted ×", "hybrid tok/s",
        "predicted", "baseline tok/s", "predicted",
    )  # fmt: skip
    return (
        f"{table(heads, rows)}\n\nNo constant is tuned to a row. `python -m benchmarks.placement_paper` says why "
        "figures differ: mostly by what the published baseline left unused, and by hybrids that the cost model runs at "
        "the memory's rate."
    )


def powerinfer(result: Result, table: Table) -> str:
    """PowerInfer's allocation and ours, priced by the same cost model."""
    rows = [
        [
            f"{row['model']}, {row['computer']}", f"{row['theirs, ms']:.1f}", f"{row['over budget, GiB']:.2f}",
            f"{row['ours, ms']:.1f}", f"{row['faster']:.2f}", f"{row['with their bytes']:.2f}", row["gap"],
        ]
        for row in result["rows"]
    ]  # fmt: skip
    heads = (
        "allocation priced, ms a token", "PowerInfer's", "GiB over budget", "ours", "×", "× with their bytes", "gap",
    )  # fmt: skip
    return f"{table(heads, rows)}\n\n× below 1 is where PowerInfer's allocation takes more than its budget."


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"
