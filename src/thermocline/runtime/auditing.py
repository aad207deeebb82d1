"""Holds a predictor to exact computing, token by token, as decoding does.

Four networks of the same weights read the same text: dense, the yardstick, in small batches (their bits are those of
single tokens); exact, while its active sets are noted and the predictor's selection is held against them; the
oracle, which is told these sets; and predicted, on its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.activity.accumulator import down_norms
from thermocline.activity.audit import MIN_TOKENS, AuditResult, Comparison, Generated
from thermocline.activity.calibration import Counts, Quality
from thermocline.activity.likelihood import log_probabilities
from thermocline.activity.texts import Corpus, Reading, Window, find_texts
from thermocline.config import LoadSettings, Mode, SamplingSettings
from thermocline.errors import OutputError, UsageError, skipped_words
from thermocline.files.source import ModelSource
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.model.families import family_of
from thermocline.model.feed_forward import Tally
from thermocline.model.layer import Layer
from thermocline.model.network import Outputs, Transformer
from thermocline.model.workspace import Views, Workspace
from thermocline.ops.contract import ActiveSet, Array
from thermocline.ops.device import Device
from thermocline.runtime.engine import Engine
from thermocline.runtime.generation import Stream
from thermocline.runtime.loading import LoadedModel, load_model
from thermocline.runtime.prediction import keep_audit
from thermocline.runtime.profiling import WINDOW
from thermocline.runtime.scoring import Scorer
from thermocline.runtime.sequence import TransformerSequence

Ints = npt.NDArray[np.int32]

BATCH: Final = 7
"""Tokens that dense computes at once, ahead of the others: fewer than those that some CPUs round otherwise than one."""
PROMPTS: Final = 32
PROMPT_TOKENS: Final = 32
FREE_TOKENS: Final = 128
"""Free texts: how many, after how long a prompt, and their length.

The repeated share of one text is anything from 0 to 1; the mean of fewer texts says little about a difference of 0.1.
"""


class Audited(NamedTuple):
    """How far an audit is: tokens done of all, mean KL divergence of predicted so far, tokens a second, free texts."""

    tokens: int
    total: int
    mean_kl: float
    tokens_per_second: float
    texts: int = 0

    @property
    def share(self) -> float:
        """Of the whole work: a token is read by four networks, and a free text's token written by one."""
        written = FREE_TOKENS * np.array([self.texts, 2 * PROMPTS])
        done, whole = 4 * np.array([self.tokens, self.total]) + written
        return float(done / whole)


def audit_predictor(
    source: ModelSource,
    texts: Sequence[Path | str],
    settings: LoadSettings,
    *,
    tokens: int = MIN_TOKENS,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Audited], None] | None = None,
) -> AuditResult:
    """Load `source` with its predictor, hold it to exact computing over `tokens` tokens, and note the result.

    The note is kept in the predictor's file, or beside a model that has it inside, and mode auto goes by it. A
    predictor with another threshold than its own gets none, nor does one of which less than `MIN_TOKENS` tells: what
    was noted before stays. Where it cannot be written, the result says why.

    Raises:
        UsageError: the model has no predictor, or the texts have less than `tokens` tokens.
        ThermoclineError: what `load_model` raises.
    """
    if tokens < 2:
        raise UsageError(f"tokens is {tokens}; allowed: 2 or more")
    if settings.mode not in (Mode.AUTO, Mode.PREDICTED):
        raise UsageError(f"mode {settings.mode} predicts nothing that could be audited; leave --mode out")
    corpus = find_texts(texts).shuffled()
    spec = family_of(source).spec(source)
    window = settings.ctx_size or min(spec.n_ctx_train, WINDOW)
    settings.require_unwatched("audit")
    with closing(load_model(source, replace(settings, ctx_size=window, mode=Mode.PREDICTED), check=True)) as loaded:
        return _audit(source, loaded, settings, corpus, window, tokens, notice, progress)


