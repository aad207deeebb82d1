"""`thermocline train-predictor`: train what tells which neurons will fire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

import thermocline
from thermocline.cli.bars import progress_bar
from thermocline.cli.flags import JsonFlag, ModelFlag, TextFlag, VerboseFlag, flag, with_settings
from thermocline.cli.output import status, tell_notice, write_json
from thermocline.cli.tables import facts, print_tables, size_of
from thermocline.config import LoadSettings, TrainSettings
from thermocline.errors import skipped_words

if TYPE_CHECKING:
    from thermocline.api import Trained


@with_settings
def train_predictor(
    *,
    model: ModelFlag = None,
    text: TextFlag,
    output: Annotated[str, flag("--output", "-o", help="File to write, such as X.predictor.safetensors.")],
    overwrite: Annotated[bool, flag("--overwrite", help="Replace OUTPUT.")] = False,
    restart: Annotated[bool, flag("--restart", help="Forget an interrupted run instead of going on with it.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
    train: TrainSettings,
) -> int:
    """Train a predictor: a small network for each layer that tells which of its neurons will fire.

    Each layer's is as large as pays: a larger one has fewer neurons computed in vain, but is itself more to read. Its
    threshold is set on text kept apart, so that the wanted recall is reached. Training needs torch: pip install
    'thermocline[train]'. What is read is kept in OUTPUT.work until the end; an interrupted run goes on from there when
    its command is repeated; with another learning rate, batch or the like it fits anew what was read.

    A predictor named M.predictor.safetensors beside M.gguf is found by itself; mode auto uses it once `thermocline
    audit` has passed it.

    For example:

      thermocline train-predictor -m model.gguf --activity model.activity.safetensors --text wiki/ -o
      model.predictor.safetensors

      thermocline train-predictor -m model.gguf --text wiki/ -n 400000 --outtype q4_0 -o model.predictor.safetensors
    """
    with progress_bar() as show:
        done = thermocline.train_predictor(
            model,
            text,
            output,
            load,
            train,
            activity=load.activity,
            overwrite=overwrite,
            restart=restart,
            notice=lambda line: tell_notice(line, always=verbose),
            progress=lambda p: show(p.share, f"{p.doing}, {p.tokens_per_second:,.0f} tokens/s"),
        )
    if done.resumed:
        status("went on with an interrupted run", always=verbose)
    if done.skipped:
        status(skipped_words(done.skipped), always=verbose)
    if as_json:
        write_json(_record(done, output))
    else:
        print_tables(_layers(done), facts(_summary(done, output)))
    return 0


def _layers(done: Trained) -> Table:
    table = Table("layer", "rank", "bytes", "recall", "energy recall", "precision", "selected", "active")
    for column in table.columns:
        column.justify = "right"
    for number, layer in enumerate(done.layers):
        shares = (f"{layer[name]:.2%}" for name in ("recall", "energy_recall", "precision", "selected", "active"))
        table.add_row(str(number), str(layer["rank"]), size_of(layer["bytes"]), *shares)
    return table


def _summary(done: Trained, output: str) -> list[tuple[str, str]]:
    count = len(done.layers)
    selected, active = (sum(layer[name] for layer in done.layers) / count for name in ("selected", "active"))
    vain = [str(number) for number, layer in enumerate(done.layers) if not layer["pays"]]
    read = size_of(done.predicted_bytes)
    rows = [
        ("predictor", f"{size_of(done.predictor.nbytes)}, {done.share:.2%} of the model's numbers"),
        ("selected", f"{selected:.1%} of the neurons; {active:.1%} fire"),
        ("read for a token", f"{read} to find these; {size_of(done.exact_bytes)} in mode exact"),
        ("trained on", f"{done.tokens:,} tokens in {done.seconds:.1f} s"),
        ("written", f"{output}; hold it to exact computing with thermocline audit"),
    ]
    if not done.saves:
        rows.insert(3, ("does not pay", "it would read more bytes than it saves: mode auto will be exact"))
    elif vain:
        where = f"layer{'s' * (len(vain) > 1)} {', '.join(vain)}"
        rows.insert(3, ("does not pay", f"in {where}, where it reads more than mode exact"))
    return rows


def _record(done: Trained, output: str) -> dict[str, Any]:
    return {
        "output": output,
        "bytes": done.predictor.nbytes,
        "share_of_parameters": done.share,
        "bytes_a_token": {"predicted": done.predicted_bytes, "exact": done.exact_bytes},
        "saves": done.saves,
        "tokens": done.tokens,
        "resumed": done.resumed,
        "skipped": [str(path) for path in done.skipped],
        "seconds": done.seconds,
        "layers": [dict(layer) for layer in done.layers],
    }
