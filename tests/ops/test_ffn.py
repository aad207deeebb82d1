import math
from dataclasses import replace

import numpy as np
import pytest

from thermocline.files.formats import BF16, BY_NAME, F16, F32, Q4_0, Q8_0
from thermocline.files.quantize import to_float
from thermocline.files.weight import Weight
from thermocline.ops.contract import ALL, Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps

EPS = 2.0**-24
ERF = np.vectorize(math.erf, otypes=[np.float64])
SELDOM = ("Q4_K", "Q5_K", "Q6_K", "BF16")
KINDS = {
    "swiglu": FfnKind(Activation.SILU, gated=True),
    "reglu": FfnKind(Activation.RELU, gated=True),
    "fatrelu": FfnKind(Activation.RELU, gated=True, threshold=0.5),
    "drelu": FfnKind(Activation.RELU, gated=True, both=True),
    "relu": FfnKind(Activation.RELU, gated=False),
    "relu2": FfnKind(Activation.RELU2, gated=False),
    "silu": FfnKind(Activation.SILU, gated=False),
    "gelu": FfnKind(Activation.GELU, gated=False),
    "relu2 gated": FfnKind(Activation.RELU2, gated=True, threshold=0.2),
}


def make_block(weight, make, fmt, neurons, width, kind, *, records=True, down=None, biased=False):
    """Weights of a block; `make` gives its values by shape."""
    shape = (neurons, width)
    return NeuronBlock(
        gate=weight(make(shape), fmt) if kind.gated else None,
        up=weight(make(shape), fmt),
        down=weight(make(shape if records else shape[::-1]), down or fmt),
        records=records,
        kind=kind,
        neurons=neurons,
        up_bias=make((neurons,)) if biased else None,
    )


def placed(ops, block):
    gate = None if block.gate is None else ops.place(block.gate)
    return replace(block, gate=gate, up=ops.place(block.up), down=ops.place(block.down))


def act(x, error, kind):
    """The activation, and how far it may be off where its argument is off by `error`."""
    if kind.activation is Activation.SILU:
        # Its slope is at most 1.1; exponential, sum and division round a few times.
        return x / (1 + np.exp(-x)), 1.1 * error + 8 * EPS * np.abs(x)
    if kind.activation is Activation.GELU:
        # Its slope is at most 1.13; the polynomial is good to 5e-8, and the exponent's rounding is amplified by x² / 2,
        # of which the value's fall leaves less than 1.
        return x * 0.5 * (1 + ERF(x / np.sqrt(2))), 1.13 * error + 16 * EPS * np.abs(x)
    kept = np.where(x > kind.threshold, x, 0)
    # Where the argument may fall on the other side of the threshold, the value may jump by all of it.
    off = error + np.where(np.abs(x - kind.threshold) <= error, kind.threshold, 0)
    if kind.activation is Activation.RELU:
        return kept, off
    return kept**2, (2 * np.abs(kept) + off) * off + 2 * EPS * kept**2


def product(a, da, b, db):
    return np.abs(a) * db + np.abs(b) * da + da * db + 2 * EPS * np.abs(a * b)


def hidden_bound(linear_bound, x, block):
    """How far activations (T, neurons) may be off, from the bounds of the products that they are made of."""
    wide = x.astype(np.float64)
    up = to_float(block.up).astype(np.float64)
    u, du = wide @ up.T, linear_bound(x, up, block.up.format)
    if block.up_bias is not None:
        u = u + block.up_bias
        du = du + EPS * np.abs(u)
    if block.gate is None:
        return act(u, du, block.kind)[1]
    gate = to_float(block.gate).astype(np.float64)
    g, dg = act(wide @ gate.T, linear_bound(x, gate, block.gate.format), block.kind)
    if block.kind.both:
        u, du = act(u, du, block.kind)
    return product(g, dg, u, du)