def _audit(
    source: ModelSource,
    loaded: LoadedModel,
    settings: LoadSettings,
    corpus: Corpus,
    window: int,
    tokens: int,
    notice: Callable[[str], None] | None,
    progress: Callable[[Audited], None] | None,
) -> AuditResult:
    if notice is not None:
        for line in loaded.notices:
            notice(line)
    began = time.perf_counter()
    read = _read(loaded, corpus, window, tokens)
    auditor = _Auditor(source, loaded, window, settings)
    done, at = 0, Audited(0, tokens, math.nan, math.nan)
    for part in read:
        for count in auditor.run(np.asarray(part.tokens, np.int32)):
            done += count
            divergences = auditor.predicted.divergences
            at = Audited(done, tokens, float(np.mean(divergences)), done / (time.perf_counter() - began))
            if progress is not None:
                progress(at)

    def written(texts: int) -> None:
        if progress is not None:
            progress(at._replace(texts=texts))

    found = loaded.prediction.found
    assert found is not None
    result = AuditResult(
        tokens=done,
        exact=auditor.exact.result(),
        oracle=auditor.oracle.result(),
        predicted=auditor.predicted.result(),
        layers=auditor.watch.qualities(),
        generated=_generated(loaded, [part.tokens for part in read], window, settings, written),
        share=found.predictor.share(loaded.transformer.spec),
        seconds=time.perf_counter() - began,
    )
    if result.whole and not found.adjusted:
        note = {**result.as_dict(), "texts": corpus.digest, "ops": loaded.transformer.ops.name, "window": window}
        try:
            keep_audit(source, found, note, [layer.selected for layer in result.layers])
        except OutputError as error:  # what took an hour is told all the same
            return replace(result, problem=str(error))
        return replace(result, stored=True)
    return result


class Watch:
    """An observer of exact steps of one token: notes who fired, and holds the predictor's selection against it."""

    def __init__(self, transformer: Transformer, norms: npt.NDArray[np.float64]) -> None:
        self._transformer, self._norms = transformer, norms
        self._n_embd, self._n_ff = transformer.spec.n_embd, transformer.spec.n_ff
        self._scratch: dict[Tier, tuple[Array, Array, Array]] = {}
        self._selected = np.zeros((1, self._n_ff), np.bool_)
        self.counts = [Counts() for _ in transformer.layers]
        self.fired: list[Ints] = [np.zeros(0, np.int32)] * len(transformer.layers)
        """Of each layer, the neurons that fired for the last token, by the places of its order."""
        orders = [layer.ffn.order for layer in transformer.layers]
        self._places = [None if order is None else np.argsort(order).astype(np.int32) for order in orders]

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        """Ask the predictor."""
        placed = self._transformer.layers[layer]
        predictor = placed.predictor
        assert predictor is not None
        ops = predictor.device.ops
        x, scores, active = self._arrays(predictor.device)
        if predictor.device is placed.device:
            x = residual
        else:
            ops.upload(placed.device.ops.to_host(residual), x)
        ops.predict(x, predictor.fc1, predictor.fc2, scores)
        found = ActiveSet(np.asarray(ops.to_host(ops.select(scores, predictor.threshold, active).indices)))
        self._selected[:] = False
        self._selected[0, placed.ffn.named(found).indices] = True

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        """Compare with what came."""
        magnitude = np.abs(self._transformer.layers[layer].device.ops.to_host(hidden)).astype(np.float64)
        fired, places = np.flatnonzero(magnitude[0]).astype(np.int32), self._places[layer]
        self.fired[layer] = fired if places is None else np.sort(places[fired])
        self.counts[layer].add(self._selected, magnitude * self._norms[layer])

    def qualities(self) -> tuple[Quality, ...]:
        """Of each layer."""
        return tuple(Quality.of(count) for count in self.counts)

    def _arrays(self, device: Device) -> tuple[Array, Array, Array]:
        """A residual stream, scores and a list of neurons on a device."""
        if device.tier not in self._scratch:
            ops, n_ff = device.ops, self._n_ff
            self._scratch[device.tier] = (
                ops.array((1, self._n_embd)), ops.array((1, n_ff)), ops.array((n_ff,), "int32")
            )  # fmt: skip
        return self._scratch[device.tier]


@dataclass(frozen=True, slots=True)
class Oracle(Transformer):
    """A network in mode predicted that is told the answers: what each layer computes is in `answers`, by its order."""

    answers: list[Ints]

    @classmethod
    def of(cls, transformer: Transformer, answers: list[Ints]) -> Oracle:
        """The same network; `answers` is looked at anew in every step."""
        return cls(**{field.name: getattr(transformer, field.name) for field in fields(transformer)}, answers=answers)

    def _select(self, layer: Layer, views: Views, workspace: Workspace, tally: Tally, to_host: bool) -> ActiveSet:
        index = next(i for i, own in enumerate(self.layers) if own is layer)
        return ActiveSet(self.answers[index].copy())


