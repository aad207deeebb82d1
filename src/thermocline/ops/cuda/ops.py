"""The ops contract on torch tensors: Triton kernels for one token, matrix products of torch for many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from thermocline.files.formats import BlockFormat
from thermocline.files.weight import Weight
from thermocline.hardware.gpu import find_gpus, own_bytes
from thermocline.ops.contract import ActiveSet, Array, Arrays, FfnWork, KVLayer, Matrix, NeuronBlock
from thermocline.ops.cuda import attention as attending
from thermocline.ops.cuda import feedforward
from thermocline.ops.cuda.device import open_device
from thermocline.ops.cuda.feedforward import DeviceSet
from thermocline.ops.cuda.lanes import PinnedLanes
from thermocline.ops.cuda.launch import Launcher, launch
from thermocline.ops.cuda.layout import DeviceMatrix, arranged, rows_apart, rows_of_file
from thermocline.ops.cuda.scratch import Scratch
from thermocline.ops.cuda.sizes import DECODED
from thermocline.ops.cuda.streams import Streams
from thermocline.ops.cuda.tuning import FEWER_PROGRAMS, K_QUANTS, Tuning, power_of_two
from thermocline.ops.factory import interpreted

Tensor = torch.Tensor

FEW = 4
"""Tokens up to which matrices are multiplied token by token: reading one twice costs less than decoding it first."""
NORMED = 8192
"""Elements of a row that a norm holds at once; it reads longer rows twice."""
STAGING = 8 << 20
"""Bytes of pinned memory that uploads pass through."""


class CudaOps:
    """The contract on one GPU, or in Triton's interpreter on CPU tensors.

    Array arguments are tensors of the device; tokens and positions may be numpy arrays, which are copied there, or
    tensors that are there already. Launches are asynchronous on the current stream; `to_host` waits.

    Single tokens take the kernels, whose sums do not depend on skipping, bit for bit. Longer batches are decoded to
    float32 by parts and multiplied by torch, in TF32 where `tf32` (11 significant bits of every factor, sums in
    float32), so they agree with single tokens only to that.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        tf32: bool = True,
        tuning: Tuning | None = None,
        launcher: Launcher = launch,
    ) -> None:
        """Compute on `device`: `cuda`, `cpu` (interpreter), `meta` (nothing), or the best there is.

        Raises:
            UsageError: the device is not the first GPU (see `hardware.gpu_choice`).
            HardwareError: torch, Triton, a driver or the device is missing; the message names the remedy.
        """
        free = _free_before(device)
        self.device, self.name = open_device(device)
        self.tuning = tuning or (FEWER_PROGRAMS if self.device.type == "cpu" else Tuning())
        self.launcher = launcher
        self.tf32 = tf32
        self.streams = Streams(self.device)
        self.scratch = Scratch(self.device)
        self._pinned: Tensor | None = None
        self._free = self._others = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._free, self._others = free or self._free_bytes(), int(torch.cuda.memory_reserved(self.device))
        self.counts: Tensor | None = None
        """While not None, work is added up here, int64 (4), and calls return zeros: nothing waits for the device."""

    def place(self, weight: Weight) -> DeviceMatrix:
        """The weight on its own bytes if they are an array of this device, else on a copy.

        Bytes of the device are rearranged where they lie (see `layout`) and are the matrix's from then on.
        """
        raw: Any = weight.data
        if not isinstance(raw, Tensor):
            raw = self.array(weight.data.shape, "uint8")
            self.upload(weight.data, raw)
        return arranged(raw, weight.format, weight.columns)

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """A zeroed tensor.

        Raises:
            MemoryError: the device has no room for it.
        """
        try:
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    def upload(self, values: npt.NDArray[Any], out: Array) -> None:
        """See the contract; large arrays pass through pinned memory."""
        if self.device.type == "meta":
            return
        if self.device.type == "cpu":
            np.copyto(out.numpy(), values)
            return
        flat, source = out.view(-1), np.ascontiguousarray(values).reshape(-1)
        step = STAGING // max(source.itemsize, 1)
        for start in range(0, len(source), step):
            piece = source[start : start + step]
            room = self._staging()[: piece.nbytes].view(out.dtype)
            np.copyto(room.numpy(), piece)
            flat[start : start + step].copy_(room)

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """The array as numpy, once the device has come so far."""
        host: npt.NDArray[Any] = array.cpu().numpy()
        return host

    def rows(self, array: Array, fmt: BlockFormat, at: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """See `memory.slots.RowKeeper`."""
        return self.to_host(rows_of_file(array.index_select(0, self._there(at)), fmt))

    def put_rows(self, array: Array, fmt: BlockFormat, at: npt.NDArray[np.int32], rows: npt.NDArray[np.uint8]) -> None:
        """See `memory.slots.RowKeeper`."""
        array.index_copy_(0, self._there(at).long(), rows_apart(self._there(np.ascontiguousarray(rows)), fmt))

    def held_bytes(self) -> int:
        """The most that torch held of the device since these ops were made, and what the driver holds beside it.

        Where the driver does not tell what is this process's, that is what else has gone of the device meanwhile: other
        processes' part too. 0 where the device is none.
        """
        if self.device.type != "cuda":
            return 0
        reserved = int(torch.cuda.memory_reserved(self.device))
        own = own_bytes(self.device.index or 0)
        beside = own - reserved if own else self._free - self._free_bytes() - (reserved - self._others)
        return max(0, int(torch.cuda.max_memory_reserved(self.device)) - self._others) + max(0, beside)

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else 0

    def _staging(self) -> Tensor:
        if self._pinned is None:
            self._pinned = self.streams.pinned((STAGING,), torch.uint8)
        return self._pinned

    @contextmanager
    def counting(self, counts: Tensor) -> Iterator[None]:
        """Within, work is added up in `counts` (4) int64 on the device, and no call waits for it."""
        before, self.counts = self.counts, counts
        try:
            yield
        finally:
            self.counts = before

    def lanes(self, arrays: Arrays, nbytes: int) -> PinnedLanes:
        """Two buffers through which weights of the host are sent while others are computed with."""
        return PinnedLanes(self.streams, arrays, nbytes)

    @contextmanager
    def summing(self) -> Iterator[list[FfnWork]]:
        """Within, FFN calls wait for nothing and return zeros; afterwards the list ends with what they did."""
        if self.counts is not None:
            yield []
            return
        done: list[FfnWork] = []
        counts = self.scratch.take("sums of work", (4,), torch.int64).zero_()
        with self.counting(counts):
            yield done
        done.append(FfnWork(*counts.tolist()))

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32] | Tensor, out: Array) -> None:
        """See the contract."""
        self.decode_rows(table, self._there(tokens), 0, len(tokens), out)

    def decode_rows(self, matrix: DeviceMatrix, ids: Tensor | None, first: int, count: int, out: Tensor) -> None:
        """Write rows into `out` (count, columns) float32: `ids`, or from `first` on."""
        block = min(power_of_two(matrix.columns), 256 if matrix.kind in K_QUANTS else 1024)
        rows = 1 if count == 1 else 8
        self.launcher(
            "gather_rows", (-(-count // rows), -(-matrix.columns // block)),
            **matrix.arguments("matrix"), ids=ids, first=first, count=count, columns=matrix.columns, out=out,
            ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See the contract."""
        columns = x.shape[-1]
        self.launcher(
            "rms_norm", (x.numel() // columns if columns else 0,),
            x=x, weight=weight, out=out, columns=columns, eps=float(eps),
            WHOLE=columns <= NORMED, BLOCK=min(power_of_two(columns), NORMED), num_warps=8 if columns > 1024 else 4,
        )  # fmt: skip

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
        """See the contract."""
        columns = x.shape[-1]
        self.launcher(
            "layer_norm", (x.numel() // columns if columns else 0,),
            x=x, weight=weight, bias=bias, out=out, columns=columns, eps=float(eps),
            WHOLE=columns <= NORMED, BLOCK=min(power_of_two(columns), NORMED), num_warps=8 if columns > 1024 else 4,
        )  # fmt: skip

    def add(self, x: Array, y: Array) -> None:
        """See the contract."""
        x.add_(y)

    def linear(
        self,
        x: Array,
        matrices: tuple[Matrix, ...],
        outs: tuple[Array, ...],
        biases: tuple[Array | None, ...] | None = None,
        *,
        add: bool = False,
    ) -> None:
        """See the contract."""
        given = biases if biases is not None else (None,) * len(matrices)
        if len(x) == 1 and len(matrices) == 3 and not add:
            self._matvec_three(x, matrices, outs, given)
            return
        for matrix, out, bias in zip(matrices, outs, given, strict=True):
            if len(x) <= FEW:
                self.matvec(x, matrix, out, bias, add=add)
            else:
                self.matmul(x, matrix, out, bias, add=add)

    def matvec(
        self, x: Tensor, matrix: DeviceMatrix, out: Tensor, bias: Tensor | None = None,
        *, add: bool = False, relu: bool = False,
    ) -> None:  # fmt: skip
        """`linear` for up to FEW tokens and one matrix, straight from its blocks, each of which is read once."""
        if not len(x):
            return
        rows, tokens = self.tuning.rows, len(x)
        shared: dict[str, Any] = {
            "x": x, **matrix.arguments("matrix"), "bias": bias, "out": out, "rows": matrix.rows,
            "columns": matrix.columns, "ROWS": rows, "ADD": add, "RELU": relu, "num_warps": self.tuning.warps,
        }  # fmt: skip
        grid = (-(-matrix.rows // rows),)
        if tokens == 1:
            self.launcher("matvec", grid, **shared, BLOCK=self.tuning.block_of(matrix))
        else:
            block = min(self.tuning.block, self.tuning.block_of(matrix))
            self.launcher("matvec_few", grid, **shared, TOKENS=tokens, BLOCK=block)

    def _matvec_three(
        self, x: Tensor, matrices: tuple[DeviceMatrix, ...], outs: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
    ) -> None:
        """One token and three matrices, such as those of queries, keys and values, in one launch."""
        rows, arguments = self.tuning.rows, dict[str, Any]()
        for name, matrix, out, bias in zip("abc", matrices, outs, biases, strict=True):
            arguments |= matrix.arguments(name) | {
                f"{name}_bias": bias, f"{name}_out": out, f"{name}_rows": matrix.rows,
                f"{name.upper()}_BLOCK": self.tuning.block_of(matrix),
            }  # fmt: skip
        self.launcher(
            "matvec_three", (sum(-(-matrix.rows // rows) for matrix in matrices),),
            x=x, columns=x.shape[1], **arguments, ROWS=rows, num_warps=self.tuning.warps,
        )  # fmt: skip

    def matmul(
        self,
        x: Tensor,
        matrix: DeviceMatrix,
        out: Tensor,
        bias: Tensor | None = None,
        *,
        add: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        """`linear` for many tokens and one matrix, or some `rows` of it: a part at a time is decoded and multiplied."""
        if not add:
            out.zero_()
        if bias is not None:
            out.add_(bias)
        for start, part in self.decoded(matrix, rows):
            with self.precision():
                out[:, start : start + len(part)].addmm_(x, part.T)

    def decoded(self, matrix: DeviceMatrix, rows: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The matrix, or some rows, in float32 by parts: a part's first row, and the part, which the next replaces."""
        total = matrix.rows if rows is None else len(rows)
        step = max(1, min(total, DECODED // max(4 * matrix.columns, 1)))
        for start in range(0, total, step):
            count = min(step, total - start)
            part = self.scratch.take("decoded", (count, matrix.columns))
            self.decode_rows(matrix, None if rows is None else rows[start:], start, count, part)
            yield start, part

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Matrix products in TF32 or float32, whatever the rest of the process uses."""
        backend = torch.backends.cuda.matmul
        before, backend.allow_tf32 = backend.allow_tf32, self.tf32
        try:
            yield
        finally:
            backend.allow_tf32 = before

    def rope(
        self,
        arrays: tuple[Array, ...],
        table: Array,
        positions: npt.NDArray[np.int32] | Tensor,
        *,
        interleaved: bool,
    ) -> None:
        """See the contract; two arrays take one launch."""
        half, there = table.shape[-1], self._there(positions)
        for first, more in zip_longest(arrays[::2], arrays[1::2]):
            tokens, heads, dim = first.shape
            others = 0 if more is None else more.shape[1]
            if half:
                self.launcher(
                    "rope", (tokens, -(-heads // 4) + -(-others // 4)),
                    x=first, more=more, table=table, positions=there, heads=heads, more_heads=others, head_dim=dim,
                    half=half, INTERLEAVED=interleaved, HEADS=4, HALF=power_of_two(half), num_warps=4,
                )  # fmt: skip

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: KVLayer,
        start: int | Tensor,
        scale: float,
        window: int,
        out: Array,
    ) -> None:
        """See the contract. For one token, `start` may be an int32 tensor (1) of the device, which a replay reads anew.

        Keys and values of a head are rows that lie anywhere; their elements are neighbours. A cache in Q8_0 is whole
        arrays, in which numbers and scales lie as `layout.cached` says, and queries meet its keys as they are.
        """
        attending.attention(self, q, k, v, cache, start, float(scale), window, out)

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
        """See the contract. A batch of several tokens is computed whole, and masked to its active neurons."""
        return feedforward.ffn(self, x, block, active, out, skip_zeros=skip_zeros, hidden=hidden)

    def predict(self, x: Array, fc1: Matrix, fc2: Matrix, scores: Array) -> None:
        """See the contract."""
        rank = self.scratch.take("rank", (len(x), fc1.rows))
        if len(x) <= FEW:
            self.matvec(x, fc1, rank, relu=True)
            self.matvec(rank, fc2, scores)
        else:
            self.matmul(x, fc1, rank)
            self.matmul(rank.clamp_(min=0), fc2, scores)

    def select(self, scores: Array, threshold: float, out: Array) -> ActiveSet:
        """See the contract. While `counting`, the set keeps its length on the device."""
        count = self.scratch.take("selected", (1,), torch.int32)
        self.select_into(scores, threshold, out, count)
        return DeviceSet(out, count) if self.counts is not None else ActiveSet(out[: int(count.item())])

    def select_into(self, scores: Tensor, threshold: float, out: Tensor, count: Tensor) -> None:
        """`select` with the length of the set in `count`, int32 (1). One token's scores may be part of a row."""
        if np.isnan(threshold):
            raise ValueError("threshold is not a number")
        with np.errstate(over="ignore"):  # beyond float32 it is infinite
            limit = float(np.float32(threshold))
        tokens, n = scores.shape
        if not n:
            count.zero_()
        block = min(self.tuning.select_block, max(power_of_two(n), 16))
        self.launcher(
            "select", (-(-n // block),),
            scores=scores, threshold=limit, tokens=tokens, n=n, out=out, count=count, SINGLE=tokens == 1, BLOCK=block,
            num_warps=4,
        )  # fmt: skip

    def _there(self, values: npt.NDArray[Any] | Tensor) -> Tensor:
        if isinstance(values, torch.Tensor):
            return values
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _free_before(device: str) -> int:
    """Free bytes of the first GPU before this process has a context on it, by the driver's account; 0 if unknown.

    A context takes hundreds of megabytes, which are part of what a process holds.
    """
    if interpreted() or device not in ("auto", "cuda", "cuda:0") or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    return next((gpu.free for gpu in find_gpus()), 0)
