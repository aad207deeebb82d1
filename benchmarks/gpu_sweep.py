"""Tile sizes of the kernels tried beside one another, so that one run on a new card says which to take.

What comes out is a table: nothing is tuned while a model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from thermocline.ops.contract import NeuronBlock
from thermocline.ops.cuda.layout import DeviceMatrix
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.cuda.tuning import Tuning

Row = dict[str, Any]


def tunings() -> Iterator[tuple[str, Tuning]]:
    """Kernel and tuning, the usual one first; each differs from it in what concerns that kernel."""
    usual = Tuning()
    yield "matrix-vector", usual
    for rows, block, warps in (
        (2, 512, 1), (4, 512, 1), (2, 1024, 1),  # a single warp waits for no other where sums change their layout
        (2, 1024, 4), (4, 2048, 4), (8, 1024, 4), (4, 1024, 2), (8, 1024, 8), (2, 2048, 4),
    ):  # fmt: skip
        yield "matrix-vector", replace(usual, rows=rows, block=block, warps=warps)
    yield "sparse FFN", usual
    for rows, block, ahead, width, warps in (
        (2, 1024, 16, 512, 1), (4, 1024, 16, 512, 4), (4, 2048, 16, 512, 4), (1, 4096, 16, 512, 4),
        (2, 2048, 8, 512, 4), (2, 2048, 16, 1024, 4), (2, 2048, 24, 256, 4),
    ):  # fmt: skip
        tuning = replace(usual, neuron_rows=rows, neuron_block=block, ahead=ahead, record_block=width, warps=warps)
        yield "sparse FFN", tuning


def sweep(
    ops: CudaOps,
    matrices: list[DeviceMatrix],
    blocks: list[NeuronBlock],
    active: Any,
    seconds: Callable[[Callable[[], Any]], float],
    spare: Callable[[], bool],
) -> list[Row]:
    """Microseconds of each kernel a call by tuning, while `spare` says that there is time.

    `matrices` and `blocks` are more than the device's caches hold; `active` is the set of every block.
    """
    columns, rows = matrices[0].columns, matrices[0].rows
    x, out, y, counts = ops.array((1, columns)), ops.array((1, rows)), ops.array((1, columns)), ops.array((4,), "int64")
    x.normal_()

    def dense() -> None:
        for matrix in matrices:
            ops.matvec(x, matrix, out)

    def sparse() -> None:
        with ops.counting(counts):
            for block in blocks:
                ops.ffn(x, block, active, y, skip_zeros=True)

    found, usual = [], ops.tuning
    try:
        for kernel, tuning in tunings():
            if not spare():
                break
            ops.tuning = tuning
            call, times = (dense, len(matrices)) if kernel == "matrix-vector" else (sparse, len(blocks))
            found.append({
                "kernel": kernel, "format": matrices[0].format.name, "tuning": _shown(kernel, tuning),
                "µs": round(seconds(call) / times * 1e6, 2),
            })  # fmt: skip
    finally:
        ops.tuning = usual
    return found


def _shown(kernel: str, t: Tuning) -> str:
    if kernel == "matrix-vector":
        return f"rows {t.rows}, block {t.block}, warps {t.warps}"
    return f"rows {t.neuron_rows}, block {t.neuron_block}, ahead {t.ahead}, columns {t.record_block}, warps {t.warps}"