class _Auditor:
    """The four networks, side by side."""

    def __init__(self, source: ModelSource, loaded: LoadedModel, window: int, settings: LoadSettings) -> None:
        predicted = loaded.transformer
        dense, exact = predicted.with_mode(Mode.DENSE), predicted.with_mode(Mode.EXACT)
        weights = family_of(source).weights(source, predicted.spec)
        self.watch = Watch(exact, down_norms(weights, predicted.spec))
        oracle = Oracle.of(predicted, self.watch.fired)
        self._dense = Scorer(dense, window, settings, batch=BATCH)
        self._exact = Scorer(exact, window, settings, batch=1, observed=True)
        self._oracle = Scorer(oracle, window, settings, batch=1)
        self._predicted = Scorer(predicted, window, settings, batch=1)
        self.exact, self.oracle, self.predicted = Comparison(), Comparison(), Comparison()

    def run(self, tokens: npt.NDArray[np.int32]) -> Iterator[int]:
        """Read a sequence; yields how many tokens were done, again and again."""
        for first in range(0, len(tokens), self._dense.rows):
            part = tokens[first : first + self._dense.rows]
            reference = log_probabilities(self._dense.step(part, first))
            for row, position in enumerate(range(first, first + len(part))):
                target = int(tokens[position + 1]) if position + 1 < len(tokens) else None
                token = tokens[position : position + 1]
                exact = self._exact.step(token, position, Outputs.ALL, self.watch)
                self.exact.add(reference[row], log_probabilities(exact)[0], target)
                for comparison, scorer in ((self.oracle, self._oracle), (self.predicted, self._predicted)):
                    comparison.add(reference[row], log_probabilities(scorer.step(token, position))[0], target)
            yield len(part)


def _read(loaded: LoadedModel, corpus: Corpus, window: int, tokens: int) -> list[Window]:
    """The sequences, `tokens` tokens in all.

    Raises:
        UsageError: there are less.
    """
    tokenizer = loaded.tokenizer
    reading = Reading(
        corpus, lambda text: tokenizer.encode(text, add_special=False), tokenizer.prefix, window, tokens
    )  # fmt: skip
    read = list(reading)
    found = sum(len(part.tokens) for part in read)
    if found < tokens:
        more = f" ({skipped_words(reading.skipped)})" if reading.skipped else ""
        less = f", or settle for less with --tokens {found}" if found >= MIN_TOKENS else ""
        raise UsageError(f"the text makes {found:,} tokens{more} and the audit reads {tokens:,}: give more text{less}")
    return read


def _generated(
    loaded: LoadedModel,
    read: Sequence[Sequence[int]],
    window: int,
    settings: LoadSettings,
    written: Callable[[int], None],
) -> tuple[Generated, Generated]:
    """Free texts of exact and of predicted, after the beginnings of what was read; `written` is told their number."""
    prompts = _prompts(read, min(PROMPT_TOKENS, max(window // 2, 1)))
    transformer = loaded.transformer
    found: list[Generated] = []
    for mode in (Mode.EXACT, Mode.PREDICTED):
        network = transformer.with_mode(mode)
        homes = [layer.device.ops for layer in network.layers]
        cache = KVCache(network.spec, homes, window, settings.cache_type_k, settings.cache_type_v)
        sequence = TransformerSequence(network, cache, settings.ubatch)
        engine = Engine(sequence, loaded.engine.traffic, loaded.tokenizer.size, mode)
        texts = []
        for seed, prompt in enumerate(prompts):
            sampling = SamplingSettings(seed=seed, max_tokens=FREE_TOKENS, ignore_eos=True)
            texts.append(Stream(engine, loaded.tokenizer, prompt, sampling).collect())
            written(len(found) * len(prompts) + len(texts))
        found.append(Generated.of([text.tokens for text in texts], [text.text for text in texts]))
    return found[0], found[1]


def _prompts(read: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """PROMPTS pieces of up to `length` tokens, spread over what was read; the beginning of each window first."""
    rounds = -(-PROMPTS // len(read))
    spread = []
    for i in range(rounds):
        for part in read:
            start = i * len(part) // rounds
            spread.append(part[start : start + length])
    return spread[:PROMPTS]
