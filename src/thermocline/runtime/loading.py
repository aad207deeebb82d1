"""From an opened model to an engine with its tokenizer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from thermocline.activity.predictor import MOST_TOKENS
from thermocline.config import LoadSettings
from thermocline.errors import BudgetError
from thermocline.files.source import ModelSource
from thermocline.hardware.cores import find_cores
from thermocline.hardware.memory import find_memory
from thermocline.memory.kv_cache import KVCache, kv_bytes
from thermocline.memory.loader import LoadReport, first_bytes, load_transformer
from thermocline.memory.residence import Reading
from thermocline.model.families import family_of
from thermocline.model.network import Transformer
from thermocline.model.spec import ModelSpec
from thermocline.model.workspace import workspace_bytes
from thermocline.ops.factory import make_ops
from thermocline.runtime.engine import Engine
from thermocline.runtime.prediction import Prediction, choose_prediction
from thermocline.runtime.sequence import TransformerSequence
from thermocline.runtime.traffic import traffic_of
from thermocline.text.load import load_tokenizer
from thermocline.text.tokenizer import Tokenizer, check_vocabulary

CACHE_SHARE = 0.5
"""Most of the free memory that the KV cache takes where the context length is left to us."""
ROTATION = 4
"""Bytes of a rotated dimension at one position: half a cosine and half a sine, in float32."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. `notices` say what was odd or was decided, one line each."""

    engine: Engine
    tokenizer: Tokenizer
    transformer: Transformer
    report: LoadReport
    threads: int
    notices: tuple[str, ...]
    seconds: float
    prediction: Prediction


def load_model(source: ModelSource, settings: LoadSettings, progress: Reading | None = None) -> LoadedModel:
    """Load `source`; `progress` is told how much of its weights was read.

    Raises:
        ModelFormatError, UnsupportedModelError, TokenizerError, NumericalError: the model is not usable.
        BudgetError: the context asked for does not fit the memory.
        UsageError: the network cannot run in the mode asked for.
        HardwareError: this CPU lacks the instruction set asked for, or the system the permission to lock memory.
        FingerprintError: the predictor that was asked for belongs to another model.
    """
    began = time.perf_counter()
    tokenizer = load_tokenizer(source)
    family = family_of(source)
    spec = family.spec(source)
    check_vocabulary(tokenizer, spec.n_vocab)
    weights = family.weights(source, spec)
    prediction = choose_prediction(source, spec, first_bytes(spec, weights), settings)
    n_ctx, notices = _context(spec, settings, scored=MOST_TOKENS if prediction.predictor is not None else 0)
    threads = settings.threads or find_cores().threads
    ops = make_ops(settings.ops, threads, settings.isa)
    transformer, report = load_transformer(
        source,
        ops,
        n_ctx=n_ctx,
        mode=prediction.mode,
        predictor=prediction.predictor,
        mlock=settings.mlock,
        progress=progress,
    )
    cache = KVCache(spec, ops, n_ctx, settings.cache_type_k, settings.cache_type_v)
    traffic = traffic_of(spec, weights, settings.cache_type_k, settings.cache_type_v, report.predictor_bytes)
    sequence = TransformerSequence(transformer, cache, settings.ubatch)
    engine = Engine(sequence, traffic, tokenizer.size, transformer.mode)
    notices = [*source.warnings, *tokenizer.warnings, *prediction.notices, *notices, *_load_notices(report)]
    seconds = time.perf_counter() - began
    return LoadedModel(engine, tokenizer, transformer, report, threads, tuple(notices), seconds, prediction)


def _context(spec: ModelSpec, settings: LoadSettings, *, scored: int) -> tuple[int, list[str]]:
    """The context length, and what there is to say about it.

    Raises:
        BudgetError: the one asked for takes more memory than is free.
    """
    wanted = settings.ctx_size or spec.n_ctx_train
    position = kv_bytes(spec, 1, settings.cache_type_k, settings.cache_type_v) + ROTATION * (
        spec.rope.rotary_dim if spec.rope is not None else 0
    )
    memory = find_memory()
    free = min(memory.available, memory.usable) - workspace_bytes(spec, settings.ubatch, 1, scored=scored)
    if not settings.ctx_size:
        chosen = max(1, int(free * CACHE_SHARE) // position)
        if wanted <= chosen:
            return wanted, []
        return chosen, [
            f"the model's context of {wanted} tokens needs {wanted * position / GIB:.1f} GiB with "
            f"{free / GIB:.1f} GiB free; using {chosen} tokens (choose with --ctx-size)"
        ]
    if wanted * position > free:
        fits = max(1, free // position)
        raise BudgetError("memory", wanted * position - free, f"use --ctx-size {fits} or less")
    if wanted > spec.n_ctx_train:
        return wanted, [f"a context of {wanted} tokens is longer than the {spec.n_ctx_train} the model was trained on"]
    return wanted, []


def _load_notices(report: LoadReport) -> list[str]:
    notices = []
    memory = find_memory()
    weights = report.mapped_bytes + report.resident_bytes + report.predictor_bytes
    if weights > memory.usable:
        size = weights / GIB
        notices.append(
            f"the weights take {size:.1f} GiB and memory has {memory.usable / GIB:.1f} GiB: "
            "what does not fit is read from disk for every token"
        )
    worst = report.worst_reblocked
    if worst is not None and worst.max_abs_error > 0:
        notices.append(
            f"{len(report.reblocked)} down projections were transposed into neuron records and quantised anew as "
            f"{worst.format}; largest error {worst.max_abs_error:.2g} (in {worst.tensor})"
        )
    return notices