def check(ops, reference, fence, linear_bound, x, block, active, *, skip):
    """Activations and result against the reference, and the result against the activations, which is far tighter."""
    tokens, width = x.shape
    out, hidden = fence((tokens, width), fill=0.25), fence((tokens, block.neurons), fill=9)
    expected, expected_hidden = np.full((tokens, width), 0.25, np.float32), np.empty_like(hidden.array)
    work = ops.ffn(x, placed(ops, block), active, out.array, skip_zeros=skip, hidden=hidden.array)
    reference.ffn(x, block, active, expected, skip_zeros=skip, hidden=expected_hidden)
    h = hidden.check().astype(np.float64)
    off = hidden_bound(linear_bound, x, block)
    assert (np.abs(h - expected_hidden) <= off + EPS * np.abs(expected_hidden)).all()
    stored = to_float(block.down).astype(np.float64)
    rows = stored.T if block.records else stored
    # A standard matrix rounds h like any other input.
    fmt, summed, bound = block.down.format, rows, linear_bound
    if block.records:
        summed, bound = linear_bound.summed(stored, fmt).T, linear_bound.of_records
    own = 0.25 + h @ rows.T
    assert (np.abs(out.check() - own) <= bound(h, summed, fmt) + 2 * EPS * (np.abs(own) + 0.25)).all()
    reach = bound(np.abs(h) + off, rows, fmt) + 2 * EPS * (np.abs(expected) + 0.25)
    assert (np.abs(out.array - expected) <= off @ np.abs(rows).T + reach).all()
    return work, hidden.array


def count(work, hidden, block, active, skip):
    """Fired and down rows follow from the activations."""
    rows = block.neurons if active.indices is None else len(active.indices)
    assert work.gate_rows == (rows if block.gate is not None else 0)
    assert work.fired == np.count_nonzero(hidden)
    touched = int((hidden != 0).any(axis=0).sum())
    assert work.down_rows == (touched if skip and block.records else rows)
    if not skip or block.gate is None:
        assert work.up_rows == rows
    else:
        assert touched <= work.up_rows <= rows


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("name", KINDS)
def test_records_agree_with_reference(ops, reference, rng, weight, fence, linear_bound, fewer, fmt, name):
    def make(shape):
        return rng.standard_normal(shape).astype(np.float32)

    kind = KINDS[name]
    if fewer(False, fmt.name in SELDOM and name not in ("reglu", "relu")):
        pytest.skip("each format with two kinds, and each kind with four formats, are enough where it takes seconds")
    few = [(20, 64, 1)] if fmt.name in SELDOM else [(20, 64, 1), (17, 32, 3)]
    for neurons, width, tokens in fewer([(1, 32, 1), (17, 64, 3), (300, 96, 1), (290, 160, 5)], few):
        width = -width // fmt.block * -fmt.block
        block = make_block(weight, make, fmt, neurons, width, kind, biased=neurons % 2 == 0)
        some = ActiveSet(np.flatnonzero(rng.random(neurons) < 0.4).astype(np.int32))
        x = make((tokens, width))
        for active in (ALL, some):
            for skip in (False, True):
                work, hidden = check(ops, reference, fence, linear_bound, x, block, active, skip=skip)
                count(work, hidden, block, active, skip)


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["swiglu", "relu", "gelu"])
def test_the_standard_layout_agrees_with_reference(ops, reference, rng, weight, fence, linear_bound, fewer, fmt, name):
    def make(shape):
        return rng.standard_normal(shape).astype(np.float32)

    if fewer(False, fmt.name in SELDOM and name != "swiglu"):
        pytest.skip("each format with one kind, and each kind with four formats, are enough where it takes seconds")
    for neurons, width, tokens in fewer([(32, 32, 1), (288, 96, 1), (96, 64, 17)], [(32, 96, 1), (40, 64, 9)]):
        neurons, width = (-n // fmt.block * -fmt.block for n in (neurons, width))
        block = make_block(weight, make, fmt, neurons, width, KINDS[name], records=False, biased=width > 64)
        some = ActiveSet(np.arange(0, neurons, 3, dtype=np.int32))
        x = make((tokens, width))
        for active in (ALL, some):
            work, hidden = check(ops, reference, fence, linear_bound, x, block, active, skip=True)
            count(work, hidden, block, active, skip=False)


def test_odd_widths_and_mixed_formats(ops, reference, skewed, weight, fence, linear_bound):
    for width in (1, 15, 17, 37):
        block = make_block(weight, skewed, F16, 40, width, KINDS["reglu"], down=F32)
        check(ops, reference, fence, linear_bound, skewed((2, width)), block, ALL, skip=True)
    for up, down in [(Q4_0, Q8_0), (BF16, Q4_0), (Q8_0, F16)]:
        block = make_block(weight, skewed, up, 70, 64, KINDS["reglu"], down=down)
        check(ops, reference, fence, linear_bound, skewed((3, 64)), block, ALL, skip=True)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_nobody_active_changes_nothing(ops, rng, weight, tokens):
    make = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    nobody = ActiveSet(np.empty(0, np.int32))
    for records in (True, False):
        block = make_block(weight, make, F32, 32, 32, KINDS["reglu"], records=records)
        out, hidden = np.full((tokens, 32), 1.5, np.float32), np.ones((tokens, 32), np.float32)
        used = np.zeros((3, 32), np.float32)
        ops.ffn(make((3, 32)), placed(ops, block), ALL, used, skip_zeros=True)  # leaves its numbers in scratch memory
        work = ops.ffn(make((tokens, 32)), placed(ops, block), nobody, out, skip_zeros=True, hidden=hidden)
        assert work == (0, 0, 0, 0)
        assert (out == 1.5).all()
        assert not hidden.any()


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_counts_are_exact_where_the_arithmetic_is(ops, reference, rng, weight, fewer, fmt):
    """Small whole numbers, with 127 in every block, survive every rounding: even the reference's counts agree."""

    def whole(shape):
        values = rng.integers(-7, 8, shape).astype(np.float32)
        values[..., ::32] = 127 if fmt is Q8_0 else -8
        return values

    names = ("reglu", "drelu", "relu", "relu2")
    for name in fewer(names, names if fmt in (F16, Q4_0) else names[:1]):
        block = make_block(weight, whole, fmt, fewer(200, 60), 64, KINDS[name])
        for tokens in (1, 4):
            x = whole((tokens, 64))
            x[:, ::32] = 127 * rng.choice([-1, 1], (tokens, 2))
            for active in (ALL, ActiveSet(np.arange(5, block.neurons - 9, 2, dtype=np.int32))):
                for skip in (False, True):
                    out, expected = np.zeros((tokens, 64), np.float32), np.zeros((tokens, 64), np.float32)
                    work = ops.ffn(x, placed(ops, block), active, out, skip_zeros=skip)
                    assert work == reference.ffn(x, block, active, expected, skip_zeros=skip)


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["reglu", "drelu", "relu2", "fatrelu", "relu"])
def test_the_sum_is_the_same_whatever_is_skipped_and_shared(team, skewed, weight, company, fmt, name):
    neurons, width, tokens = 700, 288 if fmt.block < 256 else 512, 35
    block = make_block(weight, skewed, fmt, neurons, width, KINDS[name], biased=name in {"relu", "reglu"})
    x = skewed((tokens, width))
    for active in (ALL, ActiveSet(np.arange(0, neurons, 3, dtype=np.int32))):
        results = set()
        for ops in team:
            at = placed(ops, block)
            for skip in (False, True):
                out, hidden = np.zeros((tokens, width), np.float32), np.empty((tokens, neurons), np.float32)
                ops.ffn(x, at, active, out, skip_zeros=skip, hidden=hidden)
                results.add(out.tobytes() + hidden.tobytes())
                few = company(ops, fmt)
                for end in (few, 20):
                    part = np.zeros((few, width), np.float32)
                    ops.ffn(x[end - few : end], at, active, part, skip_zeros=skip)
                    assert part.tobytes() == out[end - few : end].tobytes()
        assert len(results) == 1


