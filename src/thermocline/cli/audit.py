"""`thermocline audit`: hold a predictor to exact computing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from rich.table import Table

import thermocline
from thermocline.cli.bars import progress_bar
from thermocline.cli.flags import JsonFlag, ModelFlag, TextFlag, VerboseFlag, count, with_settings
from thermocline.cli.output import tell_notice, write_json
from thermocline.cli.tables import facts, print_tables
from thermocline.config import LoadSettings
from thermocline.errors import OutputError

if TYPE_CHECKING:
    from thermocline.api import AuditResult

FAILED = 1
"""Exit code where a gate was not passed."""


@with_settings
def audit(
    *,
    model: ModelFlag = None,
    text: TextFlag,
    tokens: Annotated[
        int, count("--tokens", "-n", help="How many tokens to read; over fewer than 8192 none passes or is noted.")
    ] = 8192,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
) -> int:
    """Hold a predictor to exact computing, token by token as decoding does, and note whether it is good enough.

    Dense computing of the same weights is the yardstick: how far exact and predicted are from it (KL divergence in
    nats), how often the likeliest token is the same, what happens to the perplexity; how much of what fires each
    layer's predictor selects; whether free texts repeat more or break. The oracle mask computes exactly what fires:
    what is between it and predicted is the predictor's error. Use text that the predictor was not trained on.

    The result is noted in the predictor's file (M.audit.safetensors where it is inside M.gguf), and mode auto goes by
    it. The exit code is 1 where a gate fails or the note cannot be written.

    For example:

      thermocline audit -m model.gguf --text held-out/

      thermocline audit -m model.gguf --predictor other.predictor.safetensors --text held-out/ -n 20000
    """
    with progress_bar() as show:
        found = thermocline.audit(
            model,
            text,
            load,
            tokens=tokens,
            notice=lambda line: tell_notice(line, always=verbose),
            progress=lambda p: show(
                p.share,
                f"{p.tokens:,} tokens, KL {p.mean_kl:.5f}, {p.tokens_per_second:,.0f} tokens/s"
                + (f", {p.texts} free texts" if p.texts else ""),
            ),
        )
    if as_json:
        noted = {"stored": found.stored, "problem": found.problem or None}
        write_json({**found.as_dict(), **noted, "seconds": found.seconds})
    else:
        print_tables(_distances(found), _layers(found), _gates(found), facts(_summary(found)))
    if found.problem:
        raise OutputError(f"the result was not noted: {found.problem}")
    return 0 if found.passed else FAILED


def _distances(found: AuditResult) -> Table:
    table = _table("against dense", "mean KL", "99%", "largest", "top-1", "perplexity")
    for name, distance in (("exact", found.exact), ("oracle mask", found.oracle), ("predicted", found.predicted)):
        figures = (f"{value:.6f}" for value in (distance.mean_kl, distance.p99_kl, distance.max_kl))
        table.add_row(name, *figures, f"{distance.top1:.2%}", f"x{distance.perplexity_ratio:.4f}")
    return table


def _layers(found: AuditResult) -> Table:
    """Worst first."""
    table = _table("layer", "energy recall", "recall", "precision", "selected", "active")
    for number, layer in sorted(enumerate(found.layers), key=lambda item: item[1].energy_recall):
        shares = (layer.energy_recall, layer.recall, layer.precision, layer.selected, layer.active)
        table.add_row(str(number), *(f"{share:.2%}" for share in shares))
    return table


def _gates(found: AuditResult) -> Table:
    table = _table("gate", "found", "needed", "")
    for gate in found.gates:
        needed = f"{'>=' if gate.at_least else '<='} {gate.limit:g}"
        table.add_row(gate.name, gate.figure, needed, "passed" if gate.passed else "FAILED")
    return table


def _summary(found: AuditResult) -> list[tuple[str, str]]:
    exact, predicted = found.generated
    free = f"repeated {predicted.repeated:.1%} (exact {exact.repeated:.1%}), invalid {predicted.invalid:.1%}"
    selected = sum(layer.selected for layer in found.layers) / len(found.layers)
    why = "it is not the predictor's own threshold"
    if found.problem or not found.whole:
        why = "it could not be written" if found.problem else "it read too little to judge by"
    noted = "noted: mode auto goes by it" if found.stored else f"not noted: {why}"
    return [
        ("verdict", f"{'passed' if found.passed else 'FAILED'}: {found.summary}"),
        ("predictor", f"{found.share:.2%} of the model's numbers, selects {selected:.1%} of the neurons"),
        ("free texts", f"{free} (exact {exact.invalid:.1%})"),
        ("read", f"{found.tokens:,} tokens in {found.seconds:.1f} s"),
        ("result", noted),
    ]


def _table(*heads: str) -> Table:
    table = Table(*heads)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
