"""`thermocline show`: say what a model file is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table

import thermocline
from thermocline.cli.flags import JsonFlag, flag
from thermocline.cli.output import write_json
from thermocline.cli.tables import facts, print_tables, size_of
from thermocline.errors import UsageError, printable

if TYPE_CHECKING:
    from thermocline.api import ModelInfo, PredictorInfo

TEMPLATE_LINES = 8
"""How much of a chat template is shown; --json has all of it."""


def show(
    model: str | None = None,
    /,
    *,
    named: Annotated[str | None, flag("--model", "-m", help="The same as MODEL.")] = None,
    as_json: JsonFlag = False,
) -> int:
    """Say what a model file is: family, sizes, tensors by type, tokenizer, chat template, what is odd about it.

    For example:

      thermocline show model.gguf

      thermocline show path/to/folder --json
    """
    if model is not None and named is not None:
        raise UsageError(
            f"two models are named, {printable(model)} and with -m {printable(named)}; leave one of them out"
        )
    info = thermocline.describe(model if model is not None else named)
    if as_json:
        write_json(info.as_dict())
    else:
        print_tables(_summary(info), _types(info))
    return 0


def _summary(info: ModelInfo) -> Table:
    rows = [("file", info.path), ("kind", info.kind), ("name", info.name), *_network(info)]
    rows.append(("tokenizer", info.tokenizer or "unusable"))
    if info.tokenizer:
        rows.append(("bos, eos", f"{info.bos if info.bos is not None else 'none'}, {_listed(info.eos)}"))
    rows.append(("chat template", _template(info.chat_template)))
    if info.predictor is not None:
        rows.append(("predictor", _predictor(info.predictor)))
    if info.activity_tokens is not None:
        rows.append(("activity", f"inside, counted over {info.activity_tokens:,} tokens"))
    rows.append(("fingerprint", info.fingerprint[:16]))
    rows += [("warning", warning) for warning in info.warnings]
    rows += [("cannot be run", problem) for problem in info.problems]
    return facts(rows)


def _network(info: ModelInfo) -> list[tuple[str, str]]:
    spec = info.spec
    if spec is None:
        return []
    ffn = spec.ffn
    gate = " of gate and up" if ffn.both else " of the gate" if ffn.gated else ", no gate"
    threshold = f", above {ffn.threshold:g}" if ffn.threshold else ""
    sparse = "sparse: only neurons that fire are computed" if ffn.sparse else "dense: no neuron is ever zero"
    return [
        ("family", spec.family),
        ("parameters", f"{spec.parameters:,}"),
        ("layers", f"{spec.n_layer} of width {spec.n_embd}"),
        ("attention", f"{spec.n_head} heads of {spec.head_dim}, {spec.n_head_kv} for keys and values"),
        ("FFN", f"{spec.n_ff} neurons a layer, {ffn.activation}{gate}{threshold} ({sparse})"),
        ("vocabulary", f"{spec.n_vocab} tokens{', embedding tied to the head' if spec.tied_embeddings else ''}"),
        ("context", f"{spec.n_ctx_train} tokens"),
    ]


def _predictor(predictor: PredictorInfo) -> str:
    low, high = min(predictor.ranks), max(predictor.ranks)
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    audit = "not audited" if predictor.passed is None else "audit passed" if predictor.passed else "audit failed"
    said = f" ({predictor.audit})" if predictor.audit else ""
    name = printable(Path(predictor.path).name, 80)
    return f"{name}: {size_of(predictor.bytes)}, {predictor.share:.1%} of the parameters, {rank}, {audit}{said}"


def _template(template: str | None) -> str:
    if template is None:
        return "none"
    lines = [printable(line, 100) for line in template.splitlines()]
    more = [f"... {len(lines) - TEMPLATE_LINES} more lines"] if len(lines) > TEMPLATE_LINES else []
    return "\n".join([*lines[:TEMPLATE_LINES], *more])


def _listed(ids: tuple[int, ...]) -> str:
    return " ".join(map(str, ids)) or "none"


def _types(info: ModelInfo) -> Table:
    table = Table("type", "tensors", "bytes", "size")
    for column in table.columns[1:]:
        column.justify = "right"
    for t in info.types:
        table.add_row(t.format, str(t.tensors), f"{t.bytes:,}", size_of(t.bytes))
    if len(info.types) > 1:
        table.add_row("all", str(info.tensors), f"{info.bytes:,}", size_of(info.bytes))
    return table
