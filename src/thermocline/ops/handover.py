"""The CPU's part handed over in the middle of a device's step, to a native thread that needs no Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline import _native
from thermocline.errors import HardwareError
from thermocline.ops.contract import FfnWork, NeuronBlock
from thermocline.ops.cpu import ACTIVATIONS, CpuOps
from thermocline.ops.tape import TapeOps

WORDS = 64
"""int32 words of a mailbox's flags: `ready` is the first, `done` the middle one, each on cache lines of its own."""
DONE = WORDS // 2
PATIENCE = 10.0
"""Seconds that a crossing may take before the request ends with an error."""


class Fault(IntEnum):
    """What a test makes the worker do."""

    NONE = 0
    DIE = 1
    FAIL = 2
    STALL = 3


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Memory of the host that both sides see: pinned, where the device is one.

    `words` int32 (WORDS); `x` and `partial` float32 (n_embd); `active` int32 (neurons), `count` int32 (1). A device
    writes x, and for listed layers `active` and `count`, then the layer's number to `ready`; it waits until `done` is
    that number, sets it to 0 and adds `partial`.
    """

    words: npt.NDArray[np.int32]
    x: npt.NDArray[np.float32]
    partial: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]

    @classmethod
    def of(cls, array: Callable[[tuple[int, ...], str], Any], columns: int, neurons: int) -> Mailbox:
        """A mailbox whose arrays `array` makes, as numpy arrays."""
        return cls(
            array((WORDS,), "int32"),
            array((columns,), "float32"),
            array((columns,), "float32"),
            array((max(neurons, 1),), "int32"),
            array((1,), "int32"),
        )


class Simulated(NamedTuple):
    """What a simulated device saw: answered crossings, answers that differed from the first, seconds in all."""

    crossings: int
    different: int
    seconds: float


class ColdWorker:
    """A thread that computes what is handed over, with the threads of `ops`, which nobody else uses meanwhile.

    Layers and tapes are numbered from 1 in the order in which they were added; 0 is nobody's.
    """

    def __init__(self, ops: CpuOps, mailbox: Mailbox, patience: float = PATIENCE) -> None:
        self.mailbox = mailbox
        self.patience = patience
        box = mailbox
        self._native = _native.HandOver(
            ops.context, box.words, box.x, box.partial, box.active, box.count, float(patience)
        )

    def add(self, block: NeuronBlock, *, skip_zeros: bool, listed: bool) -> int:
        """The number of a layer's cold neurons; `listed`: only those in the mailbox's list."""
        kind = block.kind
        index: int = self._native.add_layer(
            block.gate,
            block.up,
            block.down,
            block.records,
            ACTIVATIONS[kind.activation],
            kind.both,
            kind.threshold,
            block.up_bias,
            block.rows,
            skip_zeros,
            listed,
        )
        return index + 1

    def add_tape(self, tape: TapeOps) -> int:
        """The number of what is written on `tape`, which is complete."""
        index: int = self._native.add_tape(tape.native)
        return index + 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, the worker answers. A worker that died is replaced at the start.

        Raises:
            HardwareError: it is still busy with what an earlier request gave up, or this step's answer was none.
        """
        if not self._native.begin():
            raise HardwareError(
                f"the CPU is still computing neurons that a request gave up on {self.patience:g} s ago; "
                "close other programs, or give the model fewer cold neurons"
            )
        try:
            yield
        finally:
            failure = self._native.end()
        if failure is not None:
            raise HardwareError(f"{failure}; the request was ended, the next one may succeed")

    def post(self, number: int) -> None:
        """Hand a layer over, as a device does."""
        self._native.post(number)

    def wait(self, number: int) -> bool:
        """Wait for its sum, as a device does; False where none came within `patience`."""
        answered: bool = self._native.wait(number)
        return answered

    def release(self, reason: str) -> bool:
        """Answer what is open for a device that waits for ever; the step fails. True if anything was open."""
        released: bool = self._native.release(reason)
        return released

    def take_work(self) -> FfnWork:
        """The work since the last call."""
        return FfnWork(*self._native.take_work())

    def callbacks(self, number: int) -> tuple[int, int, int]:
        """Addresses of C functions void (*)(void *) that post and wait, and of the argument for this layer."""
        post, wait = _native.handover_functions()
        return post, wait, self._native.argument(number)

    def simulate(self, layers: int, crossings: int) -> Simulated:
        """Play the device from this thread, over the first `layers` layers in turn; see `Simulated`."""
        return Simulated(*self._native.simulate(layers, crossings))

    def cancel(self) -> None:
        """End a simulation that runs in another thread."""
        self._native.cancel()

    def inject(self, fault: Fault, crossing: int, seconds: float = 0.0) -> None:
        """For tests: misbehave at the n-th crossing from now."""
        self._native.inject(int(fault), crossing, seconds)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        alive: bool = self._native.alive
        return alive

    @property
    def crossings(self) -> int:
        """How many it has taken since it was made."""
        crossings: int = self._native.crossings
        return crossings
