"""How near every hot op comes to what the machine can do.

    python -m benchmarks.ops
    python -m benchmarks.ops --only ffn --formats Q4_0 Q8_0 --shape 7b

Weights come from a ring of buffers far larger than the last level cache, so that every call reads memory; active sets
are random rows of which none comes twice before all came once. Every op is measured in slices with a probe of the
read bandwidth between them: the share is the op's median rate over the probe's median. Prefill is compared with
the best integer or BF16 rate of torch on this machine or, with AMX, of its tiles alone. "rows" is the FFN's bound:
a program that only reads what the FFN reads, one matrix after the other. Each group of ops is kept under
benchmarks/results/ops.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.machine import Probe, arithmetic_peaks, facts
from benchmarks.synthetic_families import SHAPES, Shape
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline import _native
from thermocline.files.formats import BY_NAME, F16, F32, Q8_0, BlockFormat
from thermocline.files.quantize import quantize
from thermocline.files.weight import Weight
from thermocline.hardware.cores import find_cores
from thermocline.ops.contract import ALL, Activation, ActiveSet, FfnKind, KVLayer, NeuronBlock
from thermocline.ops.cpu import CpuOps

Call = Callable[[], object]
Floats = npt.NDArray[np.float32]

RING = 288 << 20
"""Bytes of weights that the calls of one op go round."""
PATTERN = 256
"""Rows that are really quantised; more rows are copies of them, which costs a kernel the same."""
BATCH = 512
SHARES = (0.1, 0.2, 0.5, 1.0)
CONTEXTS = (512, 2048, 8192, 32768)
GROUPED = ((32, 8), (16, 2))
"""Heads and the heads of keys and values that they share, beside those of the shape."""
HEAD = 128
"""Numbers of a head."""
SLICE = 0.04
"""Seconds of calls between two probes."""
RANK = 512
REGLU = FfnKind(Activation.RELU, gated=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One op: calls that do the same work on other memory. `moved` (bytes) and `operations` are of one call.

    `arithmetic` says that these bound it, not the bytes.
    """

    op: str
    format: str
    size: str
    calls: tuple[Call, ...]
    moved: float = 0.0
    operations: float = 0.0
    arithmetic: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """One op as it ran. `rate` is 10⁹ bytes or operations a second, `share` that of `peak`, `spread` half the
    middle half of the times over their median."""

    op: str
    format: str
    size: str
    calls: int
    microseconds: float
    spread: float
    moved: float
    operations: float
    rate: float
    unit: str
    peak: float | None
    share: float | None


