"""The KV cache of one sequence, and its size before it is made."""

from __future__ import annotations

from collections.abc import Sequence

from thermocline.config import CacheType
from thermocline.errors import UsageError
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Arrays, KVLayer

DTYPES = {CacheType.F16: "float16", CacheType.F32: "float32"}
BYTES = {CacheType.F16: 2, CacheType.F32: 4}


def kv_bytes_per_token(spec: ModelSpec, type_k: CacheType = CacheType.F16, type_v: CacheType = CacheType.F16) -> int:
    """Bytes that one position takes in all layers."""
    return spec.n_layer * spec.n_kv * (BYTES[type_k] + BYTES[type_v])


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
        shape = (spec.n_head_kv, n_ctx, spec.head_dim)
        makers = ops if isinstance(ops, Sequence) else (ops,) * spec.n_layer
        self.layers = tuple(
            KVLayer(maker.array(shape, DTYPES[type_k]), maker.array(shape, DTYPES[type_v])) for maker in makers
        )
        self.n_ctx = n_ctx
        self.length = 0
        self.nbytes = kv_bytes(spec, n_ctx, type_k, type_v)

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
