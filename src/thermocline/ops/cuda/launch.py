"""How a kernel is started, and how the calls are written down where nothing can run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from thermocline.ops.cuda.kernels import KERNELS

OPTIONS: Final = ("num_warps", "num_stages", "enable_fp_fusion")
"""Names of arguments that are for the compiler."""


class Launcher(Protocol):
    """Starts kernels."""

    def __call__(self, name: str, grid: tuple[int, ...], **arguments: Any) -> None:
        """Start the kernel of that name; a grid with a 0 does nothing."""


def launch(name: str, grid: tuple[int, ...], **arguments: Any) -> None:
    """Start the kernel `name` on the current stream."""
    if 0 not in grid:
        KERNELS[name][grid](**arguments)


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel: types of its arguments, its constants, those divisible by 16, and options."""

    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(slots=True)
class Recorder:
    """A launcher that starts nothing and keeps what would have been compiled.

    With tensors of torch's `meta` device, which have no memory, a model of any size can be stepped through.
    """

    variants: dict[Variant, None] = field(default_factory=dict)

    def __call__(self, name: str, grid: tuple[int, ...], **arguments: Any) -> None:
        """Keep the variant."""
        if 0 not in grid:
            self.variants[variant_of(name, arguments)] = None


def variant_of(name: str, arguments: dict[str, Any]) -> Variant:
    """What Triton compiles for these arguments: it makes 1 and None constants, and marks multiples of 16.

    Counts that vary (see `kernels.registry`) are neither.
    """
    kernel = KERNELS[name]
    constant = {kernel.arg_names[i] for i in kernel.constexprs}
    varying = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, constants, aligned = [], [], []
    for key in kernel.arg_names:
        value = arguments[key]
        kind = "constexpr" if key in constant or value is None or value is True else _type_of(value)
        if kind == "i32" and value == 1 and key not in varying:
            kind = "constexpr"
        if kind == "constexpr":
            constants.append((key, value))
        elif isinstance(value, torch.Tensor) or (kind[0] == "i" and value % 16 == 0 and key not in varying):
            aligned.append(key)
        signature.append((key, kind))
    options = tuple(sorted((k, v) for k, v in arguments.items() if k in OPTIONS))
    return Variant(name, tuple(signature), tuple(constants), tuple(aligned), options)


_POINTERS: Final = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
