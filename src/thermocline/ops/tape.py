"""The CPU's ops written down, to be played again without Python between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline import _native
from thermocline.errors import UsageError
from thermocline.ops.contract import ActiveSet, Array, FfnWork, KVLayer, Matrix, NeuronBlock
from thermocline.ops.cpu import ACTIVATIONS, CpuOps

NOTHING = FfnWork(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class TapeSet(ActiveSet):
    """An active set whose length is known when the tape plays: `indices` is the whole array, `count` int32 (1)."""

    count: npt.NDArray[np.int32] | None = None


class TapeOps(CpuOps):
    """`CpuOps` that compute nothing: what they are called for is kept, and computed whenever the tape is played.

    Arrays are the same at every call, with what they hold then; `start` of attention is an int32 array (1).
    """

    def __init__(self, ops: CpuOps) -> None:
        """Write down for `ops`, in whose threads the tape will be played."""
        self.native = _native.Tape()
        self._context: Any = self.native
        self._player = ops.context
        self.name, self.threads = ops.name, ops.threads

    def play(self) -> FfnWork:
        """Compute everything; the work of all FFNs."""
        return FfnWork(*self.native.play(self._player))

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32], out: Array) -> None:
        """Not on a tape: tokens are looked up by whoever plays it.

        Raises:
            UsageError: always.
        """
        raise UsageError("a tape has no embeddings; look the tokens up before it plays")

    def linear(
        self,
        x: Array,
        matrices: tuple[Matrix, ...],
        outs: tuple[Array, ...],
        biases: tuple[Array | None, ...] | None = None,
        *,
        add: bool = False,
    ) -> None:
        """See the contract.

        Raises:
            UsageError: a matrix is read anew for every pass.
        """
        if not all(isinstance(matrix, _native.Matrix) for matrix in matrices):
            raise UsageError("a tape takes matrices that are in memory")
        self.native.linear(x, matrices, outs, biases, add)

    def add(self, x: Array, y: Array) -> None:
        """See the contract."""
        self.native.add(x, y)

    def copy(self, source: Array, out: Array) -> None:
        """Copy an array of as many float32."""
        self.native.copy(source, out)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: KVLayer,
        start: Any,
        scale: float,
        window: int,
        out: Array,
    ) -> None:
        """See the contract."""
        self.native.attention(q, k, v, cache.keys, cache.values, start, scale, window, out)

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
        """See the contract; the work is told by `play`.

        Raises:
            UsageError: the neurons may change their places, or their activations are asked for.
        """
        if block.rows is not None or hidden is not None:
            raise UsageError("a tape takes neurons that stay where they are, and keeps no activations")
        kind = block.kind
        count = active.count if isinstance(active, TapeSet) else None
        if active.indices is not None and count is None:
            raise UsageError("a tape takes active sets that it selects itself")
        self.native.ffn(
            x,
            block.gate,
            block.up,
            block.down,
            block.records,
            ACTIVATIONS[kind.activation],
            kind.both,
            kind.threshold,
            block.up_bias,
            active.indices,
            count,
            out,
            skip_zeros,
        )
        return NOTHING

    def select(self, scores: Array, threshold: float, out: Array) -> ActiveSet:
        """See the contract."""
        count = np.zeros(1, np.int32)
        self.select_into(scores, threshold, out, count)
        return TapeSet(out, count)

    def select_into(self, scores: Array, threshold: float, out: Array, count: npt.NDArray[np.int32]) -> None:
        """`select` with the length of the set in `count`, int32 (1)."""
        self.native.select(scores, threshold, out, count)
