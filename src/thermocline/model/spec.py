"""What a network is: its sizes and settings, checked once, then trusted everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thermocline.errors import ModelFormatError
from thermocline.model.rope import RopeSpec
from thermocline.ops.contract import FfnKind

BOUNDS: dict[str, tuple[int, int]] = {
    "n_layer": (1, 512),
    "n_embd": (1, 1 << 17),
    "n_head": (1, 1 << 12),
    "n_head_kv": (1, 1 << 12),
    "head_dim": (2, 1 << 12),
    "n_ff": (1, 1 << 20),
    "n_vocab": (1, 1 << 22),
    "n_ctx_train": (1, 1 << 24),
}
"""Smallest and largest value of each size; larger ones come from broken or hostile files."""

EPS_BOUNDS = (1e-12, 1e-2)
THRESHOLD_BOUNDS = (0.0, 1e6)
BASE_BOUNDS = (1.0001, 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes and settings of a decoder-only transformer.

    `windows` gives every layer's sliding window in tokens, 0 for none. `name` is what messages call the
    model.

    Positions are known by rotation (`rope`), or, if `position_offset` is given, learned: position p has row p plus this
    of a table. `layer_norm` means LayerNorm with biases instead of RMSNorm. With `parallel`, attention and FFN both
    read the layer's input; with `shared_norm` besides, they read one norm of it.

    Raises:
        ModelFormatError: a value is out of its bounds or contradicts another.
    """

    family: str
    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    norm_eps: float
    rope: RopeSpec | None
    ffn: FfnKind
    windows: tuple[int, ...]
    tied_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    layer_norm: bool = False
    ffn_bias: bool = False
    position_offset: int | None = None
    parallel: bool = False
    shared_norm: bool = False

    def __post_init__(self) -> None:
        for field, (low, high) in BOUNDS.items():
            self._check_range(field, getattr(self, field), low, high)
        self._check(
            self.n_head % self.n_head_kv == 0, "n_head_kv", self.n_head_kv, f"a divisor of n_head ({self.n_head})"
        )
        self._check_range("norm_eps", self.norm_eps, *EPS_BOUNDS)
        self._check_range("activation threshold", self.ffn.threshold, *THRESHOLD_BOUNDS)
        self._check(len(self.windows) == self.n_layer, "windows", len(self.windows), f"one a layer ({self.n_layer})")
        for window in self.windows:
            self._check_range("sliding window", window, 0, BOUNDS["n_ctx_train"][1])
        self._check_rope()

    @property
    def n_q(self) -> int:
        """Width of all query heads."""
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.n_head_kv * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        norm = self.n_embd * (2 if self.layer_norm else 1)
        norms = norm * (1 if self.shared_norm else 2) + (2 * self.head_dim if self.qk_norm else 0)
        biases = (self.n_q + 2 * self.n_kv if self.qkv_bias else 0) + (self.n_embd if self.out_bias else 0)
        biases += self.n_ff + self.n_embd if self.ffn_bias else 0
        attention = self.n_embd * (2 * self.n_q + 2 * self.n_kv)
        layer = attention + self.ffn_parameters + norms + biases
        tables = self.n_positions + self.n_vocab * (1 if self.tied_embeddings else 2)
        return self.n_layer * layer + norm + self.n_embd * tables

    @property
    def n_positions(self) -> int:
        """Rows of the table of learned positions, 0 if there is none."""
        return 0 if self.position_offset is None else self.n_ctx_train + self.position_offset

    @property
    def ffn_parameters(self) -> int:
        """Number of weights of one layer's FFN."""
        return (3 if self.ffn.gated else 2) * self.n_ff * self.n_embd

    @property
    def attention_scale(self) -> float:
        """Multiplies the dot products of queries and keys."""
        return 1 / math.sqrt(self.head_dim)

    def _check_rope(self) -> None:
        rope = self.rope
        if rope is None:
            return
        even = rope.rotary_dim % 2 == 0 and 2 <= rope.rotary_dim <= self.head_dim
        self._check(even, "rope dimensions", rope.rotary_dim, f"an even number from 2 to head_dim ({self.head_dim})")
        self._check_range("rope base", rope.base, *BASE_BOUNDS)
        fault = None if rope.scaling is None else rope.scaling.fault()
        if fault is not None:
            raise ModelFormatError(self.name, "rope scaling", fault)
        if rope.factors is not None:
            fine = len(rope.factors) == rope.rotary_dim // 2 and all(0 < f < math.inf for f in rope.factors)
            self._check(fine, "rope factors", rope.factors[:4], f"{rope.rotary_dim // 2} finite positive numbers")

    def _check_range(self, field: str, value: float, low: float, high: float) -> None:
        self._check(low <= value <= high, field, value, f"{low} to {high}")

    def _check(self, ok: bool, field: str, value: object, allowed: str) -> None:
        if not ok:
            raise ModelFormatError(self.name, field, f"is {value}; allowed: {allowed}")
