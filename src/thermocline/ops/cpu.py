"""The arithmetic on the CPU: a thin typed face of the native kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline import _native
from thermocline.errors import HardwareError, UsageError
from thermocline.files.formats import Q4_0, Q4_K, Q5_K, Q6_K, BlockFormat
from thermocline.files.weight import Bytes, Weight
from thermocline.ops.contract import Activation, ActiveSet, Array, FfnWork, KVLayer, Matrix, NeuronBlock

LINE = 64
"""Bytes of a cache line, and of the widest vectors: those that cross two lines are read twice."""
LEVELS = ("baseline", "avx2", "avxvnni", "avx512", "avx512bf16", "amx")
"""Every level that kernels exist for, weakest first."""
FETCHING = ("auto", "first", "second")

ARRANGED = {
    Q4_0: BlockFormat("Q4_0x16", -1, 512, 288),
    Q4_K: BlockFormat("Q4_Kx8", -2, 256, 144),
    Q5_K: BlockFormat("Q5_Kx8", -4, 256, 176),
    Q6_K: BlockFormat("Q6_Kx8", -3, 256, 210),
}
"""What the kernels are faster with than with formats of files, and only memory has: the same numbers, of as many bytes,
which give the same bits. Q4_0x16 has sixteen blocks in one, first their scales, then their numbers; in the
others each of the eight parts of a superblock has its nibbles in bytes of its own.
"""
APART = {Q4_0: BlockFormat("Q4_0x32", -5, 1024, 576)}
"""The same for rows that are read one here, one there: whole cache lines, in an order that no processor takes for a
stream whose next lines it would have to fetch.
"""
APART_BYTES = 2048
"""Longer rows than this gain nothing: what is fetched past their ends is little beside them."""

ACTIVATIONS = {Activation.SILU: 0, Activation.RELU: 1, Activation.RELU2: 2, Activation.GELU: 3}
"""The native kernels' numbers."""


