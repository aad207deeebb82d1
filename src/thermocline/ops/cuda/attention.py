"""Attention: one token by kernels split over the context, many tokens by torch's own, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from thermocline.ops.contract import KVLayer
from thermocline.ops.cuda.layout import cached
from thermocline.ops.cuda.sizes import ATTENDED, part_of
from thermocline.ops.cuda.tuning import power_of_two

if TYPE_CHECKING:
    from thermocline.ops.cuda.ops import CudaOps

Tensor = torch.Tensor
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's, but for cuDNN's, which takes its time for every new shape and knows no keys that several heads share."""


def attention(
    ops: CudaOps, q: Tensor, k: Tensor, v: Tensor, cache: KVLayer, start: int | Tensor,
    scale: float, window: int, out: Tensor,
) -> None:  # fmt: skip
    """See `CudaOps.attention`."""
    tokens, _, dim = q.shape
    if not tokens:
        return
    position = start if isinstance(start, torch.Tensor) else torch.full((1,), start, dtype=torch.int32, device=q.device)
    if tokens == 1:
        stop = cache.keys.shape[1] if isinstance(start, torch.Tensor) else start + 1
        _one(ops, q, k, v, cache, position, stop, scale, window, out)
        return
    assert not isinstance(start, torch.Tensor)
    heads = k.shape[1]
    ops.launcher(
        "store_kv", (tokens, -(-heads // 4)),
        k=k, v=v, position=position, kv_heads=heads, head_dim=dim, **_arguments(cache, dim),
        HEADS=4, DIM=power_of_two(dim), num_warps=4,
    )  # fmt: skip
    _many(ops, q, cache, start, scale, window, out)


def _one(
    ops: CudaOps, q: Tensor, k: Tensor, v: Tensor, cache: KVLayer, position: Tensor, stop: int,
    scale: float, window: int, out: Tensor,
) -> None:  # fmt: skip
    """One token at `position`, below `stop`."""
    _, heads, dim = q.shape
    kv_heads = cache.keys.shape[0]
    group, wide = power_of_two(heads // kv_heads), power_of_two(dim)
    part = part_of(cache.keys.shape[1])
    many = power_of_two(-(-cache.keys.shape[1] // part))
    parts = -(-stop // part)
    state = {
        "partial": ops.scratch.take("attention", (heads, parts, dim)),
        "peaks": ops.scratch.take("attention peaks", (heads, parts)),
        "sums": ops.scratch.take("attention sums", (heads, parts)),
    }
    ops.launcher(
        "attend", (kv_heads, parts),
        q=q, k=k, v=v, position=position, scale=scale, window=window,
        parts=parts, group=heads // kv_heads, head_dim=dim,
        **_arguments(cache, dim), **state, GROUP=group, DIM=wide, PART=part,
        BLOCK=max(1, min(32, part, ops.tuning.attention_tile // (group * wide))), num_warps=4,
    )  # fmt: skip
    ops.launcher(
        "combine", (heads,), **state, out=out, position=position, parts=parts, head_dim=dim,
        PART=part, MANY=many, STEP=min(many, 16), DIM=wide, num_warps=4,
    )  # fmt: skip


def _many(ops: CudaOps, q: Tensor, cache: KVLayer, start: int, scale: float, window: int, out: Tensor) -> None:
    """A batch from `start` on.

    A cache in float16 is read where it lies, and queries are rounded to it: to 11 significant bits, which is what TF32
    leaves of them. One in Q8_0 becomes float16. Without TF32, and for a cache in float32, all is float32. Products of
    queries and keys are kept nowhere, if heads have a multiple of 8 elements; else some heads and tokens are computed
    at a time. What is held then, and of a cache that is not read where it lies, takes `ATTENDED` bytes at most.
    """
    tokens, heads, dim = q.shape
    kv_heads = cache.keys.shape[0]
    group, last = heads // kv_heads, start + tokens
    parts = {"keys": cached(cache.keys, dim), "values": cached(cache.values, dim)}
    types = {numbers.dtype for numbers, _ in parts.values()}
    dtype = torch.float16 if ops.tf32 and types <= {torch.float16, torch.int8} else torch.float32
    kept = dtype is torch.float32 or dim % 8 > 0  # then torch may hold all scores, and their exponentials
    held = kept or types != {dtype}
    size = dtype.itemsize
    for t0, t1 in _cuts(tokens, ATTENDED // (last * (1 + size + 2 * kept * group * size))):
        stop, count = start + t1, t1 - t0
        first = max(0, start + t0 - window + 1) if window > 0 else 0
        seen = stop - first
        whole = count == seen and (window <= 0 or window >= seen)
        mask = None if whole else _seen(start + t0, stop, first, window, q.device)
        most = ATTENDED // (2 * seen * size * max(group * count * kept, dim)) if held else kv_heads
        for h0, h1 in _cuts(kv_heads, most):
            shape = (h1 - h0, group, count, dim)
            queries = ops.scratch.take("queries", shape, dtype)
            queries.copy_(q[t0:t1, h0 * group : h1 * group].view(count, h1 - h0, group, dim).permute(1, 2, 0, 3))
            keys, values = (
                _as(ops, name, *part, (slice(h0, h1), slice(first, stop)), dtype)[:, None].expand(-1, group, -1, -1)
                for name, part in parts.items()
            )
            with ops.precision(), sdpa_kernel(KERNELS):
                mixed = scaled_dot_product_attention(
                    queries, keys, values, attn_mask=mask, is_causal=whole, scale=scale
                )  # fmt: skip
            out[t0:t1, h0 * group : h1 * group].view(count, h1 - h0, group, dim).copy_(mixed.permute(2, 0, 1, 3))


def _seen(begin: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """Whether the query at a position from `begin` on sees the key at one from `first` on, both below `stop`."""
    query = torch.arange(begin, stop, device=device, dtype=torch.int32)[:, None]
    key = torch.arange(first, stop, device=device, dtype=torch.int32)[None]
    mask = key <= query
    if window > 0:
        mask &= key > query - window
    return mask


def _as(
    ops: CudaOps, name: str, numbers: Tensor, scales: Tensor | None, where: tuple[slice, slice], dtype: torch.dtype
) -> Tensor:
    """Heads and positions of a cache: where they lie if they have the type, else a copy."""
    part = numbers[where]
    if part.dtype is dtype:
        return part
    made = ops.scratch.take(name, tuple(part.shape), dtype).copy_(part)
    if scales is not None:
        made.view(*part.shape[:2], scales.shape[-1], -1).mul_(scales[where][..., None])
    return made


def _cuts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges of at most `most`, and one at least."""
    step = max(1, min(total, most))
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _arguments(cache: KVLayer, dim: int) -> dict[str, Any]:
    """The cache as arguments of a kernel."""
    (keys, key_scales), (values, value_scales) = cached(cache.keys, dim), cached(cache.values, dim)
    return {
        "keys": keys, "key_scales": key_scales, "key_head": keys.stride(0), "key_row": keys.stride(1),
        "values": values, "value_scales": value_scales, "value_head": values.stride(0), "value_row": values.stride(1),
    }  # fmt: skip
