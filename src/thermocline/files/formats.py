"""Block formats as data: how ggml packs numbers, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A packing of `block` neighbouring elements of a row into `block_bytes` bytes.

    `ggml_type` is the number that GGUF files store (source: the GGUF specification of ggml), or -1.
    """

    name: str
    ggml_type: int
    block: int
    block_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements; `columns` must be a multiple of `block`."""
        return columns // self.block * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one element, scales included."""
        return self.block_bytes * 8 / self.block


F32 = BlockFormat("F32", 0, 1, 4)
F16 = BlockFormat("F16", 1, 1, 2)
Q4_0 = BlockFormat("Q4_0", 2, 32, 18)
Q8_0 = BlockFormat("Q8_0", 8, 32, 34)
BF16 = BlockFormat("BF16", 30, 1, 2)
Q4_K = BlockFormat("Q4_K", 12, 256, 144)
Q5_K = BlockFormat("Q5_K", 13, 256, 176)
Q6_K = BlockFormat("Q6_K", 14, 256, 210)
Q5_0 = BlockFormat("Q5_0", 6, 32, 22)
"""Only read, in PowerInfer's predictors, where `quantize.widened` makes it Q8_0 without loss."""

FORMATS: dict[int, BlockFormat] = {f.ggml_type: f for f in (F32, F16, Q4_0, Q8_0, BF16, Q4_K, Q5_K, Q6_K)}
"""The formats that can be computed with."""

BY_NAME: dict[str, BlockFormat] = {f.name: f for f in FORMATS.values()}

_ONLY_LISTED = (
    BlockFormat("Q4_1", 3, 32, 20),
    Q5_0,
    BlockFormat("Q5_1", 7, 32, 24),
    BlockFormat("Q8_1", 9, 32, 40),
    BlockFormat("Q2_K", 10, 256, 84),
    BlockFormat("Q3_K", 11, 256, 110),
    BlockFormat("Q8_K", 15, 256, 292),
    BlockFormat("IQ2_XXS", 16, 256, 66),
    BlockFormat("IQ2_XS", 17, 256, 74),
    BlockFormat("IQ3_XXS", 18, 256, 98),
    BlockFormat("IQ1_S", 19, 256, 50),
    BlockFormat("IQ4_NL", 20, 32, 18),
    BlockFormat("IQ3_S", 21, 256, 110),
    BlockFormat("IQ2_S", 22, 256, 82),
    BlockFormat("IQ4_XS", 23, 256, 136),
    BlockFormat("I8", 24, 1, 1),
    BlockFormat("I16", 25, 1, 2),
    BlockFormat("I32", 26, 1, 4),
    BlockFormat("I64", 27, 1, 8),
    BlockFormat("F64", 28, 1, 8),
    BlockFormat("IQ1_M", 29, 256, 56),
    BlockFormat("TQ1_0", 34, 256, 54),
    BlockFormat("TQ2_0", 35, 256, 66),
    BlockFormat("MXFP4", 39, 32, 17),
    BlockFormat("NVFP4", 40, 64, 36),
    BlockFormat("Q1_0", 41, 128, 18),
)

GGML_TYPES: dict[int, BlockFormat] = FORMATS | {f.ggml_type: f for f in _ONLY_LISTED}
"""Every type of ggml, so that a file can be checked and listed even where it cannot be run."""


def require_readable(fmt: BlockFormat, tensor: str) -> None:
    """Refuse a format that can only be listed.

    Raises:
        UnsupportedModelError: `fmt` is not among `FORMATS`; the message names those that are.
    """
    if BY_NAME.get(fmt.name) is not fmt:
        raise UnsupportedModelError(
            f"tensor {tensor} is stored as {fmt.name}; readable are {', '.join(BY_NAME)}: "
            "convert the model to one of them"
        )
