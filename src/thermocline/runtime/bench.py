"""Speed of prefill and decode, in rows like llama-bench's, with the bytes behind them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from thermocline.config import SamplingSettings
from thermocline.errors import UsageError
from thermocline.runtime.engine import Engine
from thermocline.runtime.sampler import Sampler
from thermocline.runtime.split import SplitReport

SEED = 1
"""The same prompts and the same drawn tokens in every run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One test. Rates are tokens a second; `bytes_per_token`, `gigabytes_per_second` and `active_share` are of
    decoding only (None for prefill). `split` tells of the last repetition by a plan, None without one.
    """

    test: str
    tokens: int
    rates: tuple[float, ...]
    bytes_per_token: float | None = None
    gigabytes_per_second: float | None = None
    active_share: float | None = None
    split: SplitReport | None = None

    @property
    def mean(self) -> float:
        """Mean rate."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the rate, 0 for a single run."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        split = None if self.split is None else self.split.as_dict()
        return asdict(self) | {"mean": self.mean, "deviation": self.deviation, "split": split}


def run_bench(engine: Engine, *, prompt: int, generate: int, repetitions: int) -> Iterator[BenchRow]:
    """Measure prefill of `prompt` tokens and decoding of `generate` tokens, each `repetitions` times after a warm-up.

    The prompt is random tokens, as llama-bench has them. Decoding starts from one token and goes on with tokens
    drawn from the model at temperature 1, because how many neurons fire depends on the text; drawing is not timed.
    0 leaves a test out.

    Raises:
        UsageError: a number is out of its range, or does not fit the context.
    """
    for name, value, low, high in (
        ("-p", prompt, 0, engine.n_ctx - 1),
        ("-n", generate, 0, engine.n_ctx - 1),
        ("-r", repetitions, 1, 1000),
    ):
        if not low <= value <= high:
            remedy = "; raise --ctx-size" if value > high and name != "-r" else ""
            raise UsageError(f"{name} is {value}; allowed: {low} to {high}{remedy}")
    if not prompt and not generate:
        raise UsageError("both -p and -n are 0; there is nothing to measure")
    return _rows(engine, prompt, generate, repetitions)


def _rows(engine: Engine, prompt: int, generate: int, repetitions: int) -> Iterator[BenchRow]:
    if prompt:
        yield _prefill(engine, prompt, repetitions)
    if generate:
        yield _decode(engine, generate, repetitions)


def _prefill(engine: Engine, count: int, repetitions: int) -> BenchRow:
    tokens = np.random.Generator(np.random.PCG64(SEED)).integers(0, engine.width, count).tolist()
    seconds = []
    for _ in range(repetitions + 1):
        engine.begin()
        began = time.perf_counter()
        engine.prefill(tokens, reuse=False)
        seconds.append(time.perf_counter() - began)
    return BenchRow(test=f"pp{count}", tokens=count, rates=tuple(count / s for s in seconds[1:]))


def _decode(engine: Engine, count: int, repetitions: int) -> BenchRow:
    rates, bandwidths, sizes, shares = [], [], [], []
    for _ in range(repetitions + 1):
        seconds = _decode_once(engine, count)
        rates.append(count / seconds)
        sizes.append(engine.bytes_read / count)
        bandwidths.append(engine.bytes_read / seconds / 1e9)
        shares.append(engine.fired / (count * engine.traffic.neurons))
    return BenchRow(
        test=f"tg{count}",
        tokens=count,
        rates=tuple(rates[1:]),
        bytes_per_token=statistics.fmean(sizes[1:]),
        gigabytes_per_second=statistics.fmean(bandwidths[1:]),
        active_share=statistics.fmean(shares[1:]),
        split=engine.split(seconds),
    )


def _decode_once(engine: Engine, count: int) -> float:
    """Seconds of `count` steps."""
    free = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=SEED)
    sampler = Sampler(free, engine.width, engine.n_ctx)
    ticket = engine.begin()
    logits, _ = engine.prefill([0], reuse=False)
    seconds = 0.0
    for _ in range(count):
        token = sampler.sample(logits).token
        began = time.perf_counter()
        logits = engine.step(token, ticket)
        seconds += time.perf_counter() - began
    return max(seconds, math.ulp(1.0))