@pytest.mark.parametrize("fmt", [F32, F16, Q8_0, Q4_0], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["reglu", "drelu", "relu", "relu2 gated"])
def test_where_rows_lie_does_not_matter(ops, reference, rng, skewed, weight, fmt, name, fewer):
    """Bit for bit; rows that nobody points to hold NaN."""
    if fewer(False, fmt not in (F16, Q4_0) and name != "reglu"):
        pytest.skip("each format with one kind, and each kind with two formats, are enough where it takes seconds")
    neurons, slots, width = *fewer((300, 420), (30, 42)), 64
    block = make_block(weight, skewed, fmt, neurons, width, KINDS[name], biased=name == "relu")
    places = rng.permutation(slots)[:neurons].astype(np.int32)

    def scattered(whole):
        if whole is None:
            return None
        data = np.full((slots, whole.data.shape[1]), 255, np.uint8)
        data[places] = whole.data
        return Weight(whole.name, whole.format, (slots, width), data)

    spread = replace(block, gate=scattered(block.gate), up=scattered(block.up), down=scattered(block.down), rows=places)
    some = ActiveSet(np.flatnonzero(rng.random(neurons) < 0.3).astype(np.int32))
    absent = places.copy()
    absent[np.setdiff1d(np.arange(neurons), some.indices)] = -1
    for tokens in (1, 5):
        x = skewed((tokens, width))
        for active, rows in ((ALL, places), (some, places), (some, absent)):
            for skip in (False, True):
                for side in (ops, reference):
                    one, two = np.zeros((tokens, width), np.float32), np.zeros((tokens, width), np.float32)
                    h, g = np.empty((tokens, neurons), np.float32), np.empty((tokens, neurons), np.float32)
                    work = side.ffn(x, placed(side, block), active, one, skip_zeros=skip, hidden=h)
                    at = placed(side, replace(spread, rows=rows))
                    assert side.ffn(x, at, active, two, skip_zeros=skip, hidden=g) == work
                    assert one.tobytes() == two.tobytes()
                    assert h.tobytes() == g.tobytes()


