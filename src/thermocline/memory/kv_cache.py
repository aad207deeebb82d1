"""The KV cache of one sequence, and its size before it is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thermocline.config import CacheType
from thermocline.errors import UsageError
from thermocline.files.formats import F16, F32, Q8_0
from thermocline.memory.growing import GrowingPages
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Array, Arrays, KVLayer

FORMATS = {CacheType.F16: F16, CacheType.F32: F32, CacheType.Q8_0: Q8_0}
DTYPES = {CacheType.F16: "float16", CacheType.F32: "float32", CacheType.Q8_0: "uint8"}


def row_bytes(spec: ModelSpec, cache_type: CacheType) -> int:
    """Bytes of the key or the value of one head and position.

    Raises:
        UsageError: heads of this model are not whole blocks of the format.
    """
    fmt = FORMATS[cache_type]
    if spec.head_dim % fmt.block:
        raise UsageError(
            f"heads of {spec.head_dim} elements do not fit a KV cache in {cache_type}, whose blocks hold {fmt.block};"
            f" use {CacheType.F16} for keys and values"
        )
    return fmt.row_bytes(spec.head_dim)


def kv_bytes_per_token(spec: ModelSpec, type_k: CacheType = CacheType.F16, type_v: CacheType = CacheType.F16) -> int:
    """Bytes that one position takes in all layers.

    Raises:
        UsageError: as for `row_bytes`.
    """
    return spec.n_layer * spec.n_head_kv * (row_bytes(spec, type_k) + row_bytes(spec, type_v))


def kv_bytes(spec: ModelSpec, n_ctx: int, type_k: CacheType = CacheType.F16, type_v: CacheType = CacheType.F16) -> int:
    """Bytes of the cache of one sequence of up to `n_ctx` tokens."""
    return n_ctx * kv_bytes_per_token(spec, type_k, type_v)


class KVCache:
    """Keys and values of one sequence of up to `n_ctx` tokens; positions 0 to `length` - 1 are filled.

    `ops` makes the arrays: of all layers, or one for each, as every layer's cache is on its home device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ops: Arrays | Sequence[Arrays],
        n_ctx: int,
        type_k: CacheType = CacheType.F16,
        type_v: CacheType = CacheType.F16,
    ) -> None:
        if n_ctx < 1:
            raise UsageError(f"a context of {n_ctx} tokens holds nothing; allowed: 1 or more")
        makers = ops if isinstance(ops, Sequence) else (ops,) * spec.n_layer

        def rows(maker: Arrays, cache_type: CacheType) -> Array:
            size = row_bytes(spec, cache_type)
            width = size if cache_type is CacheType.Q8_0 else spec.head_dim
            return maker.array((spec.n_head_kv, n_ctx, width), DTYPES[cache_type])

        self.layers = tuple(KVLayer(rows(maker, type_k), rows(maker, type_v)) for maker in makers)
        arrays = (array for layer in self.layers for array in (layer.keys, layer.values))
        self._pages = GrowingPages([array for array in arrays if isinstance(array, np.ndarray)])
        self.n_ctx = n_ctx
        self.length = 0
        self.nbytes = kv_bytes(spec, n_ctx, type_k, type_v)

    def fill(self, length: int) -> None:
        """Note that the positions up to `length` are filled."""
        self._pages.grow(length, max(1, length - self.length))  # no token waits for many
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on.

        Raises:
            UsageError: fewer positions are filled.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def clear(self) -> None:
        """Forget everything."""
        self.length = 0
