"""`thermocline bench`: measure how fast a model runs here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

import thermocline
from thermocline.cli.flags import JsonFlag, ModelFlag, VerboseFlag, count, with_settings
from thermocline.cli.loading import load as load_model
from thermocline.cli.output import notices, status, write_json
from thermocline.cli.tables import counted, facts, print_tables, size_of
from thermocline.config import LoadSettings

if TYPE_CHECKING:
    from thermocline.api import BenchRow


@with_settings
def bench(
    *,
    model: ModelFlag = None,
    n_prompt: Annotated[int, count("--n-prompt", "-p", help="Tokens of the prompt; 0 leaves the test out.")] = 512,
    n_gen: Annotated[int, count("--n-gen", "-n", help="Tokens to decode; 0 leaves the test out.")] = 128,
    repetitions: Annotated[int, count("--repetitions", "-r", help="How often each test is run.")] = 5,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
) -> int:
    """Measure prefill (pp) and decode (tg) speed, mean and standard deviation over repetitions after a warm-up.

    Decoding is limited by memory: the table gives the bytes that a token reads and the rate at which they were read,
    against the bandwidth that reading alone reached just before and after.

    For example:

      thermocline bench -m model.gguf

      thermocline bench -m model.gguf -p 0 -n 256 -r 3 --mode dense

      thermocline bench --json
    """
    load.require_unwatched("bench")
    with load_model(model, load) as llm:
        notices(llm, always=verbose)
        room = llm.n_ctx - 1
        if not load.ctx_size and n_prompt == 512 and n_gen == 128 and room < n_prompt:
            n_prompt, n_gen = room, min(n_gen, room)
            status(f"the model's context is {llm.n_ctx} tokens: measuring pp{n_prompt}", always=verbose)
        tests = llm.bench(prompt=n_prompt, generate=n_gen, repetitions=repetitions)
        before = _read_rate(load.threads)
        rows = []
        for row in tests:
            status(f"{row.test}: {row.mean:.1f} tokens/s", always=verbose)
            rows.append(row)
        peak = max(before, _read_rate(load.threads))
        record = _record(llm, rows, peak)
    if as_json:
        write_json(record)
    else:
        print_tables(_header(record), _table(rows, peak))
        for row in rows:
            for line in row.split.lines() if row.split is not None else ():
                print(line)
    return 0


def _read_rate(threads: int) -> float:
    bandwidth = thermocline.examine(measure=True, threads=threads).bandwidth
    return bandwidth.all if bandwidth is not None else 0.0


def _record(llm: thermocline.LLM, rows: list[BenchRow], peak: float) -> dict[str, Any]:
    return {
        "model": llm.spec.name,
        "parameters": llm.spec.parameters,
        "weight_bytes": llm.weight_bytes,
        "ops": llm.ops,
        "threads": llm.threads,
        "mode": llm.mode,
        "predictor_bytes": llm.predictor_bytes,
        "load_seconds": llm.load_seconds,
        "peak_gigabytes_per_second": peak,
        "rows": [row.as_dict() for row in rows],
    }


def _header(record: dict[str, Any]) -> Table:
    return facts(
        [
            ("model", f"{record['model']}, {record['parameters']:,} parameters, {size_of(record['weight_bytes'])}"),
            ("computed by", f"{record['ops']}, {counted(record['threads'], 'thread')}, mode {record['mode']}"),
            ("memory reads", f"{record['peak_gigabytes_per_second']:.1f} GB/s at best in this run"),
        ]
    )


def _table(rows: list[BenchRow], peak: float) -> Table:
    table = Table("test", "tokens/s", "MB a token", "GB/s", "of best", "neurons active")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        cells = ["", "", "", ""]
        if row.gigabytes_per_second is not None and row.bytes_per_token is not None:
            cells = [
                f"{row.bytes_per_token / 1e6:.2f}",
                f"{row.gigabytes_per_second:.1f}",
                f"{row.gigabytes_per_second / peak:.0%}" if peak else "",
                f"{row.active_share:.1%}",
            ]
        table.add_row(row.test, f"{row.mean:.2f} ± {row.deviation:.2f}", *cells)
    return table
