"""The GPU's kernels without a GPU: compiled ahead of time, and asked for elements beyond 2^31."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from thermocline.errors import HardwareError, UsageError
from thermocline.files.formats import F16, Q4_0, Q4_K, Q8_0, BlockFormat
from thermocline.files.quantize import quantize, to_float
from thermocline.files.weight import Weight
from thermocline.ops.contract import Activation, ActiveSet, FfnKind, KVLayer, NeuronBlock
from thermocline.ops.cuda import ahead
from thermocline.ops.cuda.kernels import KERNELS
from thermocline.ops.cuda.layout import Kind, cached
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.cuda.scratch import Scratch
from thermocline.ops.cuda.sizes import MOST_GROUPS, part_of
from thermocline.ops.reference import ReferenceOps

BEYOND = (1 << 31) + 4096


@pytest.fixture
def ops() -> CudaOps:
    return CudaOps(tf32=False)


def printed(*arguments: str) -> list[str]:
    """What Python prints in a process of its own, as this one may have made its kernels for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def compile_for(*arguments: str) -> list[dict]:
    return [json.loads(line) for line in printed("-m", "thermocline.ops.cuda.ahead", *arguments)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1100"])
def test_every_kernel_compiles_for_gpus_of_two_makers(target: str) -> None:
    rows = compile_for("--few", target)
    assert {row["kernel"] for row in rows} == set(KERNELS)
    assert all(row["binary"] > 0 for row in rows)
    indexed = {row["kernel"] for row in rows if row["wide"]}
    assert indexed >= {"matvec", "gather_rows", "gate_up", "add_rows", "attend", "store_kv"}
    assert all(sum(row["loads"].values()) > MOST_GROUPS for row in rows if row["kernel"] == "add_groups")
    assert not any(row["ordered"] for row in rows)  # what is counted is read by later launches only
    assert all("16" in row["loads"] for row in rows if row["kernel"] in ("matvec", "matvec_three", "gate_up", "attend"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_variant_of_every_kernel_compiles(target: str) -> None:
    rows = compile_for(target)
    assert {row["kernel"] for row in rows} == set(KERNELS)
    (variants,) = printed("-c", "from thermocline.ops.cuda import ahead; print(len(ahead.variants()))")
    assert len(rows) == int(variants) > 2 * len(KERNELS)
    assert all(row["binary"] > 0 for row in rows)
    for row in rows:
        kinds = set(row["kinds"])
        if row["kernel"] == "matvec_few":  # few tokens read as one does, where decoding is much work
            assert (
                "16" in row["loads"] or kinds == {Kind.Q6_K} or kinds <= {Kind.FLOAT, Kind.BF16, Kind.Q8_0, Kind.Q4_0}
            )
            assert not kinds & {Kind.Q4_K, Kind.Q5_K, Kind.Q6_K} or row["loads"].get("1", 0) <= 4 * 96, row
        assert not (row["doubles"] and row["kernel"] in ("gate_up", "activate")), row  # which many cards compute slowly
        if row["kernel"] == "attend":
            assert "16" in row["loads"], row
            assert "1" not in row["loads"], row
        if row["kernel"] in ("matvec", "matvec_three", "gate_up", "add_rows"):
            plain = set(row["kinds"]) <= {Kind.FLOAT, Kind.Q8_0, Kind.Q4_0, Kind.BF16}
            # 16 bytes at once where rows are aligned, and nothing byte by byte but a few scales of K-quants.
            assert "16" in row["loads"] or row["kinds"] == [Kind.Q6_K] or row["kernel"] == "add_rows", row
            assert row["loads"].get("1", 0) <= (0 if plain else 96 if row["kernel"] != "add_rows" else 256), row


TRITONS = """
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from thermocline.ops.cuda import ahead, launch
from thermocline.ops.cuda.kernels import KERNELS

ours = launch.variant_of

def held(name, arguments):
    variant = ours(name, arguments)
    for p in KERNELS[name].params:
        given = arguments[p.name], False, not p.do_not_specialize, True
        kind, mark = ("constexpr", None) if p.is_constexpr else native_specialize_impl(BaseBackend, *given)
        assert (dict(variant.signature)[p.name], p.name in variant.aligned) == (kind, mark == "D"), (name, p.name)
    return variant

launch.variant_of = held
print(len(ahead.variants()))
"""


def test_what_is_compiled_ahead_is_what_triton_compiles() -> None:
    assert int(printed("-c", TRITONS)[0]) > len(KERNELS)


COUNTS = """
import numpy as np

from thermocline.files.formats import F16
from thermocline.ops.contract import ALL, ActiveSet, KVLayer, NeuronBlock
from thermocline.ops.cuda.ahead import KINDS, _weight
from thermocline.ops.cuda.launch import Recorder
from thermocline.ops.cuda.ops import CudaOps

ops = CudaOps("meta", launcher=Recorder())
matrix = _weight(ops, 256, 64, F16)
block = NeuronBlock(matrix, matrix, matrix, True, KINDS[0], 256)
cache = KVLayer(*(ops.array((2, 4096, 64), "float16") for _ in range(2)))
with ops.counting(ops.array((4,), "int64")):
    for count in (16, 5, 32, 33):
        x, out = ops.array((count, 64)), ops.array((count, 64))
        ops.embed(matrix, np.zeros(count, np.int32), out)
        ops.decode_rows(matrix, None, count, count, out)
        ops.select(ops.array((count, 256)), 0.5, ops.array((256,), "int32"))
        ops.ffn(x, block, ALL, out, skip_zeros=True)
        q = ops.array((count, 2, 64))
        ops.attention(q, q, q, cache, count, 0.1, 0, q)
    for count in (1, 5, 16):
        ops.ffn(x[:1], block, ActiveSet(np.arange(count, dtype=np.int32)), out[:1], skip_zeros=True)
        ops.attention(q[:1], q[:1], q[:1], cache, 64 * count - 1, 0.1, 0, q[:1])
print(*sorted(variant.name for variant in ops.launcher.variants))
"""


def test_counts_that_vary_compile_nothing_anew() -> None:
    """Neither 1 nor a multiple of 16 is another kernel; where `ids` are given and where they are not are two."""
    wanted = "activate add_groups add_rows attend combine gate_up gather_rows gather_rows list_groups select store_kv"
    assert printed("-c", COUNTS) == [wanted]


LOOPS = """
import re

from thermocline.ops.cuda import ahead

found = [v for v in ahead.variants() if v.name == "attend"][:3] + [v for v in ahead.variants() if v.name == "select"]
for variant in found:
    code = ahead.compiled(variant, ahead.target_of("sm_80")).asm["ptx"]
    for number, block in re.findall(r"^\\$L__BB0_(\\d+):(.*?)(?=^\\$L__BB0|\\Z)", code, re.M | re.S):
        if re.search(rf"bra[.a-z]*\\s+\\$L__BB0_{number};", block):
            print(variant.name, *re.findall(r"(ld|bar|atom)[.](?:global|sync)", block))
"""


def test_loads_of_a_loop_are_on_their_way_together() -> None:
    """Keys and values are loaded before the first of them is computed with; and a list's start is added up once."""
    loops = [line.split() for line in printed("-c", LOOPS)]
    assert [name for name, *_ in loops] == [*(3 * ["attend"]), "select"]
    for name, *calls in loops:
        loads = calls.count("ld")
        assert calls[:loads] == loads * ["ld"]
        assert loads >= (6 if name == "attend" else 1)
        assert name == "attend" or "bar" not in calls


ODD = """
import json

from thermocline.ops.cuda import ahead

odd = [v for v in ahead.variants() if any(name.endswith("_ALIGN") and value < 16 for name, value in v.constants)]
odd = {(v.name, *(value for name, value in v.constants if name.endswith("_KIND"))): v for v in odd}
for row in ahead.compile_all(["sm_80"], odd.values()):
    print(json.dumps(row))
"""


def test_rows_that_no_vector_load_begins_are_not_read_byte_by_byte() -> None:
    """Falcon 7B's, in Q8_0 and Q4_0, take four bytes at once; only scales take two."""
    rows = [json.loads(line) for line in printed("-c", ODD)]
    assert {row["kernel"] for row in rows} == {
        "matvec", "matvec_three", "matvec_few", "gather_rows", "gate_up", "add_rows"
    }  # fmt: skip
    assert {row["align"] for row in rows} == {4}
    for row in rows:
        assert "1" not in row["loads"], row
        assert row["loads"]["4"] > 0, row


def test_a_target_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="allowed: sm_"):
        list(ahead.compile_all(["ninety"], []))


def test_norms_of_rows_that_are_read_twice(ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x, weight, bias = (torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for n in ((3, 1000), 1000, 1000))
    found = []
    for most in (8192, 256):
        monkeypatch.setattr("thermocline.ops.cuda.ops.NORMED", most)
        outs = ops.array((3, 1000)), ops.array((3, 1000))
        ops.rms_norm(x.to(ops.device), weight.to(ops.device), 1e-5, outs[0])
        ops.layer_norm(x.to(ops.device), weight.to(ops.device), bias.to(ops.device), 1e-5, outs[1])
        found.append([out.cpu().numpy() for out in outs])
    for once, twice in zip(*found, strict=True):
        np.testing.assert_allclose(once, twice, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(("context", "part"), [(1, 64), (4096, 64), (16384, 64), (16385, 128), (131072, 512)])
def test_a_context_has_parts_of_a_bounded_number(context: int, part: int) -> None:
    assert part_of(context) == part
    assert -(-context // part) <= 256


def test_attention_over_a_long_context(ops: CudaOps) -> None:
    """Parts that are longer, most of which nothing is in yet; a replayed step takes all of them."""
    rng, heads, dim, context, last = np.random.default_rng(6), 2, 16, 16500, 300
    caches = [KVLayer(*(np.zeros((1, context, dim), np.float16) for _ in range(2)))]
    for array in (caches[0].keys, caches[0].values):
        array[:, :last] = rng.standard_normal((1, last, dim))
    caches.append(KVLayer(*(torch.from_numpy(a.copy()).to(ops.device) for a in (caches[0].keys, caches[0].values))))
    q, k, v = (rng.standard_normal((1, h, dim)).astype(np.float32) for h in (heads, 1, 1))
    expected = np.zeros((1, heads, dim), np.float32)
    ReferenceOps().attention(q, k, v, caches[0], last, 0.25, 0, expected)
    there = [torch.from_numpy(array).to(ops.device) for array in (q, k, v)]
    for start in (last, torch.tensor([last], dtype=torch.int32, device=ops.device)):
        out = ops.array((1, heads, dim))
        ops.attention(*there, caches[1], start, 0.25, 0, out)
        np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(caches[1].keys.cpu().numpy(), caches[0].keys)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (6, 2, 32), (4, 2, 20)])
@pytest.mark.parametrize(("start", "window"), [(0, 0), (7, 0), (0, 5), (11, 6), (0, 40)])
def test_prompts_read_a_half_cache_where_it_lies(
    heads: int, kv_heads: int, dim: int, start: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TF32 torch's attention takes float16: queries, weights and sums are rounded to 11 bits, as products are."""
    ops, tokens, context = CudaOps(), 17, 40
    rng = np.random.default_rng(start + window)
    caches = [KVLayer(*(np.zeros((kv_heads, context, dim), np.float16) for _ in range(2)))]
    for array in (caches[0].keys, caches[0].values):
        array[:, :start] = rng.standard_normal((kv_heads, start, dim))
    caches.append(KVLayer(*(torch.from_numpy(a.copy()).to(ops.device) for a in (caches[0].keys, caches[0].values))))
    q, k, v = (rng.standard_normal((tokens, h, dim)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    expected = np.zeros((tokens, heads, dim), np.float32)
    ReferenceOps().attention(q, k, v, caches[0], start, dim**-0.5, window, expected)
    there, found = [torch.from_numpy(array).to(ops.device) for array in (q, k, v)], []
    for most in (1 << 25, 1 << 11):  # at once, and by pieces
        monkeypatch.setattr("thermocline.ops.cuda.attention.ATTENDED", most)
        out = ops.array((tokens, heads, dim))
        ops.attention(*there, caches[1], start, dim**-0.5, window, out)
        found.append(out.cpu().numpy())
    # A score is off by its terms' rounding, so its weight by as much of itself; values' largest element bounds the sum.
    score = 2.0**-11 * dim**-0.5 * (np.abs(q).sum(axis=2).max() * max(np.abs(k).max(), 3.0))
    bound = (2 * score + 4 * 2.0**-11) * np.abs(np.concatenate([v.ravel(), caches[0].values.ravel()])).max()
    for got in found:
        assert np.abs(got - expected).max() <= bound
        assert np.abs(got - expected).max() > 0


@pytest.mark.parametrize(("start", "window", "mixed"), [(1, 0, False), (11, 6, False), (7, 0, True)])
def test_prompts_make_floats_of_a_cache_in_q8_0(
    start: int, window: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float16 where products are in TF32; at once and by pieces, what is held being bounded."""
    tokens, context, heads, kv_heads, dim = 17, 40, 4, 2, 64
    rng = np.random.default_rng(start)
    k, v = (rng.standard_normal((start + tokens, kv_heads, dim)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((start + tokens, heads, dim)).astype(np.float32)
    width = Q8_0.row_bytes(dim)
    values = np.zeros((kv_heads, context, dim), np.float16) if mixed else np.zeros((kv_heads, context, width), np.uint8)
    expected_cache = KVLayer(np.zeros((kv_heads, context, width), np.uint8), values.copy())
    expected, reference = np.zeros_like(q), ReferenceOps()
    for now in (slice(0, start), slice(start, start + tokens)):
        reference.attention(q[now], k[now], v[now], expected_cache, now.start, dim**-0.5, window, expected[now])
    largest = 1.01 * max(np.abs(k).max(), np.abs(v).max())
    score = dim**-0.5 * np.abs(q).sum(axis=2).max() * largest
    for tf32, rounding in ((True, 2.0**-11), (False, 2.0**-24 * (dim + 40))):
        ops = CudaOps(tf32=tf32)
        there = [torch.from_numpy(array).to(ops.device) for array in (q, k, v)]
        for most in (1 << 25, 1 << 13):
            monkeypatch.setattr("thermocline.ops.cuda.attention.ATTENDED", most)
            cache = KVLayer(
                *(torch.from_numpy(a.copy()).to(ops.device) for a in (np.zeros_like(expected_cache.keys), values))
            )
            out = ops.array(q.shape)
            for now in (slice(0, start), slice(start, start + tokens)):
                ops.attention(*(x[now] for x in there), cache, now.start, dim**-0.5, window, out[now])
            off = np.abs(out.cpu().numpy() - expected)[start:].max()
            # As of half caches; a product of a number and its scale is rounded too.
            assert 0 < off <= (6 * score + 6) * rounding * largest
            assert ops.scratch.nbytes <= max(8 * 40 * dim * 8, 6 * most)


def sparse_file(tmp_path: Path, size: int) -> np.ndarray:
    """Zeros that take no room on disk nor in memory until they are written."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(size)
    return np.memmap(path, np.uint8, "r+")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="maps memory of the host")
class TestBeyond32Bits:
    def test_rows_far_down(self, ops: CudaOps, tmp_path: Path) -> None:
        """Gate, up, down and embedding rows whose first element is beyond 2^31."""
        columns = 1 << 16
        rows = BEYOND // columns + 1
        room = sparse_file(tmp_path, 2 * rows * columns).reshape(rows, 2 * columns)
        last = np.linspace(-1, 1, columns, dtype=np.float32)
        room[-1] = quantize(last[None], F16)[0]
        matrix = ops.place(Weight("w", F16, (rows, columns), torch.from_numpy(room)))  # type: ignore[arg-type]
        exact = quantize(last[None], F16).view(np.float16).astype(np.float32)
        out = ops.array((1, columns))
        ops.embed(matrix, np.array([rows - 1], np.int32), out)
        assert np.array_equal(out.numpy(), exact)
        block = NeuronBlock(matrix, matrix, matrix, True, FfnKind(Activation.RELU, gated=True), rows)
        x, total = torch.from_numpy(exact / np.square(exact).sum()), ops.array((1, columns))
        work = ops.ffn(x, block, ActiveSet(np.array([rows - 1], np.int32)), total, skip_zeros=True)
        assert work == (1, 1, 1, 1)
        np.testing.assert_allclose(total.numpy(), exact, rtol=1e-4)

    def test_a_cache_with_heads_far_apart(self, ops: CudaOps, tmp_path: Path) -> None:
        dim = 16
        room = torch.from_numpy(sparse_file(tmp_path, 2 * (BEYOND + 4 * dim)).view(np.float16))
        cache = KVLayer(*(room.as_strided((2, 4, dim), (BEYOND, dim, 1)) for _ in range(2)))
        q, k = torch.ones((1, 2, dim)), torch.arange(2 * dim, dtype=torch.float32).reshape(1, 2, dim)
        out = ops.array((1, 2, dim))
        ops.attention(q, k, k, cache, 0, 1.0, 0, out)
        assert torch.equal(out, k)
        assert torch.equal(cache.keys[1, 0].float(), k[0, 1])

    def test_a_long_cache_in_q8_0(self, ops: CudaOps, tmp_path: Path) -> None:
        """The second head's numbers, and all scales, lie beyond 2^31."""
        dim, context = 32, BEYOND // 32
        size = 2 * context * Q8_0.row_bytes(dim)
        room = torch.from_numpy(sparse_file(tmp_path, size)).view(2, context, Q8_0.row_bytes(dim))
        q, k = torch.ones((1, 2, dim)), torch.arange(2 * dim, dtype=torch.float32).reshape(1, 2, dim)
        out = ops.array((1, 2, dim))
        ops.attention(q, k, k, KVLayer(room, room), 0, 1.0, 0, out)
        assert (out - k).abs().max() <= 63 / 254 + 0.04
        numbers, scales = cached(room, dim)
        assert numbers[1, 0, -1] == 127
        assert scales[1, 0, 0] == torch.tensor(63 / 127).half()


@pytest.mark.parametrize("fmt", [F16, Q8_0, Q4_0, Q4_K], ids=lambda f: f.name)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_few_tokens_read_every_row_once(ops: CudaOps, fmt: BlockFormat, tokens: int) -> None:
    """Three matrices take one launch for one token; for a few more each is read once for all of them."""
    rng, launches = np.random.default_rng(tokens), []
    weights = [quantize(rng.standard_normal((rows, 256)).astype(np.float32), fmt) for rows in (9, 4, 5)]
    placed = tuple(ops.place(Weight("w", fmt, (len(w), 256), w)) for w in weights)
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    biases = (rng.standard_normal(9).astype(np.float32), None, rng.standard_normal(5).astype(np.float32))
    outs = tuple(ops.array((tokens, len(w))) for w in weights)
    launch = ops.launcher
    ops.launcher = lambda name, grid, **rest: (launches.append((name, grid)), launch(name, grid, **rest))
    there = tuple(None if b is None else torch.from_numpy(b).to(ops.device) for b in biases)
    ops.linear(torch.from_numpy(x).to(ops.device), placed, outs, there)
    assert [name for name, _ in launches] == (["matvec_three"] if tokens == 1 else 3 * ["matvec_few"])
    assert all(len(grid) == 1 for _, grid in launches)
    for packed, bias, out in zip(weights, biases, outs, strict=True):
        w = to_float(Weight("w", fmt, (len(packed), 256), packed)).astype(np.float64)
        bound = 2.0**-24 * 260 * (np.abs(x) @ np.abs(w).T + (0 if bias is None else np.abs(bias)))
        assert (np.abs(out.cpu().numpy() - x @ w.T - (0 if bias is None else bias)) <= 3 * bound).all()


def test_rows_are_rearranged_where_they_lie(ops: CudaOps) -> None:
    """Placing an array of the device copies nothing: the allocator has accounted for its bytes."""
    values = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    packed = quantize(values, Q8_0)
    raw = ops.array(packed.shape, "uint8")
    ops.upload(packed, raw)
    matrix = ops.place(Weight("w", Q8_0, (5, 64), raw))
    assert matrix.numbers.data_ptr() == raw.data_ptr()
    assert matrix.nbytes == packed.nbytes
    assert raw[:, :64].reshape(5, 2, 32).cpu().numpy().tobytes() == packed.reshape(5, 2, 34)[:, :, 2:].tobytes()
    assert raw[:, 64:].reshape(5, 2, 2).cpu().numpy().tobytes() == packed.reshape(5, 2, 34)[:, :, :2].tobytes()


def test_what_is_skipped_changes_no_bit(ops: CudaOps) -> None:
    rng = np.random.default_rng(2)
    for fmt in (F16, Q8_0):
        gate, up, down = (
            ops.place(Weight("w", fmt, (150, 64), quantize(rng.standard_normal((150, 64)).astype(np.float32), fmt)))
            for _ in range(3)
        )
        block = NeuronBlock(gate, up, down, True, FfnKind(Activation.RELU, gated=True), 150)
        x = torch.from_numpy(rng.standard_normal((1, 64)).astype(np.float32)).to(ops.device)
        outs = [ops.array((1, 64)) for _ in range(3)]
        for out, skip in zip(outs, (False, True, True), strict=True):
            ops.ffn(x, block, ActiveSet(), out, skip_zeros=skip)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[1], outs[2])


def test_counting_waits_for_nothing_and_says_the_same(ops: CudaOps) -> None:
    rng = np.random.default_rng(3)
    matrix = ops.place(Weight("w", F16, (40, 32), quantize(rng.standard_normal((40, 32)).astype(np.float32), F16)))
    block = NeuronBlock(matrix, matrix, matrix, True, FfnKind(Activation.RELU, gated=True), 40)
    x = torch.from_numpy(rng.standard_normal((1, 32)).astype(np.float32)).to(ops.device)
    scores = torch.from_numpy(rng.standard_normal((1, 40)).astype(np.float32)).to(ops.device)
    ids, outs = ops.array((40,), "int32"), [ops.array((1, 32)) for _ in range(2)]
    told = ops.ffn(x, block, ops.select(scores, 0.0, ids), outs[0], skip_zeros=True)
    counts = ops.array((4,), "int64")
    with ops.counting(counts):
        ops.ffn(x, block, ops.select(scores, 0.0, ids), outs[1], skip_zeros=True)
    assert tuple(counts.tolist()) == told
    assert torch.equal(outs[0], outs[1])


def test_devices_that_are_not_there_are_refused_with_a_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(HardwareError, match="unset it to use the GPU"):
        CudaOps("cuda")
    code = "from thermocline.ops.cuda.ops import CudaOps; CudaOps('{}')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for device, words in {"cuda": "no driver of a GPU is loaded", "cpu": "TRITON_INTERPRET=1"}.items():
        done = subprocess.run(
            [sys.executable, "-c", code.format(device)], capture_output=True, text=True, env=environment, check=False
        )
        assert words in done.stderr


def test_another_gpu_than_the_first_is_refused() -> None:
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1"):
        CudaOps("cuda:1")


def test_scratch_that_a_graph_may_use_is_never_let_go() -> None:
    scratch = Scratch(torch.device("cpu"))
    small = scratch.take("a", (4,))
    scratch.take("a", (8,))
    assert scratch.nbytes == 32
    scratch.hold()
    large = scratch.take("a", (16,))
    assert scratch.nbytes == 32 + 64
    assert large.data_ptr() == scratch.take("a", (4,)).data_ptr() != small.data_ptr()
