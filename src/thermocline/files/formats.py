"""Block formats as data: how ggml packs numbers, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A packing of `block` neighbouring elements of a row into `block_bytes` bytes.

    `ggml_type` is the number that GGUF files store (source: the GGUF specification of ggml).
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

FORMATS: dict[int, BlockFormat] = {f.ggml_type: f for f in (F32, F16, Q4_0, Q8_0, BF16)}
BY_NAME: dict[str, BlockFormat] = {f.name: f for f in FORMATS.values()}

KNOWN_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def format_of(ggml_type: int, tensor: str) -> BlockFormat:
    """The format with that number.

    Raises:
        UnsupportedModelError: the number is known to ggml but not implemented here, or to neither.
    """
    if ggml_type in FORMATS:
        return FORMATS[ggml_type]
    name = KNOWN_TYPES.get(ggml_type, f"number {ggml_type}")
    raise UnsupportedModelError(
        f"tensor {tensor} is stored as {name}; readable are {', '.join(BY_NAME)}: re-quantize the model to one of them"
    )
