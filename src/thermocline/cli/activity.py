"""`thermocline activity`: look at statistics and add them up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App
from rich.table import Table

import thermocline
from thermocline.cli.convert import ForceFlag
from thermocline.cli.exchange import show_exchange
from thermocline.cli.flags import JsonFlag, ModelFlag, VerboseFlag, count, flag
from thermocline.cli.output import write_json
from thermocline.cli.tables import counted, facts, print_tables
from thermocline.errors import UsageError

if TYPE_CHECKING:
    from thermocline.api import Activity

HELP = """Show which neurons fire, add up the statistics of several runs, sort the neurons, or exchange with PowerInfer.

For example:

  thermocline activity show model.activity.safetensors

  thermocline activity merge wiki.safetensors code.safetensors -o model.activity.safetensors

  thermocline activity order model.activity.safetensors -o model.order.safetensors

  thermocline activity import activation/ -m model.powerinfer.gguf -o model.activity.safetensors"""

activity = App(name="activity", help=HELP, help_format="plaintext", result_action="return_value")


@activity.command
def show(file: str, /, *, as_json: JsonFlag = False) -> int:
    """Print a table of each layer's activity.

    Args:
        file: what `thermocline profile` wrote, or a model that has it inside.
        as_json: print one JSON object instead.

    For example:

      thermocline activity show model.activity.safetensors
    """
    found = thermocline.read_activity(file)
    if as_json:
        write_json(found.summary())
    else:
        print_tables(*activity_tables(found))
    return 0


@activity.command
def merge(
    *files: str,
    output: Annotated[str, flag("--output", "-o", help="File to write.")],
    as_json: JsonFlag = False,
) -> int:
    """Add up the statistics of several runs over one model.

    For example:

      thermocline activity merge wiki.safetensors code.safetensors -o model.activity.safetensors
    """
    if len(files) < 2:
        raise UsageError(f"merging takes two files or more, not {len(files)}")
    merged = thermocline.merge_activities(files, output)
    if as_json:
        write_json(merged.summary())
    else:
        print_tables(*activity_tables(merged))
    return 0


@activity.command
def order(
    file: str,
    /,
    *,
    output: Annotated[str, flag("--output", "-o", help="File to write, such as X.order.safetensors.")],
    by: Annotated[
        str, flag("--by", help="What makes a neuron hot: frequency, or contribution (|activation| x down row).")
    ] = "frequency",
    as_json: JsonFlag = False,
) -> int:
    """Sort each layer's neurons, hottest first, and write the order to a file of its own.

    For example:

      thermocline activity order model.activity.safetensors -o model.order.safetensors
    """
    made = thermocline.order(file, output, by=by)
    n_layer, n_ff = made.order.shape
    shares = {share: float(made.temperature[:, : max(1, n_ff * share // 100)].mean()) for share in (1, 10, 50, 100)}
    if as_json:
        write_json({"output": output, "by": made.by, "n_layer": n_layer, "n_ff": n_ff, "tokens": made.tokens})
    else:
        hot = ", ".join(f"hottest {share}%: {mean:.1%}" for share, mean in shares.items())
        rows = [("written", output), ("neurons", f"{n_layer} layers of {n_ff}, by {made.by}"), ("mean firing", hot)]
        print_tables(facts(rows))
    return 0


@activity.command(name="import")
def bring(
    folder: str,
    /,
    *,
    model: ModelFlag = None,
    output: Annotated[str, flag("--output", "-o", help="File to write, such as X.activity.safetensors.")],
    tokens: Annotated[
        int, count("--tokens", "-n", help="How many tokens were counted; 0 takes the largest count.")
    ] = 0,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Read PowerInfer's activation_0.pt, activation_1.pt and so on as the activity of a model.

    Files are taken by their numbers, and nothing in them is executed.

    For example:

      thermocline activity import activation/ -m model.powerinfer.gguf -o model.activity.safetensors
    """
    source = thermocline.shipped_model() if model is None else model
    done = thermocline.import_activity(source, folder, output, tokens=tokens, force=force)
    show_exchange(done, as_json=as_json, verbose=verbose)
    return 0


@activity.command
def export(
    file: str,
    /,
    *,
    output: Annotated[str, flag("--output", "-o", help="New folder, which PowerInfer expects as activation/.")],
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Write how often each neuron fired as PowerInfer's activation_0.pt, activation_1.pt and so on.

    For example:

      thermocline activity export model.activity.safetensors -o activation/
    """
    show_exchange(thermocline.export_activity(file, output), as_json=as_json, verbose=verbose)
    return 0


def activity_tables(found: Activity) -> tuple[Table, Table]:
    """The figures of the whole model, and of each layer."""
    summary = found.summary()
    read, active = f"{summary['tokens']:,} tokens", _percent(summary["active_share"])
    if summary["sequences"]:
        read += f" in {counted(summary['sequences'], 'sequence')}"
    if not summary["tokens_known"]:
        read, active = f"at least {read}: how many is not known", f"at most {active}"
    head = facts(
        [
            ("model", summary["model"] or summary["model_fingerprint"][:16]),
            ("read", read),
            ("neurons", f"{summary['n_layer']} layers of {summary['n_ff']}"),
            ("active for a token", active),
            ("80% of activations", f"come from {_percent(summary['neurons_for_80_percent'])} of the neurons"),
            ("token to token", f"{_percent(summary['token_overlap'])} of an active set was active a token before"),
            ("layer to layer", f"{_percent(summary['layer_overlap'])} of it is foreseen from the layer below"),
        ]
    )
    table = Table("layer", "active", "median", "99%", "give 80%", "never fired", "token", "layer", "by chance")
    for column in table.columns:
        column.justify = "right"
    names = ("active_share", "median_active_share", "p99_active_share", "neurons_for_80_percent", "never_fired",
             "token_overlap", "layer_overlap", "chance_overlap")  # fmt: skip
    for number, layer in enumerate(summary["layers"]):
        table.add_row(str(number), *(_percent(layer[name]) for name in names))
    return head, table


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:.1%}"
