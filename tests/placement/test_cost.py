"""The cost model against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.config import Mode
from thermocline.errors import HardwareError, UsageError
from thermocline.files.formats import F16
from thermocline.hardware.machine import (
    ATTENTION_KERNELS,
    FFN_KERNELS,
    HEAD_KERNELS,
    PREDICTOR_KERNELS,
    Calls,
    Corrections,
    Disk,
    Machine,
    Processor,
    ReadCurve,
    Shares,
    Tier,
)
from thermocline.memory.reads import Way, merged
from thermocline.placement.cost import (
    STAGED,
    CostModel,
    FfnMode,
    ffn_mode,
    together,
)
from thermocline.placement.footprint import Footprint
from thermocline.placement.workload import Workload

CPU = Processor(name="cpu", capacity=1 << 36, bandwidth=40e9, bandwidth_busy=30e9, flops=1e15, launch=2e-6)
GPU = Processor(name="gpu", capacity=1 << 34, bandwidth=400e9, bandwidth_busy=350e9, flops=1e15, launch=3e-6)
MACHINE = Machine(name="m", cpu=CPU, gpu=GPU, link=20e9, crossing=25e-6)
N_EMBD, N_FF, CLUSTER = 512, 1024, 128
ROW = 2 * N_EMBD
DECODE = Workload(context=256, prompt=0, output=64)


def model(*, gated: bool = True, rank: int = 0, windows=None) -> Footprint:
    return Footprint.of_sizes(
        "m", n_layer=2, n_embd=N_EMBD, n_ff=N_FF, n_vocab=1000, n_head=8, n_head_kv=4, head_dim=64, gated=gated,
        fmt=F16, predictor_rank=rank, windows=windows,
    )  # fmt: skip


def temperatures() -> np.ndarray:
    return np.tile(np.linspace(0.9, 0.05, N_FF), (2, 1))


def priced(mode: FfnMode, *, machine=MACHINE, workload=DECODE, p=None, footprint=None) -> CostModel:
    footprint = footprint or model(rank=64 if mode is FfnMode.PREDICTED else 0)
    return CostModel(footprint, machine, workload, mode, temperatures() if p is None else p, CLUSTER)


def test_footprint_counts_what_is_stored() -> None:
    f = model(rank=64)
    n_kv = 4 * 64
    assert f.attention[0] == 2 * (2 * 512 * 512 + 2 * n_kv * 512) + 2 * 512 * 4
    assert f.records[0] == (ROW, ROW, ROW)
    assert f.predictor[0] == 2 * (64 * 512 + 1024 * 64)
    assert f.kv_token == 2 * n_kv * 2
    assert f.nbytes == 2 * (f.attention[0] + 3 * ROW * N_FF + f.predictor[0]) + 2 * 1000 * ROW + 512 * 4
    assert f.trunk == f.nbytes - 2 * 3 * ROW * N_FF


def test_attention_reads_weights_and_cache() -> None:
    cost = priced(FfnMode.DENSE)
    f = cost.footprint
    expected = (f.attention[0] + f.kv_token * 32) / 40e9 + ATTENTION_KERNELS * 2e-6
    assert cost.attention(cost.decode, 0, Tier.RAM) == pytest.approx(expected)
    windowed = priced(FfnMode.DENSE, footprint=model(windows=(16, 0)))
    expected = (f.attention[0] + f.kv_token * 16) / 400e9 + ATTENTION_KERNELS * 3e-6
    assert windowed.attention(windowed.decode, 0, Tier.VRAM) == pytest.approx(expected)


def test_calls_that_were_measured_take_the_place_of_launches() -> None:
    measured = Calls(attention=5e-3, predictor=2e-3, ffn=3e-3, head=7e-3)
    called = replace(MACHINE, cpu=replace(CPU, calls=measured), meeting=11e-3, between=13e-3)

    def more(call) -> float:
        return call(priced(FfnMode.PREDICTED, machine=called)) - call(priced(FfnMode.PREDICTED))

    def layer(home: Tier, hot: int):
        return lambda c: float(c.layer(c.decode, 0, home, home, hot, c.clusters).total)

    attention, ffn, predictor = (n * CPU.launch for n in (ATTENTION_KERNELS, FFN_KERNELS, PREDICTOR_KERNELS))
    assert more(lambda c: c.attention(c.decode, 0, Tier.RAM)) == pytest.approx(5e-3 - attention)
    assert more(layer(Tier.RAM, 0)) == pytest.approx(10e-3 - attention - predictor - ffn)
    assert more(layer(Tier.VRAM, 0)) == pytest.approx(3e-3 - ffn)
    clusters = priced(FfnMode.PREDICTED).clusters
    assert more(layer(Tier.VRAM, clusters)) == 0.0  # all on one side: nobody is woken
    assert more(layer(Tier.RAM, clusters)) == pytest.approx(18e-3 - attention - predictor)
    assert more(lambda c: c.head(Tier.RAM)) == pytest.approx(20e-3 - HEAD_KERNELS * CPU.launch)
    corrected = replace(called, corrections=Corrections(between=17e-3))
    assert priced(FfnMode.DENSE, machine=corrected).machine.between_parts == 17e-3


def test_packed_numbers_take_time_to_unpack() -> None:
    slow = replace(MACHINE, cpu=replace(CPU, unpacking=1e9))
    cost, f = priced(FfnMode.DENSE, machine=slow), model()
    assert cost.attention(cost.decode, 0, Tier.RAM) == pytest.approx(
        f.attention_params / 1e9 + ATTENTION_KERNELS * 2e-6
    )
    time = cost.layer(cost.decode, 0, Tier.RAM, Tier.RAM, 0, cost.clusters)
    assert float(time.cold) == pytest.approx(3 * N_EMBD * N_FF / 1e9 + FFN_KERNELS * 2e-6)
    assert cost.head(Tier.RAM) == pytest.approx(1000 * N_EMBD / 1e9 + HEAD_KERNELS * 2e-6)


@pytest.mark.parametrize("mode", list(FfnMode))
def test_each_side_reads_its_expected_bytes(mode: FfnMode) -> None:
    cost, p = priced(mode), temperatures()[0]
    time = cost.layer(cost.decode, 0, Tier.VRAM, Tier.VRAM, 3, 8)

    def nbytes(part: np.ndarray) -> float:
        if mode is FfnMode.DENSE:
            return 3 * ROW * len(part)
        if mode is FfnMode.EXACT:
            return ROW * (len(part) + 2 * part.sum())
        return 3 * ROW * part.sum()

    assert float(time.hot) == pytest.approx(nbytes(p[:384]) / 350e9 + FFN_KERNELS * 3e-6)
    assert float(time.cold) == pytest.approx(nbytes(p[384:]) / 30e9 + FFN_KERNELS * 2e-6)
    crossing = 25e-6 + N_EMBD * 4 / 20e9
    assert float(time.crossing) == pytest.approx(2 * crossing)
    predictor = 2 * (64 * 512 + 1024 * 64) / 400e9 + PREDICTOR_KERNELS * 3e-6 if mode is FfnMode.PREDICTED else 0.0
    assert time.predictor == pytest.approx(predictor)
    assert float(time.total) == pytest.approx(
        time.attention + predictor + 2 * crossing + max(float(time.hot), float(time.cold))
    )


@pytest.mark.parametrize("mode", list(FfnMode))
def test_rows_that_lie_apart_are_read_more_slowly(mode: FfnMode) -> None:
    """The rows of a tenth of the neurons at the sparse rate, those of all as a matrix is."""
    machine = replace(MACHINE, cpu=replace(CPU, sparse=0.5), gpu=replace(GPU, sparse=0.25))
    p = np.tile(np.repeat([1.0, 0.1], N_FF // 2), (2, 1))
    cost = priced(mode, machine=machine, p=p)
    time = cost.layer(cost.decode, 0, Tier.VRAM, Tier.VRAM, 4, 8)
    assert float(time.hot) == pytest.approx(3 * ROW * 512 / 350e9 + FFN_KERNELS * 3e-6)
    whole, few = {FfnMode.DENSE: (3, 0), FfnMode.EXACT: (1, 2), FfnMode.PREDICTED: (0, 3)}[mode]
    read = ROW * (512 * whole + 51.2 * few * 2)
    assert float(time.cold) == pytest.approx(read / 30e9 + FFN_KERNELS * 2e-6, rel=1e-3)
    assert float(cost.layer(cost.decode, 0, Tier.VRAM, Tier.VRAM, 8, 8).hot) == pytest.approx(
        ROW * (512 * (3 + whole) + 51.2 * few * 4) / 400e9 + FFN_KERNELS * 3e-6, rel=1e-3
    )


def test_what_a_run_measured_corrects_decode_steps_part_by_part() -> None:
    off = Corrections(
        attention_vram=2.0, attention_ram=3.0, predictor=5.0, hot=7.0, cold=11.0, crossing=13.0, rest=17.0
    )
    work = Workload(context=2048, prompt=600, output=64)
    plain = priced(FfnMode.PREDICTED, workload=work)
    corrected = priced(FfnMode.PREDICTED, workload=work, machine=replace(MACHINE, corrections=off))
    at = (0, Tier.VRAM, Tier.VRAM, 3, 8)
    before, after = plain.layer(plain.decode, *at), corrected.layer(corrected.decode, *at)
    for name, factor in (("attention", 2), ("predictor", 5), ("hot", 7), ("cold", 11), ("crossing", 13)):
        assert float(getattr(after, name)) == pytest.approx(factor * float(getattr(before, name))), name
    assert corrected.attention(corrected.decode, 0, Tier.RAM) == pytest.approx(
        3 * plain.attention(plain.decode, 0, Tier.RAM)
    )
    assert corrected.head(Tier.RAM) == pytest.approx(17 * plain.head(Tier.RAM))
    prefill, same = (cost.layer(cost.phases[1], *at) for cost in (plain, corrected))
    assert float(prefill.hot) == float(same.hot)
    assert off.times(off).cold == 121.0
    slow = replace(MACHINE, disk=Disk(name="disk", curve=ReadCurve(((4096, 1e8), (1 << 20, 1e9)))))
    read = slow, replace(slow, corrections=replace(off, attention_disk=19.0))
    streamed, measured = (priced(FfnMode.DENSE, machine=m) for m in read)
    assert streamed.attention(streamed.decode, 0, Tier.DISK) > 5 * streamed.attention(streamed.decode, 0, Tier.RAM)
    assert measured.attention(measured.decode, 0, Tier.DISK) == pytest.approx(
        19 * streamed.attention(streamed.decode, 0, Tier.DISK)
    )


def test_one_side_alone_crosses_nothing_and_reads_at_full_rate() -> None:
    cost = priced(FfnMode.DENSE)
    for home, hot, rate, launch in ((Tier.VRAM, 8, 400e9, 3e-6), (Tier.RAM, 0, 40e9, 2e-6)):
        time = cost.layer(cost.decode, 0, home, home, hot, 8)
        assert float(time.crossing) == 0
        work = float(time.hot if home is Tier.VRAM else time.cold)
        assert work == pytest.approx(3 * ROW * N_FF / rate + FFN_KERNELS * launch)


@pytest.mark.parametrize(
    ("home", "predictor", "hot", "crossings"),
    [
        (Tier.VRAM, Tier.VRAM, 8, 0), (Tier.VRAM, Tier.VRAM, 4, 2), (Tier.VRAM, Tier.VRAM, 0, 2),
        (Tier.VRAM, Tier.RAM, 8, 2), (Tier.VRAM, Tier.RAM, 4, 3), (Tier.VRAM, Tier.RAM, 0, 2),
        (Tier.RAM, Tier.RAM, 0, 0), (Tier.RAM, Tier.RAM, 4, 2), (Tier.RAM, Tier.RAM, 8, 2),
        (Tier.RAM, Tier.VRAM, 0, 2), (Tier.RAM, Tier.VRAM, 4, 3), (Tier.RAM, Tier.VRAM, 8, 2),
    ],
)  # fmt: skip
def test_crossings(home: Tier, predictor: Tier, hot: int, crossings: int) -> None:
    cost = priced(FfnMode.PREDICTED)
    time = cost.layer(cost.decode, 0, home, predictor, hot, 8)
    assert float(time.crossing) == pytest.approx(crossings * (25e-6 + N_EMBD * 4 / 20e9))


def test_a_batch_unites_active_sets() -> None:
    one = priced(FfnMode.PREDICTED)
    batch = replace(DECODE, batch=8)
    many = priced(FfnMode.PREDICTED, workload=batch)
    union = 1 - (1 - temperatures()[0]) ** 8
    work = many.layer(many.decode, 0, Tier.RAM, Tier.RAM, 0, 8)
    assert float(work.cold) == pytest.approx(3 * ROW * union.sum() / 40e9 + FFN_KERNELS * 2e-6)
    assert float(work.cold) > float(one.layer(one.decode, 0, Tier.RAM, Tier.RAM, 0, 8).cold)
    dense = priced(FfnMode.DENSE, workload=batch)
    assert float(work.cold) < float(dense.layer(dense.decode, 0, Tier.RAM, Tier.RAM, 0, 8).cold)


def test_many_tokens_are_bound_by_arithmetic() -> None:
    slow = replace(MACHINE, gpu=None, cpu=replace(CPU, flops=1e9))
    cost = priced(FfnMode.DENSE, machine=slow, workload=Workload(context=2048, prompt=512, output=64))
    prefill = cost.phases[1]
    assert (prefill.tokens, prefill.weight) == (512, 1 / 64)
    time = cost.layer(prefill, 0, Tier.RAM, Tier.RAM, 0, 8)
    assert float(time.cold) == pytest.approx(512 * 2 * 3 * N_EMBD * N_FF / 1e9 + FFN_KERNELS * 2e-6)


def test_prefill_streams_cold_weights_where_the_cpu_is_slower() -> None:
    slow = replace(MACHINE, cpu=replace(CPU, flops=1e10))
    cost = priced(FfnMode.DENSE, machine=slow, workload=Workload(context=2048, prompt=512, output=64))
    time = cost.layer(cost.phases[1], 0, Tier.VRAM, Tier.VRAM, 2, 8)
    assert bool(time.streamed)
    assert float(time.hot) == pytest.approx(3 * ROW * 768 / 20e9)
    assert float(time.cold) == 0
    assert not bool(cost.layer(cost.decode, 0, Tier.VRAM, Tier.VRAM, 2, 8).streamed)


def test_prompts_stream_at_what_the_link_and_the_ram_leave_each_other() -> None:
    slow, work = replace(CPU, flops=1e10), Workload(context=2048, prompt=512, output=64)

    def sent(ram: float, **shares: float) -> float:
        machine = replace(MACHINE, cpu=replace(slow, bandwidth=ram, bandwidth_busy=ram), shares=Shares(**shares))
        cost = priced(FfnMode.DENSE, machine=machine, workload=work)
        time = cost.layer(cost.phases[1], 0, Tier.VRAM, Tier.VRAM, 2, 8)
        assert bool(time.streamed)
        return float(time.hot)

    nbytes = 3 * ROW * 768
    assert sent(40e9, link_beside_ram=0.5) == pytest.approx(nbytes / 10e9)
    assert sent(40e9, ram_beside_link=0.25) == pytest.approx(nbytes * STAGED / 10e9)
    assert sent(20e9) == pytest.approx(nbytes * STAGED / 20e9)
    computed = 3 * ROW * N_FF / 400e9 + FFN_KERNELS * 3e-6
    beside = sent(40e9, vram_beside_link=0.5, link_beside_vram=0.8)
    assert beside == pytest.approx(nbytes / 20e9 + 0.2 * 2 * computed)


def test_what_is_read_from_disk_and_what_is_computed_slow_each_other() -> None:
    curve = ReadCurve(((1024, 1e9), (1 << 20, 1e9)))
    machine = replace(MACHINE, disk=Disk(name="d", curve=curve))
    shared = replace(machine, shares=Shares(ram_beside_disk=0.5, disk_beside_ram=0.8))
    plain, cost = (priced(FfnMode.DENSE, machine=m) for m in (machine, shared))
    at, launches = (0, Tier.RAM, Tier.RAM, 0, 4), FFN_KERNELS * 2e-6
    alone, beside = (float(c.layer(c.decode, *at).cold) for c in (plain, cost))
    computed, read = 3 * ROW * N_FF / 40e9, 3 * ROW * 512 / 1e9
    assert alone == pytest.approx(read + launches)
    assert beside == pytest.approx(read + computed / 0.5 * 0.2 + launches)
    for c in (plain, cost):
        assert float(c.layer(c.decode, 0, Tier.RAM, Tier.RAM, 0, 8).cold) == pytest.approx(computed + launches)
    assert cost.attention(cost.decode, 0, Tier.DISK) > plain.attention(plain.decode, 0, Tier.DISK)
    assert cost.head(Tier.DISK) > plain.head(Tier.DISK)


@given(*[st.floats(0, 10)] * 2, *[st.floats(0.05, 1)] * 2)
def test_two_at_once_take_at_least_the_longer_and_at_most_both(a: float, b: float, left: float, right: float) -> None:
    both = float(together(a, b, left, right))
    assert max(a, b) <= both + 1e-9
    assert both <= a + b + 1e-9
    assert both == pytest.approx(float(together(b, a, right, left)))
    assert float(together(a, b, 1, 1)) == pytest.approx(max(a, b))
    assert float(together(a, 0.0, left, right)) == pytest.approx(a)
    assert float(together(a + 1, b, left, right)) >= both - 1e-9


def test_a_long_prompt_leaves_the_predictor_out() -> None:
    long = priced(FfnMode.PREDICTED, workload=Workload(context=2048, prompt=512, output=64))
    short = priced(FfnMode.PREDICTED, workload=Workload(context=2048, prompt=2, output=64), p=temperatures() / 4)
    assert long.phases[1].mode is FfnMode.EXACT
    assert short.phases[1].mode is FfnMode.PREDICTED


def test_unknown_temperatures_promise_nothing() -> None:
    known, unknown = priced(FfnMode.EXACT), CostModel(model(), MACHINE, DECODE, FfnMode.EXACT, None, CLUSTER)
    dense = priced(FfnMode.DENSE)
    at = (0, Tier.RAM, Tier.RAM, 0, 8)
    assert float(unknown.layer(unknown.decode, *at).total) == float(dense.layer(dense.decode, *at).total)
    assert float(known.layer(known.decode, *at).total) < float(unknown.layer(unknown.decode, *at).total)
    assert unknown.hot_share(0, 4) == pytest.approx(0.5)


def test_disk_reads_first_rows_in_one_piece_and_the_rest_by_runs() -> None:
    curve = ReadCurve(((1024, 1e8), (1 << 20, 1e9)))
    machine = replace(MACHINE, disk=Disk(name="d", curve=curve))
    p = np.full((2, N_FF), 0.1)
    exact = priced(FfnMode.EXACT, machine=machine, p=p)
    time = exact.layer(exact.decode, 0, Tier.RAM, Tier.RAM, 0, 4)
    gates = 512 * ROW / curve.bandwidth(512 * ROW)
    by_run = {r: 512 * (1 - 0.9**r) * 2 * ROW / curve.bandwidth(2 * ROW * r) for r in (2**i for i in range(11))}
    assert float(time.disk) == pytest.approx(gates + min(by_run.values()))
    assert int(time.run) == min(by_run, key=lambda r: by_run[r])
    assert float(exact.layer(exact.decode, 0, Tier.RAM, Tier.RAM, 0, 8).disk) == 0
    predicted = priced(FfnMode.PREDICTED, machine=machine, p=p)
    time = predicted.layer(predicted.decode, 0, Tier.RAM, Tier.RAM, 0, 4)
    by_run = {r: 512 * (1 - 0.9**r) * 3 * ROW / curve.bandwidth(3 * ROW * r) for r in (2**i for i in range(11))}
    assert float(time.disk) == pytest.approx(min(by_run.values()))


@pytest.mark.parametrize("points", [((4096, 3e8), (1 << 20, 18e8)), ((4096, 1e6), (1 << 20, 15e7))])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.4, 0.9])
def test_scattered_pieces_take_as_long_as_the_reads_that_are_made_of_them(points, share: float) -> None:
    curve, of, size, rng = ReadCurve(points), 6000, 2 * 4096, np.random.default_rng(1)
    made, wanted = [], round(share * of)
    for _ in range(20):
        offsets = np.sort(rng.choice(of, wanted, replace=False)) * size
        pieces = np.stack([offsets, np.full(wanted, size), offsets], axis=1)
        reads = merged(pieces, Way(curve.gap, of * size))[0][:, 1]
        made.append(reads.sum() / curve.bandwidth(reads.mean()))
    assert float(curve.scattered(np.array([1.0 * wanted]), of, size)[0]) == pytest.approx(np.mean(made), rel=0.05)
    nothing, one = curve.scattered(np.array([0.0, 1.0]), of, size).tolist()
    assert (nothing, one) == (0.0, pytest.approx(size / curve.bandwidth(size)))


def test_neurons_that_lie_anywhere_in_the_file_are_priced_so() -> None:
    curve = ReadCurve(((4096, 1e8), (1 << 20, 1e9)))
    machine = replace(MACHINE, disk=Disk(name="d", curve=curve))
    p = np.full((2, N_FF), 0.1)
    work, f = DECODE, model()
    ordered, anywhere = (
        CostModel(f, machine, work, FfnMode.EXACT, p, CLUSTER, scattered=scattered) for scattered in (False, True)
    )
    warm = np.arange(9)
    one, two = (c.layer(c.decode, 0, Tier.RAM, Tier.RAM, 0, warm).disk for c in (ordered, anywhere))
    rows = (8 - warm) * CLUSTER
    rest = curve.scattered(0.1 * rows, N_FF, 2 * ROW)
    first = np.minimum(curve.scattered(1.0 * rows, N_FF, ROW), N_FF * ROW / curve.bandwidth(N_FF * ROW))
    np.testing.assert_allclose(two, np.minimum(first + rest, curve.scattered(1.0 * rows, N_FF, 3 * ROW)))
    assert (two[1:-1] > one[1:-1]).all()
    assert two[-1] == one[-1] == 0


def test_exact_passes_of_many_tokens_read_all_records() -> None:
    """Short ones read the first rows and what these let through."""
    machine = replace(MACHINE, disk=Disk(name="d", curve=ReadCurve(((1024, 1e9), (1 << 20, 1e9)))))
    p = np.full((2, N_FF), 0.05)
    cost = priced(FfnMode.EXACT, machine=machine, p=p)
    for warm in (0, 7):
        found = float(cost.layer(cost.decode, 0, Tier.RAM, Tier.RAM, 0, warm).disk)
        assert found == pytest.approx((8 - warm) * CLUSTER * (1 + 0.05 * 2) * ROW / 1e9)
    batch = priced(FfnMode.EXACT, machine=machine, p=p, workload=replace(DECODE, batch=5))
    assert float(batch.layer(batch.decode, 0, Tier.RAM, Tier.RAM, 0, 0).disk) == pytest.approx(N_FF * 3 * ROW / 1e9)


def test_no_disk_no_disk_tier() -> None:
    cost = priced(FfnMode.EXACT)
    with pytest.raises(HardwareError, match="no disk"):
        cost.layer(cost.decode, 0, Tier.RAM, Tier.RAM, 0, 4)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(FfnMode)), st.integers(0, 8), st.sampled_from([Tier.VRAM, Tier.RAM]), st.booleans())
def test_tables_equal_single_prices(mode: FfnMode, hot: int, home: Tier, long: bool) -> None:
    cost = priced(mode, workload=Workload(context=2048, prompt=600 if long else 3, output=64))
    for phase in cost.phases:
        table = cost.layer(phase, 1, home, Tier.RAM, np.arange(9), np.full(9, 8))
        assert float(cost.layer(phase, 1, home, Tier.RAM, hot, 8).total) == float(table.total[hot])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 3)), "needs"), (np.full((2, N_FF), 1.5), "probabilities"), (np.full((2, N_FF), np.nan), "prob"),
        (np.full((2, N_FF), -0.1), "probabilities"), (temperatures()[:, ::-1], "hottest first"),
    ],
)  # fmt: skip
def test_impossible_temperatures_are_refused(bad: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        priced(FfnMode.EXACT, p=bad)


def test_other_refusals() -> None:
    with pytest.raises(UsageError, match="cluster"):
        CostModel(model(), MACHINE, DECODE, FfnMode.DENSE, None, 0)
    with pytest.raises(UsageError, match="no predictor"):
        CostModel(model(), MACHINE, DECODE, FfnMode.PREDICTED)
    with pytest.raises(UsageError, match="cannot price"):
        ffn_mode(Mode.AUTO)
    assert ffn_mode(Mode.EXACT) is FfnMode.EXACT
    with pytest.raises(UsageError, match="do not fit a context"):
        Workload(context=100, prompt=60, output=60)
    with pytest.raises(UsageError, match="--parallel is 0"):
        Workload(batch=0)
    with pytest.raises(UsageError, match="--latency-target is nan"):
        Workload(first_token_ms=float("nan"))
    with pytest.raises(HardwareError, match="no GPU"):
        replace(MACHINE, gpu=None).processor(Tier.VRAM)
