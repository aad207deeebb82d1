"""How fast the kernels are: what the probe of a machine measures of them."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from thermocline import _native
from thermocline.hardware.bandwidth import Buffer

F16, Q4_0, RELU = 1, 2, 1
"""ggml's numbers of the formats, and the kernels' of the activation."""
GEMM_TOKENS, GEMM_SIZE = 256, 1024
SPARSE_ROW, SPARSE_SETS = 4096, 10
"""Elements of a row, in half precision, and how many sets of neurons share a layer's: one fires at a time."""
Q4_0_BYTES = 18 / 32
"""Of an element."""


def sparse_rate(buffer: Buffer, threads: int, seconds: float, tokens: int = 1, *, neighbours: bool = False) -> float:
    """Bytes/s of the FFN's kernels over the rows of a tenth of the neurons, at best; each call takes another set.

    They lie apart, unless it is to be of `neighbours`.
    """
    neurons = len(buffer) // (6 * SPARSE_ROW)
    rows = buffer[: 6 * SPARSE_ROW * neurons].reshape(3, neurons, 2 * SPARSE_ROW)
    gate, up, down = (_native.Matrix(part, F16, neurons, SPARSE_ROW) for part in rows)
    context, order = _native.Context(threads, "auto"), np.arange(neurons, dtype=np.int32)
    if not neighbours:
        np.random.default_rng(0).shuffle(order)
    sets = [np.sort(part) for part in np.array_split(order, min(SPARSE_SETS, neurons))]
    x, out = np.ones((tokens, SPARSE_ROW), np.float32), np.zeros((tokens, SPARSE_ROW), np.float32)
    best, end, turn = 0.0, time.perf_counter() + seconds, 0
    while not best or time.perf_counter() < end:
        active = sets[turn % len(sets)]
        began = time.perf_counter()
        context.ffn(x, gate, up, down, True, RELU, False, 0.0, None, None, active, out, True, None)
        best = max(best, 6 * SPARSE_ROW * len(active) / (time.perf_counter() - began))
        turn += 1
    return best


def unpacking_rate(buffer: Buffer, threads: int, seconds: float) -> float:
    """Numbers/s of weights in Q4_0 that meet one token, at best."""
    row = round(SPARSE_ROW * Q4_0_BYTES)
    rows = len(buffer) // row
    matrix = _native.Matrix(buffer[: rows * row].reshape(rows, row), Q4_0, rows, SPARSE_ROW)
    context = _native.Context(threads, "auto")
    x, out = np.ones((1, SPARSE_ROW), np.float32), np.zeros((1, rows), np.float32)
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        began = time.perf_counter()
        context.linear(x, (matrix,), (out,), None, False)
        best = max(best, rows * SPARSE_ROW / (time.perf_counter() - began))
    return best


def flops_rate(threads: int) -> float:
    """Operations/s of a product of 256 tokens with a half-precision matrix."""
    context = _native.Context(threads, "auto")
    weights = np.ones((GEMM_SIZE, GEMM_SIZE), np.float16).view(np.uint8)
    matrix = _native.Matrix(weights, F16, GEMM_SIZE, GEMM_SIZE)
    x, out = np.ones((GEMM_TOKENS, GEMM_SIZE), np.float32), np.zeros((GEMM_TOKENS, GEMM_SIZE), np.float32)
    seconds = _median(lambda: context.linear(x, (matrix,), (out,), None, False), 9)
    return 2.0 * GEMM_TOKENS * GEMM_SIZE * GEMM_SIZE / seconds


def launch_seconds(threads: int) -> float:
    """Of handing an op to the pool of threads and getting it back."""
    context, byte = _native.Context(threads, "auto"), np.ones(1, np.uint8)
    return _median(lambda: _native.read_bandwidth(context, byte), 2000)


def handover_seconds() -> float:
    """Half of the way there and back through a waiting thread."""
    there: queue.SimpleQueue[int] = queue.SimpleQueue()
    back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def serve() -> None:
        while there.get():
            back.put(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def call() -> None:
        there.put(1)
        back.get()

    seconds = _median(call, 500)
    there.put(0)
    thread.join()
    return seconds / 2


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return max(statistics.median(times), 1e-9)
