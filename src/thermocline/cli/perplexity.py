"""`thermocline perplexity`: measure how well a model predicts a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import thermocline
from thermocline.cli.bars import progress_bar
from thermocline.cli.flags import JsonFlag, ModelFlag, TextFlag, VerboseFlag, count, with_settings
from thermocline.cli.output import status, tell_notice, write_json
from thermocline.cli.tables import counted, facts, print_tables
from thermocline.config import LoadSettings
from thermocline.errors import skipped_words

if TYPE_CHECKING:
    from thermocline.api import Perplexity


@with_settings
def perplexity(
    *,
    model: ModelFlag = None,
    text: TextFlag,
    chunks: Annotated[int, count("--chunks", help="Most chunks to read; 0 reads all.")] = 0,
    stride: Annotated[
        int, count("--stride", help="Let chunks begin every so many tokens, and score every token once; 0 is off.")
    ] = 0,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
) -> int:
    """Measure a model's perplexity on texts, as llama.cpp's perplexity does, in any mode.

    The text is cut to chunks of --ctx-size tokens (without it 512, or the model's context where that is shorter); each
    begins with bos, where the model has one, and the tokens of its second half are scored. The error is one standard
    error of the mean. In mode predicted tokens run one by one, so that what the predictor misses shows.

    For example:

      thermocline perplexity -m model.gguf --text wiki.test.raw

      thermocline perplexity -m model.gguf --text docs/ -c 2048 --stride 1024 --mode dense

      thermocline perplexity -m model.gguf --text wiki.test.raw --chunks 20 --mode predicted --json
    """
    with progress_bar() as show:
        found = thermocline.perplexity(
            model,
            text,
            load,
            chunks=chunks,
            stride=stride,
            notice=lambda line: tell_notice(line, always=verbose),
            progress=lambda p: show(
                p.chunks / p.total,
                f"chunk {p.chunks} of {p.total}, perplexity {p.perplexity:.4f}, {p.tokens_per_second:,.0f} tokens/s",
            ),
        )
    if found.skipped:
        status(skipped_words(found.skipped), always=verbose)
    if as_json:
        write_json(found.as_dict())
    else:
        print_tables(facts(_rows(found)))
    return 0


def _rows(found: Perplexity) -> list[tuple[str, str]]:
    if found.stride:
        window = f" of {found.n_ctx} tokens every {found.stride}, every token scored once"
    else:
        window = f" of {found.n_ctx} tokens, second half scored"
    return [
        ("perplexity", f"{found.perplexity:.4f} +/- {found.error:.4f}"),
        ("per token", f"{found.nll:.4f} nats"),
        ("scored", f"{counted(found.tokens, 'token')} in {counted(found.chunks, 'chunk')}{window}"),
        ("mode", found.mode),
        ("took", f"{found.seconds:.1f} s"),
    ]
