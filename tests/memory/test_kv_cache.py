"""A cache is as large as foretold, and forgets what it is told to."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from thermocline.config import CacheType
from thermocline.errors import UsageError
from thermocline.memory.kv_cache import KVCache, kv_bytes, kv_bytes_per_token
from thermocline.model.families import family_of
from thermocline.model.spec import ModelSpec
from thermocline.ops.cpu import CpuOps
from thermocline.ops.reference import ReferenceOps

OPS = ReferenceOps()


@pytest.fixture
def spec(make_source: Callable[..., Any]) -> ModelSpec:
    source = make_source()
    return family_of(source).spec(source)


@pytest.mark.parametrize("type_k", CacheType)
@pytest.mark.parametrize("type_v", CacheType)
def test_size_is_that_of_the_arrays(spec: ModelSpec, type_k: CacheType, type_v: CacheType) -> None:
    cache = KVCache(spec, OPS, 7, type_k, type_v)
    arrays = [array for layer in cache.layers for array in (layer.keys, layer.values)]
    for array, kind in zip(arrays, (type_k, type_v) * spec.n_layer, strict=True):
        width = spec.head_dim // 32 * 34 if kind is CacheType.Q8_0 else spec.head_dim
        assert array.shape == (spec.n_head_kv, 7, width)
    assert cache.nbytes == sum(array.nbytes for array in arrays) == kv_bytes(spec, 7, type_k, type_v)
    assert cache.nbytes == 7 * kv_bytes_per_token(spec, type_k, type_v)
    dtypes = {"f16": "float16", "f32": "float32", "q8_0": "uint8"}
    assert [str(a.dtype) for a in arrays[:2]] == [dtypes[type_k], dtypes[type_v]]


def test_heads_of_no_whole_blocks_are_refused(spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match=r"heads of 48 elements do not fit a KV cache in q8_0, .* hold 32; use f16"):
        KVCache(replace(spec, head_dim=48), OPS, 7, CacheType.Q8_0)


def test_truncate_and_clear(spec: ModelSpec) -> None:
    cache = KVCache(spec, OPS, 8)
    cache.length = 5
    cache.truncate(5)
    assert cache.length == 5
    cache.truncate(2)
    assert cache.length == 2
    for length in (3, -1):
        with pytest.raises(UsageError, match=f"cache of 2 tokens to {length}"):
            cache.truncate(length)
    cache.clear()
    assert cache.length == 0


def test_an_empty_context_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match="a context of 0 tokens"):
        KVCache(spec, OPS, 0)


def test_a_cache_takes_memory_as_it_fills(spec: ModelSpec) -> None:
    """A position takes a page of every head's region, not what a huge page is."""
    spec = replace(spec, n_head=8, n_head_kv=8)
    n_ctx = (4 << 20) // (2 * spec.head_dim)
    cache = KVCache(spec, CpuOps(1), n_ctx)
    before = resident_bytes()
    for layer in cache.layers:
        layer.keys[:, n_ctx // 2] = layer.values[:, n_ctx // 2] = 1
    assert resident_bytes() - before < 1 << 20
    assert cache.nbytes >= 64 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
