"""Rotary position embedding: frequencies, their scaling kinds, and the table of cosines and sines.

The formulas are those of `transformers.modeling_rope_utils`, so that logits agree with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float64]


class RopeScaling(Protocol):
    """How a model stretches its rotations over a longer context than it was trained on."""

    @property
    def attention_factor(self) -> float:
        """Multiplies cosines and sines."""

    def scale(self, frequencies: Frequencies, rope: RopeSpec) -> Frequencies:
        """The angles per position, from the unscaled ones (rotary_dim / 2)."""

    def fault(self) -> str | None:
        """What is wrong with the numbers, None if nothing."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float
    attention_factor: float = 1.0

    def scale(self, frequencies: Frequencies, rope: RopeSpec) -> Frequencies:
        """See the protocol."""
        return frequencies / self.factor

    def fault(self) -> str | None:
        """See the protocol."""
        return _not_positive(factor=self.factor)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: slow rotations are divided by `factor`, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_ctx: int
    attention_factor: float = 1.0

    def scale(self, frequencies: Frequencies, rope: RopeSpec) -> Frequencies:
        """See the protocol."""
        turns = self.original_ctx * frequencies / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    def fault(self) -> str | None:
        """See the protocol."""
        if self.high_freq_factor <= self.low_freq_factor:
            return f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}"
        return _not_positive(
            factor=self.factor, low_freq_factor=self.low_freq_factor, original_context=self.original_ctx
        )


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): a ramp over dimensions from kept to divided frequencies, and a louder attention."""

    factor: float
    original_ctx: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, frequencies: Frequencies, rope: RopeSpec) -> Frequencies:
        """See the protocol."""
        low, high = self._dimension(self.beta_fast, rope), self._dimension(self.beta_slow, rope)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        width = high - low or 0.001
        divided = np.clip((np.arange(rope.rotary_dim // 2) - low) / width, 0, 1)
        scaled: Frequencies = frequencies * (1 - divided + divided / self.factor)
        return scaled

    def fault(self) -> str | None:
        """See the protocol."""
        return _not_positive(
            factor=self.factor,
            original_context=self.original_ctx,
            attention_factor=self.attention_factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )

    def _dimension(self, turns: float, rope: RopeSpec) -> float:
        """The dimension whose pair turns that often within the original context."""
        return rope.rotary_dim * math.log(self.original_ctx / (turns * 2 * math.pi)) / (2 * math.log(rope.base))


def rope_table_bytes(rope: RopeSpec, n_ctx: int) -> int:
    """Bytes of `rope_table`."""
    return 4 * n_ctx * rope.rotary_dim


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's own choice of attention factor."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Which elements of a head rotate, and how fast.

    `interleaved` pairs neighbours (2i, 2i+1), otherwise halves (i, i + rotary_dim/2). `factors`, if given,
    divide the frequencies one by one (GGUF's `rope_freqs.weight`).
    """

    rotary_dim: int
    base: float
    interleaved: bool
    scaling: RopeScaling | None = None
    factors: tuple[float, ...] | None = None

    def angles(self) -> Frequencies:
        """Angle per position of each pair, in radians: (rotary_dim / 2)."""
        plain = self.base ** (-np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim)
        if self.factors is not None:
            plain /= np.asarray(self.factors, dtype=np.float64)
        return plain if self.scaling is None else self.scaling.scale(plain, self)


def rope_table(rope: RopeSpec, n_ctx: int) -> npt.NDArray[np.float32]:
    """Cosines and sines for `Ops.rope`: (n_ctx, 2, rotary_dim / 2) float32.

    Angles are products of float32, as in the frameworks that models are trained with: at far positions the
    rounding is part of what the model has learnt.
    """
    angles = np.arange(n_ctx, dtype=np.float32)[:, None] * rope.angles().astype(np.float32)
    table = np.empty((n_ctx, 2, rope.rotary_dim // 2), dtype=np.float32)
    np.cos(angles, out=table[:, 0])
    np.sin(angles, out=table[:, 1])
    if rope.scaling is not None and rope.scaling.attention_factor != 1:
        table *= np.float32(rope.scaling.attention_factor)
    return table


def _not_positive(**numbers: float) -> str | None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            return f"{name} is {value}; allowed: finite numbers above 0"
    return None
