"""Thermocline as benchmarks run it: one mode of one model, in turns with others."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline import _native
from thermocline.config import CacheType, LoadSettings, Mode, SamplingSettings
from thermocline.files.companion import companion
from thermocline.files.formats import F16, F32, Q8_0
from thermocline.files.open import open_model
from thermocline.files.quantize import quantize
from thermocline.files.sidecar import SidecarKind
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.neuron_store import ResidentNeurons
from thermocline.model.families import family_of
from thermocline.ops.cpu import CpuOps
from thermocline.runtime.engine import Engine
from thermocline.runtime.loading import LoadedModel, load_model
from thermocline.runtime.sampler import Sampler
from thermocline.runtime.sequence import TransformerSequence

STORED = {"float32": F32, "float16": F16, "uint8": Q8_0}
"""What a cache's arrays hold."""
Rows = npt.NDArray[np.int32]
FREE = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)


class Ours:
    """A loaded model in one mode. Turns continue its text."""

    def __init__(self, model: LoadedModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self._rng = np.random.default_rng(1)
        self.start(0)

    @classmethod
    def load(
        cls,
        path: Path,
        mode: Mode,
        threads: int,
        n_ctx: int,
        cache: CacheType = CacheType.F16,
        *,
        mmap: bool | None = None,
    ) -> Ours:
        """Load `path` as the command line does."""
        settings = LoadSettings(
            mode=mode, threads=threads, ctx_size=n_ctx, cache_type_k=cache, cache_type_v=cache, mmap=mmap
        )
        with open_model(path) as source:
            model = load_model(source, settings)
        return cls(model, model.engine)

    def beside(self, mode: Mode) -> Ours:
        """The same weights and threads in another mode, with a cache of its own. It uses no predictor."""
        network, old = self.model.transformer.with_mode(mode), self.engine
        sequence = TransformerSequence(network, KVCache(network.spec, network.ops, old.n_ctx), old._sequence.ubatch)
        return Ours(self.model, Engine(sequence, replace(old.traffic, predictor=0), old.width, mode))

    @property
    def cache(self) -> KVCache:
        """The sequence's cache."""
        cache: KVCache = self.engine._sequence._cache  # type: ignore[attr-defined]
        return cache

    def start(self, depth: int) -> None:
        """Begin a text; with a `depth`, as if so many tokens were cached."""
        engine = self.engine
        self.sampler = Sampler(FREE, engine.width, engine.n_ctx)
        self.ticket = engine.begin()
        engine._held[:] = [0] * depth
        self.cache.fill(depth)
        self.logits = engine.step(1, self.ticket) if depth else engine.prefill([0], reuse=False)[0]
        engine.bytes_read, engine.fired = 0.0, 0

    def decode(self, count: int) -> float:
        """Seconds of so many steps; drawing tokens is not timed."""
        seconds = 0.0
        for _ in range(count):
            token = self.sampler.sample(self.logits).token
            began = time.perf_counter()
            self.logits = self.engine.step(token, self.ticket)
            seconds += time.perf_counter() - began
        return seconds

    def prefill(self, tokens: list[int]) -> float:
        """Seconds of a prompt from an empty cache."""
        self.engine.begin()
        began = time.perf_counter()
        self.engine.prefill(tokens, reuse=False)
        return time.perf_counter() - began

    def fill_cache(self) -> None:
        """Random numbers for all that was ever cached."""
        rng = np.random.default_rng(1)
        values = rng.standard_normal((4096, self.model.transformer.spec.head_dim), np.float32)
        for layer in self.cache.layers:
            for array in (layer.keys, layer.values):
                rows = quantize(values, STORED[array.dtype.name]).view(array.dtype)
                part = array.reshape(-1, array.shape[-1])
                for at in range(0, len(part), len(rows)):
                    part[at : at + len(rows)] = rows[: len(part) - at]

    def read_weights(self, share: float | None = None) -> tuple[float, float]:
        """Seconds and bytes of reading once, with nothing else to do, what a token reads of the weights.

        All of a dense token; or, with a `share` of neurons that fire, the predictor too, and of the FFN random rows.
        """
        network = self.model.transformer
        whole, rows = [*network.head], []
        for layer in network.layers:
            whole += [*layer.qkv, *layer.out]
            if share is not None and layer.predictor is not None:
                whole += [layer.predictor.fc1, layer.predictor.fc2]
            for part in layer.ffn.parts:
                assert isinstance(part, ResidentNeurons)
                rows.append([m for m in (part.block.gate, part.block.up, part.block.down) if m is not None])
        assert isinstance(network.ops, CpuOps)
        context, seconds, total = network.ops.context, 0.0, 0
        reads: list[tuple[_native.Matrix, Rows | None]] = [(m, None) for m in whole]
        for matrices in rows:
            ids = None if share is None else np.flatnonzero(self._rng.random(matrices[0].rows) < share).astype(np.int32)
            reads += [(m, ids) for m in matrices]
        for matrix, ids in reads:
            size = matrix.row_bytes * (matrix.rows if ids is None else len(ids))
            rate = _native.read_rows(context, matrix, ids) if size else 0.0
            seconds, total = seconds + (size / rate if size else 0.0), total + size
        return seconds, float(total)

    @property
    def dense_bytes(self) -> float:
        """What a dense token reads of the weights."""
        traffic = self.engine.traffic
        return traffic.trunk + traffic.neurons * (traffic.gate_row + traffic.up_row + traffic.down_row)

    def random_tokens(self, count: int) -> list[int]:
        """Token ids, the same every time."""
        tokens: list[int] = np.random.default_rng(1).integers(0, self.engine.width, count).tolist()
        return tokens


def records_of(path: Path) -> Path:
    """The file with neuron records beside `path`, or `path`."""
    records = path.with_name(path.name.removesuffix(".gguf") + ".records.gguf")
    return records if records.is_file() else path


def description_of(path: Path) -> dict[str, object]:
    """What a result says about its model."""
    with open_model(path) as source:
        return {
            "file_bytes": path.stat().st_size,
            "parameters": family_of(source).spec(source).parameters,
            "description": source.metadata.text("general.description", ""),
        }


def modes_of(path: Path) -> list[Mode]:
    """Dense; and what else the model and its files allow."""
    with open_model(path) as source:
        sparse = family_of(source).spec(source).ffn.sparse
    predicts = sparse and companion(path, SidecarKind.PREDICTOR).is_file()
    return [Mode.DENSE] + [Mode.EXACT] * sparse + [Mode.PREDICTED] * predicts
