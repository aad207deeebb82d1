"""How the kernels cut their work. All are powers of two; results depend on none of it beyond the last bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from thermocline.ops.cuda.layout import DeviceMatrix, Kind
from thermocline.ops.cuda.sizes import MOST_GROUPS, PART

K_QUANTS: Final = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Tile sizes. The defaults keep 16 to 32 KiB a multiprocessor on their way, which hides the latency of device
    memory at 3 TB/s (Little's law), with several programs for each of 100 to 150 multiprocessors at n_embd 4096.
    """

    rows: int = 4
    """Matrix rows of a program in matrix-vector products."""
    block: int = 1024
    """Elements of each of these rows that a program loads at a time."""
    k_block: int = 512
    """The same for K-quants, whose decoding takes many registers."""
    record_block: int = 512
    """Columns of a program that adds down rows."""
    ahead: int = 8
    """Down rows on their way at once."""
    most_groups: int = MOST_GROUPS
    """Groups that the positions of an FFN are dealt to, at most; one for each `group_size` neurons at least."""
    group_size: int = 64
    part: int = PART
    """Positions of a program of attention."""
    attention_tile: int = 8192
    """Products of a query, a key and a head that a program of attention holds at once."""
    select_block: int = 1024
    """Scores that a program lists."""

    def block_of(self, matrix: DeviceMatrix) -> int:
        """Elements of a row that a program loads at a time: no more than the row has, and whole blocks."""
        return _fitting(min(self.block, self.k_block) if matrix.kind in K_QUANTS else self.block, matrix)

    def record_block_of(self, matrix: DeviceMatrix) -> int:
        """Columns of a program that adds down rows."""
        return _fitting(min(self.record_block, 256) if matrix.kind in K_QUANTS else self.record_block, matrix)

    def ahead_of(self, matrix: DeviceMatrix) -> int:
        """Down rows on their way at once."""
        return max(1, self.ahead // 4) if matrix.kind in K_QUANTS else self.ahead

    def groups(self, neurons: int) -> int:
        """Into how many groups a block's positions are dealt; it depends on nothing else."""
        return min(self.most_groups, power_of_two(max(neurons // self.group_size, 1)))


FEWER_PROGRAMS = Tuning(rows=64, ahead=4, most_groups=2)
"""For the interpreter, where a program costs milliseconds whatever it computes."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _fitting(elements: int, matrix: DeviceMatrix) -> int:
    """`elements` of two bytes, or as many more as a row's bytes hold."""
    widest = elements * (2 if matrix.kind in (Kind.Q8_0, Kind.Q4_0) else 1)
    return min(widest, max(power_of_two(matrix.columns), 32))
