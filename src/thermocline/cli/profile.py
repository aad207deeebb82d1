"""`thermocline profile`: count which neurons fire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import thermocline
from thermocline.cli.activity import activity_tables
from thermocline.cli.bars import progress_bar
from thermocline.cli.flags import JsonFlag, ModelFlag, TextFlag, VerboseFlag, count, flag, with_settings
from thermocline.cli.output import status, tell_notice, write_json
from thermocline.cli.tables import print_tables
from thermocline.config import LoadSettings
from thermocline.errors import UsageError, skipped_words

if TYPE_CHECKING:
    from thermocline.api import Profiled


@with_settings
def profile(
    *,
    model: ModelFlag = None,
    text: TextFlag,
    output: Annotated[str, flag("--output", "-o", help="File to write, such as X.activity.safetensors.")],
    tokens: Annotated[
        int, count("--tokens", "-n", help="Most tokens to read, of files in an order of chance; 0 reads all.")
    ] = 0,
    threshold: Annotated[
        float, flag("--threshold", help="A neuron fires if its activation's magnitude is above this.")
    ] = 0.0,
    merge: Annotated[bool, flag("--merge", help="Add to what OUTPUT has counted already.")] = False,
    overwrite: Annotated[bool, flag("--overwrite", help="Replace OUTPUT.")] = False,
    restart: Annotated[bool, flag("--restart", help="Forget an interrupted run instead of going on with it.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
) -> int:
    """Run texts through a model and count how often each neuron fires, how much it adds, and what repeats.

    Files that are no UTF-8 text are skipped. An interrupted run goes on where it was when its command is repeated.
    The result is for `report`, for `train-predictor` and for placing the neurons that fire most in fast memory.

    For example:

      thermocline profile -m model.gguf --text docs/ notes.txt -o model.activity.safetensors

      thermocline profile -m model.gguf --text wiki/ -n 1000000 -o model.activity.safetensors

      thermocline profile -m model.gguf --text code/ -o model.activity.safetensors --merge
    """
    if merge and overwrite:
        raise UsageError("give --merge or --overwrite, not both")
    existing = "merge" if merge else "overwrite" if overwrite else "refuse"
    with progress_bar() as show:
        done = thermocline.profile(
            model,
            text,
            output,
            load,
            tokens=tokens,
            threshold=threshold,
            existing=existing,
            restart=restart,
            notice=lambda line: tell_notice(line, always=verbose),
            progress=lambda p: show(p.share, f"{p.tokens:,} tokens, {p.tokens_per_second:,.0f} tokens/s"),
        )
    for line in _told(done):
        status(line, always=verbose)
    if as_json:
        write_json(_record(done, output))
    else:
        print_tables(*activity_tables(done.activity))
    return 0


def _told(done: Profiled) -> list[str]:
    lines = []
    if done.resumed:
        lines.append(f"went on from {done.resumed:,} tokens of an interrupted run")
    if done.skipped:
        lines.append(skipped_words(done.skipped))
    speed = (done.tokens - done.resumed) / done.seconds if done.seconds else 0.0
    files = f"{done.files} file{'s' * (done.files != 1)}"
    lines.append(f"{done.tokens:,} tokens of {files}, {speed:,.0f} tokens/s, {done.seconds:.1f} s")
    return lines


def _record(done: Profiled, output: str) -> dict[str, Any]:
    return {
        "output": output,
        "tokens": done.tokens,
        "resumed": done.resumed,
        "files": done.files,
        "skipped": [str(path) for path in done.skipped],
        "seconds": done.seconds,
        "activity": done.activity.summary(),
    }
