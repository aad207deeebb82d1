"""Every implementation of the ops beside its slow twin, and the weights that they are compared on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from thermocline import _native
from thermocline.files.formats import BF16, F16, F32, Q8_0, BlockFormat
from thermocline.files.quantize import quantize
from thermocline.files.weight import Weight
from thermocline.ops.contract import ActiveSet, KVLayer, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.cuda.tuning import Tuning
from thermocline.ops.reference import ReferenceOps

THREADS = (1, 2, 3)
FETCHING = {1: "first", 2: "auto", 3: "second"}
"""By threads, to which cache rows are fetched."""


@cache
def cpu_ops(isa: str, threads: int) -> CpuOps:
    return CpuOps(threads, isa, FETCHING[threads])


def apart(cache: Any) -> Any:
    """A cache in Q8_0, blocks as in a file, as the device has it: the numbers of all, then the scales of all."""
    blocks = cache.reshape(-1, Q8_0.block_bytes)
    return np.concatenate([blocks[:, 2:].ravel(), blocks[:, :2].ravel()]).reshape(cache.shape)


def together(cache: Any) -> Any:
    """The contrary of `apart`."""
    blocks = cache.size // Q8_0.block_bytes
    numbers, scales = np.split(cache.ravel(), [blocks * Q8_0.block])
    return np.concatenate([scales.reshape(blocks, -1), numbers.reshape(blocks, -1)], axis=1).reshape(cache.shape)


class OnTensors:
    """The CUDA ops behind numpy arrays: the tests' arrays go to the device and come back."""

    def __init__(self, ops: CudaOps) -> None:
        self.ops = ops
        self.name = ops.name

    def place(self, weight: Weight) -> Any:
        return self.ops.place(weight)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **named: self._call(getattr(self.ops, name), args, named)

    def _call(self, op: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        pairs: list[tuple[Any, torch.Tensor]] = []
        caches: list[tuple[Any, torch.Tensor]] = []

        def cached(array: Any) -> Any:
            if array.dtype != np.uint8:
                return sent(array)
            caches.append((array, torch.from_numpy(apart(array)).to(self.ops.device)))
            return caches[-1][1]

        def sent(value: Any) -> Any:
            match value:
                case np.ndarray():
                    pairs.append((value, torch.from_numpy(value).to(self.ops.device)))
                    return pairs[-1][1]
                case KVLayer():
                    return KVLayer(cached(value.keys), cached(value.values))
                case NeuronBlock():
                    return replace(value, up_bias=sent(value.up_bias), rows=sent(value.rows))
                case ActiveSet():
                    return value if value.indices is None else replace(value, indices=sent(value.indices))
                case tuple() if not hasattr(value, "_fields"):
                    return tuple(map(sent, value))
            return value

        result = op(*map(sent, args), **{key: sent(value) for key, value in named.items()})
        for array, tensor in pairs:
            if tensor.data_ptr() != array.ctypes.data:
                array[...] = tensor.cpu().numpy()
        for array, tensor in caches:
            array[...] = together(tensor.cpu().numpy())
        if isinstance(result, ActiveSet):
            return ActiveSet(args[-1][: len(result.indices)])
        return result


@cache
def gpu_ops() -> OnTensors:
    """On the GPU where one is and the interpreter is off, else in the interpreter."""
    return OnTensors(CudaOps(tf32=False, tuning=Tuning()))


LEVELS = _native.isa_levels()
CPUS = [f"{isa}-2" for isa in LEVELS] + [f"{LEVELS[-1]}-{threads}" for threads in THREADS if threads != 2]


@pytest.fixture(params=[*CPUS, "gpu"])
def ops(request: pytest.FixtureRequest) -> Any:
    """Every level that this CPU has, the best one also with one and three threads, which fetch rows in different ways;
    and the GPU's kernels.

    `team` holds the others to the same bits with one and three threads."""
    if request.param == "gpu":
        return gpu_ops()
    isa, threads = request.param.split("-")
    return cpu_ops(isa, int(threads))


@pytest.fixture(params=CPUS)
def host(request: pytest.FixtureRequest) -> CpuOps:
    """The CPU alone, for what only loading asks of it."""
    isa, threads = request.param.split("-")
    return cpu_ops(isa, int(threads))


@pytest.fixture
def fewer(ops: Any) -> Callable[[Any, Any], Any]:
    """The first of two lists of sizes; where kernels are interpreted, at some milliseconds a program, the second."""
    slow = isinstance(ops, OnTensors) and os.environ.get("TRITON_INTERPRET") == "1"
    return lambda full, few: few if slow else full


@pytest.fixture(params=_native.isa_levels())
def team(request: pytest.FixtureRequest) -> list[CpuOps]:
    """One level with one, two and three threads, and each way to fetch rows: all must agree bit for bit."""
    return [cpu_ops(request.param, threads) for threads in THREADS]


@pytest.fixture
def vector_levels() -> list[CpuOps]:
    """Every level with vectors of 256 bits or more that multiplies integers, batches too."""
    return [cpu_ops(isa, 2) for isa in _native.isa_levels() if isa not in ("baseline", "amx")]


@pytest.fixture
def reference() -> ReferenceOps:
    return ReferenceOps()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Mostly ordinary numbers, with zeros, numbers below the smallest normal one and a few very large ones."""
    x = rng.standard_normal(shape).astype(np.float32)
    kind = rng.integers(0, 40, shape)
    x[kind == 0] = 0
    x[kind == 1] *= 1e-40
    x[kind == 2] *= 300
    return x


def _weight(x: Any, fmt: BlockFormat, offset: int = 1) -> Weight:
    """`x` in `fmt`, its bytes at an odd address unless `offset` is even, and nothing but 0xFF after them."""
    packed = quantize(x, fmt)
    room = np.full(packed.size + offset + 64, 0xFF, np.uint8)
    data = room[offset : offset + packed.size].reshape(packed.shape)
    data[...] = packed
    return Weight("w", fmt, x.shape, data)


class Fence:
    """A float array inside a larger one, whose ends must stay as they are."""

    SENTINEL = 777.25
    MARGIN = 32

    def __init__(self, shape: tuple[int, ...], fill: float = 0.0) -> None:
        size = int(np.prod(shape))
        self.room = np.full(size + 2 * self.MARGIN, self.SENTINEL, np.float32)
        self.array = self.room[self.MARGIN : self.MARGIN + size].reshape(shape)
        self.array[...] = fill

    def check(self) -> Any:
        assert (self.room[: self.MARGIN] == self.SENTINEL).all()
        assert (self.room[-self.MARGIN :] == self.SENTINEL).all()
        return self.array


@pytest.fixture
def skewed(rng: np.random.Generator) -> Callable[[tuple[int, ...]], Any]:
    return lambda shape: _skewed(rng, shape)


@pytest.fixture
def weight() -> Callable[..., Weight]:
    return _weight


@pytest.fixture
def fence() -> type[Fence]:
    return Fence


EPS = 2.0**-24
"""Largest relative error of rounding once to float32."""


TILES = {"Q8_0": 10, "Q4_0": 12, "F16": 20}
"""From so many tokens on AMX makes tiles of weights of a format, if not from 16 on."""


def _batch(fmt: BlockFormat) -> int:
    """From so many tokens on, a level with BF16 arithmetic rounds tokens to BF16 before they meet some weights."""
    return 8 if fmt is BF16 else TILES.get(fmt.name, 16)


def _off(ops: CpuOps, fmt: BlockFormat) -> float:
    """How far a product of a batch may be off, as a share of it, for it is taken in BF16; 0 where it is not.

    BF16 has 8 significant bits, so that rounding is off by at most 2^-8. With AMX numbers that meet F16 are split in
    two of BF16: what is left of an activation is rounded again, and two second parts never meet; and weights in block
    formats are rounded as well.
    """
    tiles = ops.name == "cpu/amx"
    if fmt is F16:
        return 2 * 2.0**-16 if tiles else 0
    if fmt is BF16:
        return 2.0**-8 if tiles or ops.name == "cpu/avx512bf16" else 0
    return 2 * 2.0**-8 if tiles and fmt.block > 1 else 0


def _summed_magnitudes(w: Any, fmt: BlockFormat) -> Any:
    """What is really added up for each weight (rows, columns): K-quants subtract the minima from what lies above
    them, magnitudes up to the largest of the part, and twice that."""
    w = np.abs(w.astype(np.float64))
    if fmt.block < 256:
        return w
    parts = w.reshape(w.shape[0], w.shape[1] // 32, 32)
    return w + 2 * np.repeat(parts.max(axis=2), 32, axis=1)


def _linear_bound(x: Any, w: Any, fmt: BlockFormat, *, off: float) -> Any:
    """How far a product may be off (T, rows), beside an exact one.

    n products and sums in float32 are off by at most (n + 3) eps times the sum of their magnitudes. Integer formats
    round x to steps of a 127th of its block's largest magnitude: half a step an element at most. What underflows is
    below the smallest normal float an element, and blocks below 1e-35 are taken as zero.
    `off`: what BF16 takes off a product, as a share of it; then three products may stand for one, and what is below the
    smallest normal number counts as zero on both sides.
    """
    x, w, summed = np.abs(x.astype(np.float64)), np.abs(w.astype(np.float64)), _summed_magnitudes(w, fmt)
    terms = (3 if off else 1) * x.shape[1]
    bound = (terms + 3) * EPS * (x @ summed.T) + x.shape[1] * 2.0**-126
    if off:
        bound += 1.01 * off * (x @ w.T) + x.shape[1] * 2.0**-126 * (x.max(initial=0) + w.max(initial=0))
    if fmt.block > 1 and not off:
        blocks = x.reshape(x.shape[0], x.shape[1] // 32, 32)
        step = (blocks.max(axis=2) / 127)[:, :, None] * np.ones(32)
        bound += (0.501 * step.reshape(x.shape) + 1e-35) @ w.T
    return bound


def _factor_bound(h: Any, w: Any) -> Any:
    """What whole factors are off by (T, 1): half a unit a neuron, times its largest number.

    The unit is a 2^22-th of the largest product of an activation with a scale, of all neurons. A scale times the
    largest number that is ever stored is at most what a part of its row spans, and 1.3 times that where a K-quant's
    rounded scale leaves the last numbers unused. What a minimum takes off is rounded in the same way.
    """
    span = 1.3 * 2 * np.abs(w).max(axis=0, initial=0)
    largest = (np.abs(h) * span).max(axis=1, initial=0, keepdims=True)
    return 2 * 0.5 * largest / (2**22 - 1) * np.count_nonzero(h, axis=1, keepdims=True)


class LinearBound:
    """`_linear_bound` for an implementation."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops
        self.summed = _summed_magnitudes

    def __call__(self, x: Any, w: Any, fmt: BlockFormat) -> Any:
        return _linear_bound(x, w, fmt, off=self._off(x, fmt))

    def of_records(self, h: Any, w: Any, fmt: BlockFormat) -> Any:
        """Of a down projection over records, w (columns, neurons): by floats, with AMX in BF16 as other products of
        batches, or by whole factors in block formats.
        """
        off = self._off(h, fmt)
        if off and self._ops.name.startswith("cpu/amx"):
            return _linear_bound(h, w, F32, off=off)
        return _linear_bound(h, w, F32, off=0) + (_factor_bound(h, w) if fmt.block > 1 else 0)

    def _off(self, x: Any, fmt: BlockFormat) -> float:
        return _off(self._ops, fmt) if len(x) >= _batch(fmt) else 0


@pytest.fixture
def linear_bound(ops: CpuOps) -> LinearBound:
    return LinearBound(ops)


@pytest.fixture
def company() -> Callable[[CpuOps, BlockFormat], int]:
    """Tokens that a batch must have for its bits to be those of any larger one: mostly one is enough."""
    return lambda ops, fmt: _batch(fmt) if _off(ops, fmt) else 1
