"""From an opened model to an engine with its tokenizer."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from thermocline.config import DeviceKind, LoadSettings, Mode
from thermocline.errors import WARNING, BudgetError, OutputError, UsageError
from thermocline.files.source import ModelSource
from thermocline.hardware.cores import Cores, find_cores
from thermocline.hardware.gpu_choice import choose_gpu
from thermocline.hardware.machine import Tier
from thermocline.hardware.mapping import mappings_below
from thermocline.hardware.memory import find_memory
from thermocline.memory.arena import Make, make_array
from thermocline.memory.checks import first_bytes
from thermocline.memory.huge_pages import Progress
from thermocline.memory.kv_cache import KVCache, kv_bytes
from thermocline.memory.loader import LoadReport, load_transformer
from thermocline.memory.movable import Movable
from thermocline.model.families import family_of
from thermocline.model.network import Transformer
from thermocline.model.spec import ModelSpec
from thermocline.model.workspace import workspace_bytes
from thermocline.placement.budget import size_text
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import Plan, make_plan
from thermocline.runtime.counting import FiringCounts, require_addable
from thermocline.runtime.drift import Watch, drift_of
from thermocline.runtime.engine import Engine
from thermocline.runtime.placing import NOTHING_MOVES, Placing, place, require_device
from thermocline.runtime.planning import predicted_batches
from thermocline.runtime.prediction import Prediction, choose_prediction
from thermocline.runtime.sequence import TransformerSequence
from thermocline.runtime.split import measured_of, remember
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
    """A model ready to run. `notices` say what was odd or was decided, one line each; `settings` are those it has."""

    engine: Engine
    tokenizer: Tokenizer
    transformer: Transformer
    report: LoadReport
    threads: int
    notices: tuple[str, ...]
    seconds: float
    prediction: Prediction
    placing: Placing
    fingerprint: str
    settings: LoadSettings

    def close(self) -> None:
        """Give the memory back and let go of the devices. What the last generation measured is kept for --replan, and
        what fired where it was to be counted.

        Raises:
            OutputError: the counts could not be written; all the rest is done.
        """
        plan = self.placing.plan
        measured = None if plan is None else measured_of(plan, self.engine.account)
        if plan is not None and measured is not None:
            with contextlib.suppress(OutputError):  # a home that cannot be written only means that nothing is kept
                remember(plan, measured.times(self.placing.corrections))
        self.placing.close()
        watch, self.engine.watch = self.engine.watch, None
        if watch is not None:
            watch.keep(self.fingerprint, self.transformer.spec.name, self.transformer.mode.value)


def load_model(
    source: ModelSource,
    settings: LoadSettings,
    progress: Progress | None = None,
    *,
    check: bool = False,
    make: Make = make_array,
    tell: Callable[[str], None] | None = None,
    shrunk: str = "",
) -> LoadedModel:
    """Load `source`; `progress` is told how much of its weights was read, and `tell` what is done before.

    `check` looks at every weight for NaN and infinity before anything is computed, as long runs should. `make` makes
    every array of every device. Where a GPU turns out to hold more than its budget, the model is loaded
    once more with a budget that is smaller by the excess; `shrunk` is what that second load says of the first.

    Raises:
        ModelFormatError, UnsupportedModelError, TokenizerError, NumericalError: the model is not usable.
        BudgetError: the context asked for does not fit the memory, or the model the budgets.
        AllocationError: a memory refused what its budget allows.
        PlanError: the plan that was named belongs to another model or activity.
        UsageError: the network cannot run in the mode asked for.
        HardwareError: this CPU lacks the instruction set asked for, or the system the permission to lock memory.
        FingerprintError: the predictor or the activity that was asked for belongs to another model.

    After any of them nothing stays allocated.
    """
    began = time.perf_counter()
    if settings.gpu is not None:
        settings = replace(settings, gpu=choose_gpu(settings.gpu))
    tokenizer = load_tokenizer(source)
    family = family_of(source)
    spec = family.spec(source)
    check_vocabulary(tokenizer, spec.n_vocab)
    weights = family.weights(source, spec)
    prediction = choose_prediction(source, spec, first_bytes(spec, weights), settings)
    cores = find_cores()
    threads = settings.threads or cores.threads
    predictor = prediction.predictor
    up_to = () if predictor is None else predicted_batches(source, spec, weights, predictor, tell)
    watch = _watch(source, spec, prediction.mode, settings)
    placing = place(source, settings, threads, make=make, tell=tell)
    plan, memory = placing.plan, placing.memory
    movable = None
    if settings.drift is not None and Tier.VRAM in memory.devices:
        movable = Movable(memory, within=settings.device is DeviceKind.CUDA)
    counts = None if watch is None else watch.counts
    try:
        if plan is None:
            n_ctx, notices = _context(spec, settings, scored=max(up_to, default=0), observed=watch is not None)
            ubatch = settings.ubatch
        else:
            require_device(plan, memory)
            n_ctx, notices = plan.workload.context, _planned_context(spec, settings, plan)
            ubatch = plan.workload.ubatch
        transformer, report = load_transformer(
            source,
            memory,
            n_ctx=n_ctx,
            mode=prediction.mode,
            predictor=predictor,
            check=check,
            mlock=settings.mlock,
            mapped=settings.mmap,
            aside=kv_bytes(spec, n_ctx, settings.cache_type_k, settings.cache_type_v),
            progress=progress,
            seats=placing.below.seats,
            order=None if placing.order is None else placing.order.order,
            store=placing.below.store,
            movable=movable,
            sent_from=() if movable is not None else placing.sent_from,
            predicted_up_to=up_to,
        )
        notices = [*notices, *_sent_notices(transformer)]
        if tell is not None and placing.below.store is not None:
            tell("reading the hottest neurons")
        placing.below.warm_up(placing.order)
        caches, scratch = memory.arrays(Purpose.KV), memory.arrays(Purpose.ACTIVATIONS)
        homes = [caches[layer.device.tier] for layer in transformer.layers]
        cache = KVCache(spec, homes, n_ctx, settings.cache_type_k, settings.cache_type_v)
        if settings.device is DeviceKind.CUDA:
            from thermocline.runtime import on_gpu  # torch is needed with a GPU only

            sequence: TransformerSequence
            gpu, more = on_gpu.sequence_of(transformer, cache, ubatch, scratch, settings.crossing, counts)
            watched = _watch_notices(settings, placing, movable, replayed=gpu.captured is not None)
            notices = [*notices, *more, *watched, *([shrunk] if shrunk else [])]
            over = on_gpu.excess(placing)
            gpu.look, sequence = partial(on_gpu.beyond, placing), gpu
        else:
            sequence = TransformerSequence(transformer, cache, ubatch, scratch, timed=plan is not None, counter=counts)
            over = 0
        if watch is not None and settings.drift is not None:
            watch.drift = drift_of(placing, movable, watch.counts, prediction.predictor, settings.drift)
            if watch.drift is not None and settings.device is DeviceKind.CUDA:
                watch.drift.rest = gpu.rest
            if watch.drift is None and plan is not None:
                notices = [*notices, NOTHING_MOVES]
        if not over:
            placing.claim_scratch()
        elif shrunk:
            raise BudgetError(Tier.VRAM, over, "the GPU needs it beside the plan; raise --vram-budget by as much")
    except BaseException:
        placing.close()
        raise
    if over:
        budget = memory.ledger.budgets[Tier.VRAM]
        placing.close()
        del transformer, cache, caches, homes, scratch, sequence, gpu, movable, watch, placing, memory
        gc.collect()  # what is planned anew must find the memory free
        smaller, why = _smaller(settings, budget, over)
        return load_model(source, smaller, progress, check=check, make=make, tell=tell, shrunk=why)
    traffic = traffic_of(spec, weights, settings.cache_type_k, settings.cache_type_v, report.predictor_bytes, plan)
    files = mappings_below(weight.data for weight in [*weights.values(), *prediction.weights])
    engine = Engine(sequence, traffic, tokenizer.size, transformer.mode, plan, watch, placing.below, files)
    said = [*source.warnings, *tokenizer.warnings, *prediction.notices, *placing.notices, *notices]
    # What a plan's making has to say of the predictor was said before.
    notices = list(dict.fromkeys([*said, *_thread_notices(threads, cores), *_load_notices(report)]))
    seconds = time.perf_counter() - began
    return LoadedModel(
        engine,
        tokenizer,
        transformer,
        report,
        threads,
        tuple(notices),
        seconds,
        prediction,
        placing,
        source.fingerprint,
        settings,
    )


def _smaller(settings: LoadSettings, budget: int, over: int) -> tuple[LoadSettings, str]:
    """Settings with as much less VRAM as was held beyond the budget, and what there is to say."""
    smaller = replace(settings, vram_budget=f"{max(0, budget - over)}B")
    return (
        smaller,
        f"the GPU held {size_text(over)} more than its budget of {size_text(budget)}: planned again for that less",
    )


def smaller_plan(loaded: LoadedModel) -> tuple[LoadSettings, str] | None:
    """Settings for as much less VRAM as the first prompt took beyond the budget, and what there is to say.

    None where it kept the budget, or where no smaller plan exists.
    """
    placing, over = loaded.placing, loaded.engine.over
    budget = placing.memory.ledger.budgets.get(Tier.VRAM)
    if not over or budget is None or placing.problem is None:
        return None
    try:
        make_plan(replace(placing.problem, budgets={**placing.problem.budgets, Tier.VRAM: max(0, budget - over)}))
    except BudgetError:
        return None
    return _smaller(loaded.settings, budget, over)


def _watch(source: ModelSource, spec: ModelSpec, mode: Mode, settings: LoadSettings) -> Watch | None:
    """What counts what fires, if the settings ask for it.

    Raises:
        UsageError: nothing can be counted, or it would help nobody.
        FingerprintError, ModelFormatError: the file to count in is of another model or no activity.
    """
    if not settings.watched:
        return None
    if not spec.ffn.sparse:
        raise UsageError(f"every neuron fires with {spec.ffn.activation}: leave --drift and --count-activity out")
    if settings.drift is not None and mode is Mode.DENSE:
        raise UsageError("mode dense computes all neurons alike, so that none has a better place: leave --drift out")
    path = None if settings.count_activity is None else Path(settings.count_activity)
    if path is not None:
        require_addable(path, source.fingerprint, spec.name)
    return Watch(FiringCounts(spec.n_layer, spec.n_ff), None, path)


def _planned_context(spec: ModelSpec, settings: LoadSettings, plan: Plan) -> list[str]:
    context = plan.workload.context
    if settings.ctx_size > spec.n_ctx_train:
        return [f"a context of {context} tokens is longer than the {spec.n_ctx_train} the model was trained on"]
    if settings.ctx_size or context >= spec.n_ctx_train:
        return []
    return [f"planned for a context of {context} tokens of the model's {spec.n_ctx_train}; choose with --ctx-size"]


def _context(spec: ModelSpec, settings: LoadSettings, *, scored: int, observed: bool) -> tuple[int, list[str]]:
    """The context length, and what there is to say about it.

    Raises:
        BudgetError: the one asked for takes more memory than is free.
    """
    wanted = settings.ctx_size or spec.n_ctx_train
    position = kv_bytes(spec, 1, settings.cache_type_k, settings.cache_type_v) + ROTATION * (
        spec.rope.rotary_dim if spec.rope is not None else 0
    )
    memory = find_memory()
    scratch = workspace_bytes(spec, settings.ubatch, 1, scored=scored, observed=observed)
    free = min(memory.available, memory.usable) - scratch
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


def _watch_notices(settings: LoadSettings, placing: Placing, movable: Movable | None, *, replayed: bool) -> list[str]:
    """What watching is not, or costs, on a GPU."""
    notices = []
    if settings.watched and replayed:
        notices.append("a GPU replays single tokens as they were captured: what fires is counted in prompts alone")
    if movable is not None and any(placing.sent_from):
        notices.append("with --drift prompts send no cold neurons to the GPU: the CPU computes them")
    return notices


def _sent_notices(transformer: Transformer) -> list[str]:
    tokens = [layer.ffn.sent_from for layer in transformer.layers if layer.ffn.sent is not None]
    if not tokens:
        return []
    return [f"prompts send the cold neurons of {len(tokens)} layers to the GPU, from {min(tokens)} tokens on"]


def _thread_notices(threads: int, cores: Cores) -> list[str]:
    if threads <= max(1, cores.usable):
        return []
    better = f"--threads {cores.threads} is faster"
    return [f"{WARNING}of {threads} threads {cores.usable} can run at once, and the others wait: {better}"]


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
