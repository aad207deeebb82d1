"""Perplexity of a text, measured as llama.cpp's `perplexity` does.

The files are made tokens one after another, each with what the model puts around a text, and joined. The stream is cut
to chunks of `n_ctx` tokens; what is left over is not used. Each chunk is a sequence of its own whose first token is
replaced by bos, where the model has one; scored are the tokens of its second half but for the first of them, so that
every prediction has at least n_ctx / 2 tokens before it. With a `stride`, chunks begin every `stride` tokens and score
all tokens that no chunk before them has scored, as sliding windows do elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thermocline.activity.likelihood import Likelihood, log_probabilities
from thermocline.activity.texts import Corpus, RefusedTextError, find_texts, is_text, read_text, spelled
from thermocline.config import LoadSettings
from thermocline.errors import UsageError, skipped_words
from thermocline.files.source import ModelSource
from thermocline.model.families import family_of
from thermocline.runtime.loading import LoadedModel, load_model
from thermocline.runtime.scoring import Scorer
from thermocline.runtime.sequence import Tokens
from thermocline.text.tokenizer import Tokenizer

N_CTX = 512
"""Tokens of a chunk unless somebody says otherwise, as in llama.cpp."""


class Chunk(NamedTuple):
    """Tokens `start` to `stop` of the stream; scored are predictions from position `first` of the chunk on."""

    start: int
    stop: int
    first: int


class Scored(NamedTuple):
    """How far a measurement is: chunks done of all, perplexity so far, tokens a second."""

    chunks: int
    total: int
    perplexity: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """The perplexity of a text with one standard error; `nll` is the mean in nats over `tokens` scored tokens."""

    perplexity: float
    error: float
    nll: float
    tokens: int
    chunks: int
    n_ctx: int
    stride: int
    mode: str
    skipped: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure_perplexity(
    source: ModelSource,
    texts: Sequence[Path | str],
    settings: LoadSettings,
    *,
    chunks: int = 0,
    stride: int = 0,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Scored], None] | None = None,
) -> Perplexity:
    """Load `source` and measure it on `texts`, at most `chunks` chunks (0: all) of `settings.ctx_size` tokens (0: 512).

    Raises:
        UsageError: a text or a setting is not usable, or there is too little text.
        ThermoclineError: what `load_model` raises.
    """
    if chunks < 0 or stride < 0:
        raise UsageError(f"chunks is {chunks} and stride {stride}; allowed: 0 or more")
    corpus = find_texts(texts)
    spec = family_of(source).spec(source)
    n_ctx = settings.ctx_size or min(N_CTX, spec.n_ctx_train)
    if n_ctx < 4 or stride >= n_ctx:
        raise UsageError(
            f"chunks of {n_ctx} tokens with a stride of {stride}; allowed: 4 or more, and a smaller stride"
        )
    settings.require_unwatched("perplexity")
    with closing(load_model(source, replace(settings, ctx_size=n_ctx), check=True)) as loaded:
        if notice is not None:
            for line in loaded.notices:
                notice(line)
        return _measured(loaded, corpus, settings, n_ctx, chunks, stride, progress)


def _measured(
    loaded: LoadedModel,
    corpus: Corpus,
    settings: LoadSettings,
    n_ctx: int,
    chunks: int,
    stride: int,
    progress: Callable[[Scored], None] | None,
) -> Perplexity:
    began = time.perf_counter()
    stream, skipped = _stream(loaded.tokenizer, corpus)
    cuts = list(cut(len(stream), n_ctx, stride))
    if not cuts:
        more = f" ({skipped_words(skipped)})" if skipped else ""
        raise UsageError(
            f"the text has {len(stream):,} tokens{more} and a chunk takes {n_ctx:,}: give more text or a smaller -c"
        )
    cuts = cuts[:chunks] if chunks else cuts
    scorer, total = Scorer(loaded.transformer, n_ctx, settings), Likelihood()
    opening = loaded.tokenizer.bos_id if loaded.tokenizer.adds_bos else None
    for number, chunk in enumerate(cuts, 1):
        _score(scorer, stream, chunk, opening, total)
        if progress is not None:
            rate = (chunk.stop - chunk.start) * number / (time.perf_counter() - began)
            progress(Scored(number, len(cuts), total.perplexity, rate))
    return Perplexity(
        perplexity=total.perplexity,
        error=total.error,
        nll=total.mean,
        tokens=total.tokens,
        chunks=len(cuts),
        n_ctx=n_ctx,
        stride=stride,
        mode=loaded.transformer.mode.value,
        skipped=skipped,
        seconds=time.perf_counter() - began,
    )


def cut(tokens: int, n_ctx: int, stride: int = 0) -> Iterator[Chunk]:
    """The chunks of a stream of `tokens`."""
    if not stride:
        for start in range(0, tokens - n_ctx + 1, n_ctx):
            yield Chunk(start, start + n_ctx, n_ctx // 2)
        return
    if tokens < n_ctx:
        return
    before = 0
    for start in range(0, tokens, stride):
        stop = min(start + n_ctx, tokens)
        yield Chunk(start, stop, max(before - 1 - start, 0))
        before = stop
        if stop == tokens:
            return


def _stream(tokenizer: Tokenizer, corpus: Corpus) -> tuple[Tokens, tuple[str, ...]]:
    """The tokens of all files, and the files that are no text, or none that the tokenizer spells."""
    tokens: list[int] = []
    skipped = []
    for file in corpus.files:
        try:
            if not is_text(file):
                raise RefusedTextError
            tokens += spelled(read_text(file), tokenizer.encode)
        except RefusedTextError:
            skipped.append(str(file.path))
    return np.array(tokens, np.int32), tuple(skipped)


def _score(scorer: Scorer, stream: Tokens, chunk: Chunk, opening: int | None, total: Likelihood) -> None:
    tokens = stream[chunk.start : chunk.stop].copy()
    targets = tokens[1:].copy()
    if opening is not None:
        tokens[0] = opening
    # The last token predicts one beyond the chunk.
    for start, logits in scorer.run(tokens[:-1], chunk.first):
        total.add(log_probabilities(logits), targets[start : start + len(logits)])