def test_gelu_is_exact_from_end_to_end(ops, weight, fewer):
    """Every magnitude, both tails, infinities and NaN: one neuron with weight 1 shows the activation itself."""
    numbers = np.linspace(-20, 20, fewer(4001, 801))
    x = np.concatenate([numbers, [-1e30, 1e30, np.inf, np.nan, 0.0, -0.0, 1e-40]])[:, None]
    x = x.astype(np.float32)
    one = weight(np.ones((1, 1), np.float32), F32)
    block = NeuronBlock(None, one, one, True, KINDS["gelu"], 1)
    hidden, out = np.empty_like(x), np.zeros_like(x)
    ops.ffn(x, placed(ops, block), ALL, out, skip_zeros=False, hidden=hidden)
    expected = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x[:, 0].astype(np.float64)])
    # From -13.2 on the exponential is 0, and so is the value to float32.
    off = 64 * EPS * np.abs(expected) + 2.0**-126
    finite = np.isfinite(expected)
    assert (np.abs(hidden[finite, 0] - expected[finite]) <= off[finite]).all()
    assert hidden[-5, 0] == np.inf
    assert np.isnan(hidden[-4, 0])


@pytest.mark.parametrize("fmt", [F16, *(f for f in BY_NAME.values() if f.block > 1)], ids=lambda f: f.name)
def test_many_threads_share_the_columns(team, rng, weight, fmt):
    """From four threads on, the columns of a group's rows are shared too: in parts that are no power of two, and with
    columns left over that are no whole vector of blocks."""
    neurons, width = 130, 1024 if fmt.block == 256 else 1056
    make = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    block, x = make_block(weight, make, fmt, neurons, width, KINDS["reglu"]), make((1, width))
    results = []
    for ops in (*team, *(CpuOps(threads, team[0].name.removeprefix("cpu/")) for threads in (4, 7, 12))):
        out = np.zeros((1, width), np.float32)
        ops.ffn(x, placed(ops, block), ALL, out, skip_zeros=True)
        results.append(out.tobytes())
    assert len(set(results)) == 1


def test_a_batch_beyond_one_slice(team, rng, weight):
    """More tokens than fit the scratch at once are cut; sums and counts do not show where."""
    neurons, width, tokens = 1 << 19, 1, 20  # 16 tokens of 2^19 neurons fill 64 MiB
    make = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ops = team[1]
    at = placed(ops, make_block(weight, make, F32, neurons, width, KINDS["reglu"]))
    # The first slice opens the neurons of one sign, the second those of the other.
    x, out = np.abs(make((tokens, width))), np.zeros((tokens, width), np.float32)
    x[16:] *= -1
    work = ops.ffn(x, at, ALL, out, skip_zeros=True)
    single, fired, opened, summed = np.zeros((1, width), np.float32), 0, 0, 0
    for t in (0, tokens - 1):
        single[...] = 0
        ops.ffn(x[t : t + 1], at, ALL, single, skip_zeros=True)
        assert single.tobytes() == out[t].tobytes()
    for sign in (1, -1):
        probe = np.full((1, 1), sign, np.float32)
        part = ops.ffn(probe, at, ALL, np.zeros((1, 1), np.float32), skip_zeros=True)
        fired += part.fired * int((np.sign(x) == sign).sum())
        opened += part.up_rows
        summed += part.down_rows
    assert work.fired == fired
    assert (work.up_rows, work.down_rows) == (opened, summed)