class CpuOps:
    """The contract over `thermocline._native`, with its own threads.

    Results do not depend on the number of threads, on skipping, nor on which tokens share a batch, bit for bit; with
    one exception: a batch of 8 tokens or more differs from single tokens where the level rounds otherwise for it.
    `avx512bf16` and `amx` round such activations to BF16 before they meet weights in BF16; `amx` does so also before
    they meet weights in block formats, which it rounds as well, and splits them in two numbers of BF16 each before they
    meet weights in F16, and keys and values in F16 or Q8_0, with an error of 2^-15 of a product.

    Results do depend on the instruction set, but for products in block formats, which are the same at all levels with
    vectors of 256 bits or more, such batches on `amx` aside. Where a weight is in a block format, activations are else
    rounded to 8 bits in blocks of 32 before they meet it (except in the down projection of neuron records).

    Calls from several Python threads run one after another. Not usable in a forked child.
    """

    def __init__(self, threads: int, isa: str = "auto", fetching: str = "auto") -> None:
        """Start `threads` threads (the caller is one of them) with the kernels of `isa`.

        `fetching` is the cache to which rows of weights are brought before they are read: `first`, `second`, or what is
        faster on this CPU. Results do not depend on it.

        Raises:
            UsageError: `threads` is not between 1 and 1024, or `isa` or `fetching` names nothing that there is.
            HardwareError: this CPU lacks the level.
        """
        if not 1 <= threads <= 1024:
            raise UsageError(f"threads is {threads}; allowed: 1 to 1024")
        present = _native.isa_levels()
        if isa not in ("auto", *LEVELS):
            raise UsageError(f"isa is {isa!r}; allowed: auto, {', '.join(present)}")
        if isa != "auto" and isa not in present:
            raise HardwareError(f"this CPU lacks {isa}; it has {', '.join(present)}: choose one of them, or auto")
        if fetching not in FETCHING:
            raise UsageError(f"fetching is {fetching!r}; allowed: {', '.join(FETCHING)}")
        self._context = _native.Context(threads, isa, True, fetching)
        self.name = f"cpu/{self._context.isa}"
        """`cpu/` and the level of the kernels."""
        self.threads = threads
        """Threads that share an op, the caller included."""

    @property
    def context(self) -> _native.Context:
        """The native threads, kernels and scratch memory, for other native code."""
        return self._context

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held; grows with the largest op so far."""
        return self._context.scratch_bytes

    def park(self) -> None:
        """Send the threads to sleep now; left alone they spin for 2 ms after an op."""
        self._context.park()

    def place(self, weight: Weight) -> _native.Matrix:
        """A handle on the weight's own bytes, which it keeps alive."""
        return _native.Matrix(weight.data, weight.format.ggml_type, weight.rows, weight.columns)

    def arrangement(self, fmt: BlockFormat, columns: int, *, apart: bool = False) -> BlockFormat | None:
        """The format of a copy that is computed faster with than rows of `columns` in `fmt`; None if there is none.

        `apart`: not all rows are read, and those that are lie apart.
        """
        if self._context.isa == "baseline":
            return None
        short = apart and self._context.fetching == "second" and fmt.row_bytes(columns) <= APART_BYTES
        kinds = [APART, ARRANGED] if short else [ARRANGED]
        return next((kind[fmt] for kind in kinds if fmt in kind and columns % kind[fmt].block == 0), None)

    def arrange(self, weight: Weight, out: Bytes, fmt: BlockFormat) -> Weight:
        """The weight in a format that `arrangement` named, in `out` (rows, row_bytes), which may be its own bytes."""
        self._context.arrange(self.place(weight), out, fmt.ggml_type)
        return Weight(weight.name, fmt, weight.shape, out)

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """A zeroed numpy array that begins where a cache line does."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        room = np.zeros(size + LINE, np.uint8)
        start = -room.ctypes.data % LINE
        return room[start : start + size].view(dtype).reshape(shape)

    def upload(self, values: npt.NDArray[Any], out: Array) -> None:
        """See the contract."""
        np.copyto(out, values)

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """The array itself."""
        return np.asarray(array)

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32], out: Array) -> None:
        """See the contract."""
        self._context.embed(table, tokens, out)

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See the contract; `x` has one to three axes."""
        self._context.rms_norm(x, weight, eps, out)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
        """See the contract; `x` has one to three axes."""
        self._context.layer_norm(x, weight, bias, eps, out)

    def add(self, x: Array, y: Array) -> None:
        """See the contract."""
        np.add(x, y, out=x)

    def linear(
        self,
        x: Array,
        matrices: tuple[Matrix, ...],
        outs: tuple[Array, ...],
        biases: tuple[Array | None, ...] | None = None,
        *,
        add: bool = False,
    ) -> None:
        """See the contract; at most 16 matrices."""
        self._context.linear(x, matrices, outs, biases, add)

    def rope(
        self, arrays: tuple[Array, ...], table: Array, positions: npt.NDArray[np.int32], *, interleaved: bool
    ) -> None:
        """See the contract."""
        for x in arrays:
            self._context.rope(x, table, positions, interleaved)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: KVLayer,
        start: int,
        scale: float,
        window: int,
        out: Array,
    ) -> None:
        """See the contract."""
        self._context.attention(q, k, v, cache.keys, cache.values, start, scale, window, out)

    def ffn(
        self,
        x: Array,
        block: NeuronBlock,
        active: ActiveSet,
        out: Array,
        *,
        skip_zeros: bool,
        hidden: Array | None = None,
    ) -> FfnWork:
        """See the contract."""
        kind = block.kind
        return FfnWork(
            *self._context.ffn(
                x,
                block.gate,
                block.up,
                block.down,
                block.records,
                ACTIVATIONS[kind.activation],
                kind.both,
                kind.threshold,
                block.up_bias,
                block.rows,
                active.indices,
                out,
                skip_zeros,
                hidden,
            )
        )

    def predict(self, x: Array, fc1: Matrix, fc2: Matrix, scores: Array) -> None:
        """See the contract."""
        self._context.predict(x, fc1, fc2, scores)

    def select(self, scores: Array, threshold: float, out: Array) -> ActiveSet:
        """See the contract."""
        return ActiveSet(out[: self._context.select(scores, threshold, out)])

    def transpose_requantize(self, matrix: Matrix, out: Bytes, fmt: BlockFormat) -> tuple[float, float, float]:
        """Turn ffn_down (n_embd rows of n_ff) into neuron records: `out` (n_ff, row_bytes of n_embd) uint8, in `fmt`.

        Rounds like `files.quantize`, bit for bit; `fmt` is no K-quant. Returns the largest and the root mean square
        change of an element, and the root mean square of the elements; the largest change is infinite if something is
        not finite or beyond the range of `fmt`.
        """
        return self._context.transpose_requantize(matrix, out, fmt.ggml_type)

    def check_finite(self, matrix: Matrix) -> int:
        """The first row that holds a NaN or an infinity in a value or a block scale, or -1."""
        return self._context.check_finite(matrix)
