"""How the kernels cut their work. All are powers of two; results depend on none of it beyond the last bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from thermocline.ops.cuda.layout import DeviceMatrix, Kind
from thermocline.ops.cuda.sizes import MOST_GROUPS

K_QUANTS: Final = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Tile sizes. The defaults keep 32 KiB or more a multiprocessor on their way, which hides the latency of device
    memory at 3 to 5 TB/s (Little's law), with several programs for each of 100 to 150 multiprocessors at n_embd 4096.
    Every thread of a tile loads 16 bytes at a time.
    """

    rows: int = 4
    """Matrix rows of a program in matrix-vector products."""
    block: int = 1024
    """Elements of each of these rows that a program loads at a time."""
    k_block: int = 1024
    """The same for K-quants, whose decoding takes more registers."""
    neuron_rows: int = 2
    """Neurons of a program that computes gates and ups: more programs of fewer rows, for active lists are short."""
    neuron_block: int = 2048
    """`block` for these: longer pieces, so that the few rows that there are keep the memory busy."""
    warps: int = 4
    """Warps of a program of these products."""
    record_block: int = 512
    """Columns of a program that adds down rows."""
    ahead: int = 16
    """Down rows on their way at once: of the 12 % that fire of 11,008 neurons a group has some twenty."""
    most_groups: int = MOST_GROUPS
    """Groups that the positions of an FFN are dealt to, at most; one for each `group_size` neurons at least."""
    group_size: int = 64
    attention_tile: int = 8192
    """Products of a query, a key and a head that a program of attention holds at once."""
    select_block: int = 1024
    """Scores that a program lists."""

    def block_of(self, matrix: DeviceMatrix) -> int:
        """Elements of a row that a program loads at a time: no more than the row has, and whole blocks."""
        return _fitting(min(self.block, self.k_block) if matrix.kind in K_QUANTS else self.block, matrix)

    def neuron_block_of(self, matrix: DeviceMatrix) -> int:
        """The same in the products of neurons' gates and ups, where Q8_0 would take more registers than there are."""
        most = self.k_block if matrix.kind in K_QUANTS else self.neuron_block // (1 + (matrix.kind is Kind.Q8_0))
        return _fitting(min(self.neuron_block, most), matrix)

    def record_block_of(self, matrix: DeviceMatrix) -> int:
        """Columns of a program that adds down rows."""
        return _fitting(min(self.record_block, 256) if matrix.kind in K_QUANTS else self.record_block, matrix)

    def record_warps_of(self, matrix: DeviceMatrix) -> int:
        """Warps of a program that adds down rows: of each row a thread takes 16 bytes, if there are so many."""
        nbytes = self.record_block_of(matrix) * matrix.format.block_bytes // matrix.format.block
        return min(4, max(1, nbytes // 512))

    def ahead_of(self, matrix: DeviceMatrix) -> int:
        """Down rows on their way at once."""
        return max(1, self.ahead // 4) if matrix.kind in K_QUANTS else self.ahead

    def groups(self, neurons: int) -> int:
        """Into how many groups a block's positions are dealt; it depends on nothing else."""
        return min(self.most_groups, power_of_two(max(neurons // self.group_size, 1)))


FEWER_PROGRAMS = Tuning(rows=64, neuron_rows=64, ahead=4, most_groups=2)
"""For the interpreter, where a program costs milliseconds whatever it computes."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _fitting(elements: int, matrix: DeviceMatrix) -> int:
    """`elements` of two bytes, or as many more as a row's bytes hold."""
    widest = elements * (2 if matrix.kind in (Kind.Q8_0, Kind.Q4_0) else 1)
    return min(widest, max(power_of_two(matrix.columns), 32))