class Bench:
    """Makes the cases of one shape."""

    def __init__(self, ops: CpuOps, shape: Shape, *, huge_pages: bool, seed: int = 1) -> None:
        self.ops, self.shape, self.huge_pages = ops, shape, huge_pages
        self.rng = np.random.default_rng(seed)

    def cases(self, formats: list[BlockFormat]) -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
        """Groups by name; each makes its cases one after another."""
        every = [fmt for fmt in formats if self.shape.n_embd % fmt.block == 0]
        yield "linear", lambda: itertools.chain.from_iterable(map(self.linear, every))
        yield "ffn", lambda: itertools.chain.from_iterable(map(self.ffn, every))
        yield "predict", lambda: itertools.chain.from_iterable(map(self.predict, every))
        yield "attention", self.attention
        yield "small", self.small
        yield "gemm", lambda: itertools.chain.from_iterable(map(self.gemm, every))

    def linear(self, fmt: BlockFormat) -> Iterator[Case]:
        """Decode through single matrices: output projection, up, head."""
        s = self.shape
        for name, rows in (("attn_output", s.n_embd), ("ffn_up", s.n_ff), ("head", s.n_vocab)):
            x, out = self._normal(1, s.n_embd), np.zeros((1, rows), np.float32)
            ring = self._ring(fmt, rows, s.n_embd)
            moved = fmt.row_bytes(s.n_embd) * rows
            calls = tuple(partial(self.ops.linear, x, (m,), (out,)) for m in ring)
            yield Case(f"linear {name}", fmt.name, f"{rows}x{s.n_embd}", calls, moved, 2.0 * rows * s.n_embd)

    def ffn(self, fmt: BlockFormat) -> Iterator[Case]:
        """Decode through the FFN with a share of the neurons active, all of which fire."""
        s = self.shape
        x, out = np.abs(self._normal(1, s.n_embd)), np.zeros((1, s.n_embd), np.float32)
        for share, ring in self._shares(fmt):
            sets = [[ALL] if share == 1 else self._disjoint(share) for _ in ring]
            # A block's sets follow each other only after all other blocks.
            turns = [
                (block, active) for some in zip(*sets, strict=True) for block, active in zip(ring, some, strict=True)
            ]
            calls = [partial(self.ops.ffn, x, block, active, out, skip_zeros=True) for block, active in turns]
            work = calls[0]()
            rows_read = work.gate_rows + work.up_rows + work.down_rows
            moved = rows_read * fmt.row_bytes(s.n_embd)
            size = f"3x{s.n_ff}x{s.n_embd}"
            yield Case(f"ffn {share:.0%}", fmt.name, size, tuple(calls), moved, 2.0 * rows_read * s.n_embd)
            if share < 1:
                reads = tuple(partial(self._read, block, active.indices) for block, active in turns)
                yield Case(f"rows {share:.0%}", fmt.name, size, reads, moved)

    def _shares(self, fmt: BlockFormat) -> Iterator[tuple[float, list[NeuronBlock]]]:
        """Shares of neurons with blocks that lie as a model's do where it computes so many."""
        for apart, shares in itertools.groupby(SHARES, lambda share: share < 1):
            yield from zip(shares, itertools.repeat(self._neuron_blocks(fmt, apart=apart)), strict=False)

    def _read(self, block: NeuronBlock, rows: npt.NDArray[np.int32] | None) -> None:
        assert rows is not None
        for matrix in (block.gate, block.up, block.down):
            assert matrix is not None
            _native.read_rows(self.ops.context, matrix, rows)

    def predict(self, fmt: BlockFormat) -> Iterator[Case]:
        """Decode through a predictor of rank 512, and the choice of a tenth of the neurons."""
        s = self.shape
        if RANK % fmt.block:
            return
        first, second = self._ring(fmt, RANK, s.n_embd, RING // 2), self._ring(fmt, s.n_ff, RANK, RING // 2)
        x, scores = self._normal(1, s.n_embd), np.zeros((1, s.n_ff), np.float32)
        pairs = list(zip(first, second, strict=False))
        calls = tuple(partial(self.ops.predict, x, a, b, scores) for a, b in pairs)
        moved = fmt.row_bytes(s.n_embd) * RANK + fmt.row_bytes(RANK) * s.n_ff
        yield Case("predict", fmt.name, f"rank {RANK}", calls, moved, 2.0 * RANK * (s.n_embd + s.n_ff))

    def attention(self) -> Iterator[Case]:
        """Decode over caches in F16 and Q8_0, with heads of their own keys and with groups that share them; prefill."""
        s = self.shape
        for fmt, (heads, kv_heads) in itertools.product((F16, Q8_0), ((s.n_head, s.n_head_kv), *GROUPED)):
            for context in CONTEXTS:
                each = 2 * kv_heads * context * fmt.row_bytes(HEAD)
                ring = [
                    KVLayer(*(self._cache(kv_heads, context, fmt) for _ in range(2)))
                    for _ in range(max(2, RING // each))
                ]
                yield self._attention(ring, fmt, heads, 1, context - 1, each)
                if context in (2048, 8192) and (heads, kv_heads) not in GROUPED:
                    yield self._attention(ring, fmt, heads, BATCH, context - BATCH, each)

    def _attention(
        self, ring: list[KVLayer], fmt: BlockFormat, heads: int, tokens: int, start: int, moved: int
    ) -> Case:
        kv_heads = len(ring[0].keys)
        q, out = self._normal(tokens, heads, HEAD), np.zeros((tokens, heads, HEAD), np.float32)
        k, v = (self._normal(tokens, kv_heads, HEAD) for _ in range(2))
        calls = tuple(partial(self.ops.attention, q, k, v, c, start, HEAD**-0.5, 0, out) for c in ring)
        seen = tokens * start + tokens * (tokens + 1) // 2
        size = f"{heads}/{kv_heads} heads, {start + tokens} keys"
        operations = 4.0 * seen * heads * HEAD
        if tokens == 1:
            return Case("attention", fmt.name, size, calls, moved, operations)
        return Case(f"attention of {tokens}", fmt.name, size, calls, moved, operations, arithmetic=True)

    def small(self) -> Iterator[Case]:
        """What is bound by neither memory nor arithmetic."""
        s = self.shape
        x, out = self._normal(1, s.n_embd), np.zeros((1, s.n_embd), np.float32)
        ones = np.ones(s.n_embd, np.float32)
        yield Case("rms_norm", "F32", str(s.n_embd), (lambda: self.ops.rms_norm(x, ones, 1e-5, out),), 12 * s.n_embd)
        heads = self._normal(1, s.n_head, s.head_dim)
        table, at = np.ones((1, 2, s.head_dim // 2), np.float32), np.zeros(1, np.int32)
        rope = (lambda: self.ops.rope((heads,), table, at, interleaved=True),)
        yield Case("rope", "F32", f"{s.n_head}x{s.head_dim}", rope, 8 * s.n_embd)
        scores, indices = self._normal(1, s.n_ff), np.zeros(s.n_ff, np.int32)
        yield Case("select", "F32", str(s.n_ff), (lambda: self.ops.select(scores, 1.28, indices),), 4 * s.n_ff)
        nobody, block = ActiveSet(np.zeros(0, np.int32)), self._neuron_blocks(BY_NAME["Q8_0"], 1)[0]
        yield Case("ffn 0%", "Q8_0", "no rows", (lambda: self.ops.ffn(x, block, nobody, out, skip_zeros=True),))

    def gemm(self, fmt: BlockFormat) -> Iterator[Case]:
        """Prefill of 512 tokens through single matrices."""
        s = self.shape
        for name, rows in (("attn_output", s.n_embd), ("ffn_up", s.n_ff)):
            x, out = self._normal(BATCH, s.n_embd), np.zeros((BATCH, rows), np.float32)
            ring = self._ring(fmt, rows, s.n_embd, RING // 4)
            calls = tuple(partial(self.ops.linear, x, (m,), (out,)) for m in ring)
            operations = 2.0 * BATCH * rows * s.n_embd
            moved = fmt.row_bytes(s.n_embd) * rows + 4 * BATCH * (rows + s.n_embd)
            yield Case(f"gemm {name}", fmt.name, f"{rows}x{s.n_embd}", calls, moved, operations, arithmetic=True)

    def _disjoint(self, share: float) -> list[ActiveSet]:
        """Random active sets of that share, as many as there are without a neuron in common."""
        count, order = round(share * self.shape.n_ff), self.rng.permutation(self.shape.n_ff).astype(np.int32)
        return [ActiveSet(np.sort(order[at : at + count])) for at in range(0, len(order) - count + 1, count)]

    def _normal(self, *shape: int) -> Floats:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def _cache(self, kv_heads: int, context: int, fmt: BlockFormat) -> npt.NDArray[np.generic]:
        """Keys or values as a cache holds them: numbers in F16, bytes in Q8_0."""
        rows = np.resize(quantize(self._normal(PATTERN, HEAD), fmt), (kv_heads, context, fmt.row_bytes(HEAD)))
        return rows.view(np.float16) if fmt is F16 else rows

    def _ring(
        self,
        fmt: BlockFormat,
        rows: int,
        columns: int,
        size: int = RING,
        *,
        positive: bool = False,
        apart: bool = False,
    ) -> list[object]:
        """Matrices of random numbers that fill `size` bytes, at least two."""
        values = self._normal(PATTERN, columns)
        pattern = quantize(np.abs(values) if positive else values, fmt)
        nbytes = rows * pattern.shape[1]
        return [self._place(fmt, rows, columns, pattern, apart) for _ in range(max(2, -(-size // nbytes)))]

    def _place(self, fmt: BlockFormat, rows: int, columns: int, pattern: npt.NDArray[np.uint8], apart: bool) -> object:
        # Private: memory that can be shared gets huge pages only where the system is set up for it.
        memory = mmap.mmap(-1, rows * pattern.shape[1], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE if self.huge_pages else mmap.MADV_NOHUGEPAGE)
        data = np.frombuffer(memory, np.uint8).reshape(rows, -1)
        for start in range(0, rows, PATTERN):
            data[start : start + PATTERN] = pattern[: rows - start]
        weight = Weight("random", fmt, (rows, columns), data)
        better = self.ops.arrangement(fmt, columns, apart=apart) if self.huge_pages else None
        if better is not None:  # as a model is loaded
            weight = self.ops.arrange(weight, data, better)
        return self.ops.place(weight)

    def _neuron_blocks(self, fmt: BlockFormat, count: int = 0, *, apart: bool = True) -> list[NeuronBlock]:
        """Blocks whose gates are positive, so that with a positive input every neuron fires."""
        s = self.shape
        size = 3 * s.n_ff * fmt.row_bytes(s.n_embd)
        blocks = []
        for _ in range(count or max(2, -(-RING // size))):
            gate, up, down = (
                self._ring(fmt, s.n_ff, s.n_embd, 1, positive=positive, apart=apart)[0]
                for positive in (True, False, False)
            )
            blocks.append(NeuronBlock(gate, up, down, records=True, kind=REGLU, neurons=s.n_ff))
        return blocks


def measure(case: Case, probe: Probe, seconds: float, peaks: dict[str, object] | None, *, tiles: bool) -> Measured:
    """Go round the ring for `seconds`, after one round to warm up; at least ten calls.

    With `tiles`, AMX's, all formats are multiplied as BF16.
    """
    for call in case.calls:
        call()
    ring, times = itertools.cycle(case.calls), list[float]()
    read = [probe.read()]
    while sum(times) < seconds or len(times) < 10:
        next(ring)()  # the threads are awake, and the probe is out of the cache
        end = time.perf_counter() + SLICE
        while (began := time.perf_counter()) < end:
            next(ring)()
            times.append(time.perf_counter() - began)
        read.append(probe.read())
    low, middle, high = statistics.quantiles(times, n=4)
    peak: float | None
    if case.arithmetic:
        amount, unit, peak = case.operations, "GOP/s", _arithmetic_peak(case, peaks, tiles)
    else:
        amount, unit, peak = case.moved, "GB/s", statistics.median(read)
    rate = amount / middle / 1e9
    return Measured(
        case.op, case.format, case.size, len(times), middle * 1e6, (high - low) / 2 / middle, case.moved,
        case.operations, rate, unit, peak, rate / peak if peak and case.op not in IN_CACHE else None,
    )  # fmt: skip


IN_CACHE = ("rms_norm", "rope", "select", "ffn 0%")
"""Ops whose data the caches hold; their bytes are no share of the memory's."""


def _arithmetic_peak(case: Case, peaks: dict[str, object] | None, tiles: bool) -> float | None:
    if peaks is None or case.op.startswith("attention"):
        return None
    fmt = BY_NAME[case.format]
    return float(str(peaks["int8" if fmt.block > 1 and not tiles else "f32" if fmt is F32 else "bf16"]))


def row(m: Measured) -> dict[str, object]:
    """A line of the table."""
    return {
        "op": m.op,
        "format": m.format,
        "size": m.size,
        "us": f"{m.microseconds:.1f}",
        "+-": f"{m.spread:.0%}",
        "MB": f"{m.moved / 1e6:.2f}" if m.moved else "",
        "rate": f"{m.rate:.1f} {m.unit}" if m.rate else "",
        "of": f"{m.peak:.1f}" if m.peak else "",
        "share": f"{m.share:.0%}" if m.share else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = ("linear", "ffn", "predict", "attention", "small", "gemm")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, help="groups of ops")
    parser.add_argument(
        "--formats", nargs="+", type=str.upper, choices=BY_NAME, default=[f for f in BY_NAME if f != "F32"]
    )
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="sizes of the model whose layer is measured")
    parser.add_argument("-t", "--threads", type=int, default=find_cores().threads)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--seconds", type=float, default=0.25, help="of each op")
    parser.add_argument("--pages", choices=("small", "huge"), default="huge", help="small with --mmap, mostly")
    add_keeping(parser)
    args = parser.parse_args()
    ops = CpuOps(args.threads, args.isa)
    probe = Probe(ops._context)
    peaks = arithmetic_peaks(args.threads) if "gemm" in args.only else None
    bench = Bench(ops, SHAPES[args.shape], huge_pages=args.pages == "huge")
    about = {"shape": args.shape, "pages": args.pages, "machine": facts(args.threads), "peaks": peaks}
    for name, group in bench.cases([BY_NAME[f] for f in args.formats]):
        if name not in args.only:
            continue
        probe.rates.clear()
        tiles = ops.name == "cpu/amx"
        measured = [measure(case, probe, args.seconds, peaks, tiles=tiles) for case in group()]
        print_table([row(m) for m in measured])
        low, middle, high = statistics.quantiles(probe.rates, n=4)
        print(f"memory reads {low:.1f} to {high:.1f} GB/s (middle half of {len(probe.rates)} passes)\n", flush=True)
        if not args.dry:
            bandwidth = {"low": low, "median": middle, "high": high}
            results = {**about, "read_bandwidth": bandwidth, "ops": [asdict(m) for m in measured]}
            write_results(f"ops/{name}", results, args.into)
    if peaks:
        rates = ", ".join(f"{name} {peaks[name]:.0f} GOP/s" for name in ("int8", "bf16", "f32"))
        print(f"{rates} by {peaks['source']}")


if __name__ == "__main__":
    main()
