"""Loading: what is placed where, what is transposed, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thermocline.config import CacheType, Mode
from thermocline.errors import NumericalError, UsageError
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.quantize import to_float
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import check_finite, load_transformer
from thermocline.memory.reblock import transpose
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import Activation, FfnKind, Matrix, Ops
from thermocline.ops.cpu import CpuOps
from thermocline.ops.reference import ReferenceOps

OPS = ReferenceOps()
SILU = FfnKind(Activation.SILU, gated=True)
FORMATS = pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda f: f.name)


def logits_of(transformer: Transformer) -> np.ndarray:
    tokens = np.arange(12, dtype=np.int32)
    cache = KVCache(transformer.spec, transformer.ops, 12, CacheType.F32, CacheType.F32)
    workspace = Workspace(transformer.spec, transformer.ops, 12)
    return transformer.step(tokens, (Segment(cache, 0, 12),), workspace, Outputs.ALL).logits


@FORMATS
def test_relu_families_run_on_records(make_source: Callable[..., Any], fmt: BlockFormat) -> None:
    """A standard file is transposed, and both modes run on the result; a file of records is mapped as it is."""
    source = make_source(fmt)
    transformer, report = load_transformer(source, OPS)
    assert transformer.mode is Mode.EXACT
    assert [r.tensor for r in report.reblocked] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert (report.worst_reblocked.max_abs_error == 0) == (fmt.block == 1)
    down = transformer.layers[1].ffn.parts[0].block.down
    assert transformer.layers[1].ffn.parts[0].block.records
    assert down.shape == (96, 64)
    error = np.abs(to_float(down) - to_float(source.weights["blk.1.ffn_down.weight"]).T).max()
    assert error == pytest.approx(report.reblocked[1].max_abs_error)
    np.testing.assert_array_equal(logits_of(transformer), logits_of(transformer.with_mode(Mode.DENSE)))

    stored = make_source(fmt, records=True)
    transformer, report = load_transformer(stored, OPS)
    assert report.reblocked == ()
    assert report.worst_reblocked is None
    assert transformer.layers[0].ffn.parts[0].block.down is stored.weights["blk.0.ffn_down_t.weight"]


def test_dense_families_keep_the_standard_layout(make_source: Callable[..., Any]) -> None:
    source = make_source(Q8_0, SILU)
    transformer, report = load_transformer(source, OPS)
    assert transformer.mode is Mode.DENSE
    assert not transformer.layers[0].ffn.parts[0].block.records
    assert transformer.layers[0].ffn.parts[0].block.down is source.weights["blk.0.ffn_down.weight"]
    assert report.reblocked == ()
    assert report.mapped_bytes == sum(w.nbytes for w in source.weights.values() if w.rows > 1)
    assert report.resident_bytes == sum(w.nbytes for w in source.weights.values() if w.rows == 1)
    with pytest.raises(UsageError, match="mode exact"):
        load_transformer(source, OPS, mode=Mode.EXACT)


def test_bytes_are_accounted(make_source: Callable[..., Any]) -> None:
    source = make_source(Q8_0)
    _, report = load_transformer(source, OPS)
    down = sum(w.nbytes for name, w in source.weights.items() if "ffn_down" in name)
    vectors = sum(w.nbytes for w in source.weights.values() if w.rows == 1)
    assert report.resident_bytes == down + vectors
    assert report.mapped_bytes == sum(w.nbytes for w in source.weights.values()) - down - vectors


def test_the_context_is_the_models_own_unless_given(make_source: Callable[..., Any]) -> None:
    assert load_transformer(make_source(), OPS)[0].n_ctx == 32
    longer = load_transformer(make_source(), OPS, n_ctx=50)[0]
    assert longer.n_ctx == 50
    assert longer.layers[0].rope.shape == (50, 2, 16)


class NativeOps(ReferenceOps):
    """ReferenceOps with a transposition of its own."""

    worst = 0.125

    def transpose_requantize(self, matrix: Matrix, out: np.ndarray, fmt: BlockFormat) -> tuple[float, float, float]:
        transpose(matrix, out, fmt)
        return self.worst, 0.0625, 1.0


def test_ops_that_transpose_natively_are_asked_to(make_source: Callable[..., Any]) -> None:
    ops = NativeOps()
    transformer, report = load_transformer(make_source(Q8_0), ops)
    assert [(r.max_abs_error, r.rms_error) for r in report.reblocked] == [(0.125, 0.0625)] * 2
    np.testing.assert_array_equal(logits_of(transformer), logits_of(load_transformer(make_source(Q8_0), OPS)[0]))
    ops.worst = float("nan")
    with pytest.raises(NumericalError, match=r"blk\.0\.ffn_down\.weight"):
        load_transformer(make_source(Q8_0), ops)


@FORMATS
def test_the_native_transposition_is_the_same(make_source: Callable[..., Any], fmt: BlockFormat) -> None:
    """The same bytes by either road, so that files of records do not depend on who wrote them."""
    source, ops = make_source(fmt), CpuOps(2)
    for name in ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"):
        down = source.weights[name]
        slow = np.empty((down.columns, fmt.row_bytes(down.rows)), dtype=np.uint8)
        fast = np.empty_like(slow)
        report = transpose(down, slow, fmt)
        worst, rms, size = ops.transpose_requantize(ops.place(down), fast, fmt)
        np.testing.assert_array_equal(fast, slow)
        assert (worst, rms, size) == pytest.approx((report.max_abs_error, report.rms_error, report.rms), rel=1e-5)


@pytest.mark.parametrize("ops", [OPS, CpuOps(1)], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_norm.weight", "blk.0.ffn_down.weight"])
def test_poison_is_found_while_loading(make_source: Callable[..., Any], ops: Ops, name: str) -> None:
    source = make_source(F16)
    weight = source.weights[name]
    values = weight.data.view(np.float32 if weight.format is F32 else np.float16)
    values[-1, 3] = np.inf
    with pytest.raises(NumericalError, match=name.replace(".", r"\.")):
        load_transformer(source, ops)


@FORMATS
@pytest.mark.parametrize("ops", [OPS, CpuOps(1)], ids=["reference", "cpu"])
def test_the_full_check_finds_one_number(make_source: Callable[..., Any], ops: Ops, fmt: BlockFormat) -> None:
    """Of a block format, a scale: 0x7E00 is NaN in float16, as are the bytes in the others."""
    source = make_source(fmt)
    check_finite(source.weights, OPS)
    load_transformer(source, ops, check=True)
    data = source.weights["blk.1.attn_k.weight"].data
    data[-1, :2] = np.frombuffer(b"\x00\x7e", dtype=np.uint8)
    if fmt in (F32, BF16):
        data[-1, :4] = np.frombuffer(b"\xc0\x7f\xc0\x7f", dtype=np.uint8)
    load_transformer(source, ops)
    with pytest.raises(NumericalError, match=r"tensor blk\.1\.attn_k\.weight holds NaN"):
        load_transformer(source, ops, check=True)
