"""`thermocline convert`: write a model as a GGUF file, with its neurons in order and its predictor inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

import thermocline
from thermocline.cli.bars import progress_bar
from thermocline.cli.flags import JsonFlag, VerboseFlag, flag
from thermocline.cli.output import status, write_json
from thermocline.cli.tables import facts, print_tables, size_of

if TYPE_CHECKING:
    from thermocline.api import Converted

ForceFlag = Annotated[bool, flag("--force", help="Replace what is there.")]
RestartFlag = Annotated[bool, flag("--restart", help="Forget an interrupted run instead of going on with it.")]
SHOWN = 5
"""How many of the tensors that lost most are shown by `convert`; --json has all."""


def convert(
    model: str,
    /,
    *,
    output: Annotated[str, flag("--output", "-o", "--outfile", help="File to write.")],
    outtype: Annotated[
        str, flag("--outtype", help="Format of matrices: f32, f16, bf16, q8_0, q4_0; auto keeps each one's own.")
    ] = "auto",
    predictor: Annotated[
        str | None,
        flag("--predictor", help="Predictor to put inside: X.predictor.safetensors, or PowerInfer's folder."),
    ] = None,
    predictor_threshold: Annotated[
        float | None,
        flag("--predictor-threshold", help="Use this threshold in all layers instead of the predictor's.", hyphen=True),
    ] = None,
    activity: Annotated[
        str | None, flag("--activity", help="X.activity.safetensors: store neurons in its order, hottest first.")
    ] = None,
    order: Annotated[str | None, flag("--order", help="X.order.safetensors: store neurons in this order.")] = None,
    standard: Annotated[
        bool, flag("--standard", help="Keep the layout that other engines read, even of sparse models.")
    ] = False,
    powerinfer: Annotated[bool, flag("--powerinfer", help="Write a file for PowerInfer (magic PWRI).")] = False,
    force: ForceFlag = False,
    restart: RestartFlag = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Write a model, a GGUF file or a Hugging Face folder, as a new GGUF file.

    A model whose activation gives zeros is written as neuron records, which load as they lie. One tensor is in memory
    at a time, and the file appears whole or not at all; an interrupted run goes on where it was when its command is
    repeated. With --activity the counts go inside too, for the new numbers.

    For example:

      thermocline convert path/to/folder --outtype q8_0 -o model.gguf

      thermocline convert model.gguf --activity model.activity.safetensors -o ordered.gguf

      thermocline convert model.gguf --predictor model.predictor.safetensors --powerinfer -o model.powerinfer.gguf
    """
    with told() as progress:
        done = thermocline.convert(
            model,
            output,
            outtype=outtype.lower(),
            predictor=predictor,
            threshold=predictor_threshold,
            activity=activity,
            order=order,
            standard=standard,
            powerinfer=powerinfer,
            force=force,
            restart=restart,
            progress=progress,
        )
    show(done, as_json=as_json, verbose=verbose, most=SHOWN)
    return 0


@contextmanager
def told() -> Iterator[Callable[[int, int, str], None]]:
    """What to tell of every tensor: a bar with the rate of writing."""
    began = time.perf_counter()
    with progress_bar() as bar:

        def tell(done: int, total: int, tensor: str) -> None:
            rate = done / max(time.perf_counter() - began, 1e-9) / 1e9
            bar(done / max(total, 1), f"{size_of(done)} of {size_of(total)}, {rate:.2f} GB/s, {tensor}")

        yield tell


def show(done: Converted, *, as_json: bool, verbose: bool, most: int | None = None) -> None:
    """What was written: figures and the tensors that lost most, all of them unless `most` are enough."""
    for note in done.notes:
        status(f"note: {note}", always=verbose)
    if as_json:
        write_json(_record(done))
        return
    rate = (done.read + done.written) / max(done.seconds, 1e-9) / 1e9
    rows = [
        ("written", f"{done.path}: {size_of(done.written)}{', for PowerInfer' if done.powerinfer else ''}"),
        ("from", size_of(done.read)),
        ("took", f"{done.seconds:.1f} s, {rate:.2f} GB/s read and written"),
    ]
    if done.tokens is not None:
        rows.append(("activity", f"inside, counted over {done.tokens:,} tokens"))
    tables = [facts(rows)]
    if done.rounded:
        tables.append(_errors(done, most))
    print_tables(*tables)


def _errors(done: Converted, most: int | None) -> Table:
    table = Table("tensor", "from", "to", "relative error", "largest error")
    for column in table.columns[3:]:
        column.justify = "right"
    worst = sorted(done.rounded, key=lambda r: -r.relative_error)[:most] if most else done.rounded
    for r in worst:
        table.add_row(r.tensor, r.source, r.format, f"{r.relative_error:.2e}", f"{r.max_abs_error:.2e}")
    if most and len(done.rounded) > most:
        table.add_row(f"and {len(done.rounded) - most} that lost less", "", "", "", "")
    return table


def _record(done: Converted) -> dict[str, Any]:
    return {
        "output": str(done.path),
        "powerinfer": done.powerinfer,
        "read": done.read,
        "written": done.written,
        "seconds": done.seconds,
        "activity_tokens": done.tokens,
        "notes": list(done.notes),
        "tensors": [
            {
                "name": r.tensor,
                "from": r.source,
                "to": r.format,
                "relative_error": r.relative_error,
                "rms_error": r.rms_error,
                "max_abs_error": r.max_abs_error,
            }
            for r in done.rounded
        ],
    }
