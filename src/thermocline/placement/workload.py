"""What the machine will be asked to do: the case that a plan is made for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thermocline.errors import UsageError
from thermocline.placement.budget import MIB

FLAGS = {
    "context": "--ctx-size", "prompt": "--prompt-tokens", "output": "--output-tokens", "batch": "--parallel",
    "ubatch": "--ubatch-size", "first_token_ms": "--latency-target",
}  # fmt: skip
"""What a person calls a workload's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sequences of `prompt` tokens read and `output` tokens written, `batch` of them at a time.

    `context` is the tokens that each cache has room for. Predicted times hold in the middle of the answer: at
    prompt + output / 2 tokens. `ubatch` is the most prompt tokens of one pass. With `first_token_ms` the solver
    weighs the prompt heavier until its time meets the target, as far as it can.

    Raises:
        UsageError: a number is out of its range, or prompt and output do not fit the context.
    """

    context: int = 4096
    prompt: int = 256
    output: int = 256
    batch: int = 1
    ubatch: int = 512
    first_token_ms: float | None = None

    def __post_init__(self) -> None:
        ranges = {"context": (1, 1 << 24), "prompt": (0, 1 << 24), "output": (1, 1 << 24), "batch": (1, 1024)}
        for name, (low, high) in (ranges | {"ubatch": (1, 1 << 16)}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UsageError(f"{FLAGS[name]} is {value!r}; allowed: {low} to {high}")
        if self.prompt + self.output > self.context:
            raise UsageError(
                f"{FLAGS['prompt']} {self.prompt} and {FLAGS['output']} {self.output} do not fit a context of "
                f"{self.context} tokens; use {FLAGS['context']} {self.prompt + self.output} or more"
            )
        target = self.first_token_ms
        if target is not None and not (math.isfinite(target) and target > 0):
            raise UsageError(f"{FLAGS['first_token_ms']} is {target}; allowed: a positive number of milliseconds")

    @property
    def position(self) -> int:
        """Tokens in the cache when half of the answer is written."""
        return self.prompt + self.output // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Bytes that a side needs besides weights, cache and activations; the other engines' out-of-memory errors.

    `staging` is the pinned double buffer that loading and prefill stream through, on each side. `reading` is what a
    machine with a disk tier has of it in RAM at least: buffers that reads pass through, and slots for what they bring.
    `graphs` is
    what captured graphs and the workspaces of matrix products keep in VRAM. The margins are for what nobody
    counts: fragments of the allocator and the driver in VRAM, the interpreter in RAM. A device that `unpacks`
    has the GPU's kernels, whose scratch is that of `ops.cuda.sizes`.
    """

    staging: int = 64 * MIB
    reading: int = 32 * MIB
    graphs: int = 64 * MIB
    margin_vram: int = 256 * MIB
    margin_ram: int = 256 * MIB
    unpacks: bool = True

    def __post_init__(self) -> None:
        for name in ("staging", "reading", "graphs", "margin_vram", "margin_ram"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(f"{name} is {value!r} bytes; allowed: whole numbers >= 0")


NO_OVERHEADS = Overheads(staging=0, reading=0, graphs=0, margin_vram=0, margin_ram=0)
"""For arithmetic in tests."""

EMULATED = Overheads(staging=0, graphs=0, margin_vram=0, unpacks=False)
"""For a device that is emulated in RAM: it has no driver, and computes with the host's kernels."""
