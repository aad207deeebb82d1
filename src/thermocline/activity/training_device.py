"""Where torch computes while predictors are trained: a GPU that it can use, else the CPU. Only `fitting` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import torch

from thermocline.config import TrainDevice
from thermocline.errors import HardwareError, printable

T = TypeVar("T")

CPU: Final = "cpu"
GPU: Final = "cuda"


class TrainingDevice:
    """A device of torch by `name`. Where nobody insisted on a GPU, the CPU takes over once the GPU lacks the memory.

    `tell` hears which it is, and of a change. One of them serves all layers of a run.

    Raises:
        HardwareError: a GPU was asked for and there is none that torch can use.
    """

    def __init__(self, wanted: TrainDevice, tell: Callable[[str], None] | None = None) -> None:
        self._wanted, self._tell = wanted, tell
        why = None if wanted is TrainDevice.CPU else _unusable()
        if wanted is TrainDevice.CUDA and why is not None:
            raise HardwareError(f"{why}; use --train-on cpu")
        self.name = CPU if wanted is TrainDevice.CPU or why is not None else GPU
        if self.name == GPU:
            self._say(f"predictors are trained on {torch.cuda.get_device_name(0)}; --train-on cpu takes the CPU")

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns; it is called once more, on the CPU, if the GPU has not the memory for it.

        Raises:
            HardwareError: the memory does not do, and there is no other.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            if self._wanted is not TrainDevice.AUTO or self.name == CPU:
                raise _too_small(error, "the GPU", "--train-on cpu, or ") from error
            why = _first_line(error)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise _too_small(error, "RAM") from error
        # Here the error is gone, and with it what its frames held of the GPU's memory.
        self.name = CPU
        self._say(f"the GPU has not the memory to train this model's predictors ({why}): the CPU goes on")
        return work()

    def _say(self, line: str) -> None:
        if self._tell is not None:
            self._tell(line)


def _unusable() -> str | None:
    """Why torch cannot use a GPU; None if it can: not every GPU that it finds runs its kernels."""
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use"
    try:
        ones = torch.ones(8, 8, device=GPU)
        float((ones @ ones).sum())
    except RuntimeError as error:
        return f"torch cannot compute on the GPU ({_first_line(error)})"
    return None


def _too_small(error: BaseException, memory: str, other: str = "") -> HardwareError:
    return HardwareError(
        f"{memory} has not the memory to train this model's predictors ({_first_line(error)}): use {other}a smaller "
        "--batch or --rank"
    )


def _first_line(error: BaseException) -> str:
    return printable(str(error).strip().partition("\n")[0], 160)
