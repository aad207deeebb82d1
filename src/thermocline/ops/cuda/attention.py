"""Attention: one token by kernels split over the context, many tokens by matrix products in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from thermocline.ops.contract import KVLayer
from thermocline.ops.cuda.sizes import ATTENDED, part_of
from thermocline.ops.cuda.tuning import power_of_two

if TYPE_CHECKING:
    from thermocline.ops.cuda.ops import CudaOps

Tensor = torch.Tensor


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
        k=k, v=v, position=position, tokens=tokens, kv_heads=heads, head_dim=dim, **_strides(cache),
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
        **_strides(cache), **state, GROUP=group, DIM=wide, PART=part,
        BLOCK=max(1, min(32, part, ops.tuning.attention_tile // (group * wide))), num_warps=4,
    )  # fmt: skip
    ops.launcher(
        "combine", (heads,), **state, out=out, position=position, parts=parts, head_dim=dim,
        PART=part, MANY=many, STEP=min(many, 16), DIM=wide, num_warps=4,
    )  # fmt: skip


def _many(ops: CudaOps, q: Tensor, cache: KVLayer, start: int, scale: float, window: int, out: Tensor) -> None:
    """A batch from `start` on, in float32: some heads and tokens at a time, as many as `ATTENDED` bytes hold."""
    tokens, heads, dim = q.shape
    kv_heads = cache.keys.shape[0]
    group = heads // kv_heads
    for t0, t1 in _cuts(tokens, ATTENDED // (4 * group * (start + tokens))):
        stop = start + t1
        first = max(0, start + t0 - window + 1) if window > 0 else 0
        seen, count = stop - first, t1 - t0
        query = torch.arange(start + t0, stop, device=q.device, dtype=torch.int32)[:, None]
        key = torch.arange(first, stop, device=q.device, dtype=torch.int32)[None]
        hidden = key > query
        if window > 0:
            hidden |= key <= query - window
        for h0, h1 in _cuts(kv_heads, ATTENDED // (4 * seen * max(group * count, 2 * dim))):
            some = h1 - h0
            shape = (some, group * count, seen)
            queries = ops.scratch.take("queries", (some, group, count, dim))
            torch.mul(q[t0:t1, h0 * group : h1 * group].view(count, some, group, dim).permute(1, 2, 0, 3), scale,
                      out=queries)  # fmt: skip
            keys, values = (
                ops.scratch.take(name, (some, seen, dim)).copy_(part[h0:h1, first:stop])
                for name, part in (("keys", cache.keys), ("values", cache.values))
            )
            scores = ops.scratch.take("scores", shape)
            torch.bmm(queries.view(some, group * count, dim), keys.transpose(1, 2), out=scores)
            scores.view(some, group, count, seen).masked_fill_(hidden, float("-inf"))
            scores.sub_(scores.amax(dim=2, keepdim=True)).exp_()
            scores.div_(scores.sum(dim=2, keepdim=True))
            mixed = ops.scratch.take("mixed", (some, group * count, dim))
            torch.bmm(scores, values, out=mixed)
            out[t0:t1, h0 * group : h1 * group].view(count, some, group, dim).copy_(
                mixed.view(some, group, count, dim).permute(2, 0, 1, 3)
            )


def _cuts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges of at most `most`, and one at least."""
    step = max(1, min(total, most))
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _strides(cache: KVLayer) -> dict[str, Any]:
    return {
        "keys": cache.keys, "key_head": cache.keys.stride(0), "key_row": cache.keys.stride(1),
        "values": cache.values, "value_head": cache.values.stride(0), "value_row": cache.values.stride(1),
    }  # fmt: skip
