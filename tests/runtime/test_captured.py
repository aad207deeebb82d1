"""A recorded decode step computes what the plain step computes, and its CPU side may fail without a hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.activity.predictor import Predictor
from thermocline.api import LLM
from thermocline.config import CacheType, CrossingKind, Mode
from thermocline.errors import HangError, HardwareError, UsageError
from thermocline.files.open import open_model
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.crossing import choose
from thermocline.ops.cuda.layout import cached as parts_of
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.cuda.streams import Streams
from thermocline.ops.device import Host
from thermocline.ops.handover import Fault
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.runtime.captured import CapturedStep

pytestmark = pytest.mark.usefixtures("machine_home", "worth_a_gpu")

VRAM, RAM = Tier.VRAM, Tier.RAM
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a fake GPU needs interpreted kernels")
WAY = CrossingKind.PLAIN if INTERPRETED else CrossingKind.MEMORY
BUDGET = "10MiB" if INTERPRETED else "3GiB"
PROMPT, STEPS = [5, 9, 2, 7], [4, 1, 8]
HERE, THERE = LayerSeat(RAM, 0, 96), LayerSeat(VRAM, 96, 96)


def load(
    path: Any, hot: tuple[int, ...], entry: Tier = RAM, predictor: Predictor | None = None
) -> tuple[Transformer, KVCache]:
    return load_source(open_model(path), hot, entry, predictor)


def load_source(
    source: Any, hot: tuple[int, ...], entry: Tier = RAM, predictor: Predictor | None = None
) -> tuple[Transformer, KVCache]:
    return load_seats(source, Seating(entry, VRAM, tuple(LayerSeat(VRAM, depth, 96) for depth in hot)), predictor)


def load_seats(
    source: Any, seats: Seating, predictor: Predictor | None = None, cached: CacheType = CacheType.F16
) -> tuple[Transformer, KVCache]:
    mode = Mode.AUTO if predictor is None else Mode.PREDICTED
    memory = Memory({VRAM: CudaDevice(CudaOps(tf32=False)), RAM: Host(CpuOps(1))}, {VRAM: 1 << 30})
    transformer, _ = load_transformer(source, memory, seats=seats, n_ctx=32, mode=mode, predictor=predictor)
    cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 32, cached, cached)
    prompt = np.array(PROMPT, np.int32)
    transformer.step(prompt, (Segment(cache, 0, len(prompt)),), transformer.workspace(len(prompt)), Outputs.NONE)
    return transformer, cache


def plainly(transformer: Transformer, cache: KVCache) -> list[np.ndarray]:
    workspace, rows = transformer.workspace(1), []
    for token in STEPS:
        segment = Segment(cache, cache.length, 1)
        result = transformer.step(np.array([token], np.int32), (segment,), workspace)
        rows.append(transformer.ops.to_host(result.logits)[0].copy())
    cache.truncate(len(PROMPT))
    return rows


@pytest.mark.parametrize(("hot", "entry"), [((96, 96), VRAM), ((32, 64), RAM), ((0, 96), VRAM)])
def test_a_recorded_step_is_the_plain_step(tiny_model: Any, hot: tuple[int, ...], entry: Tier) -> None:
    transformer, cache = load(tiny_model, hot, entry)
    expected = plainly(transformer, cache)
    step = CapturedStep(transformer, cache)
    assert step.way is (None if hot == (96, 96) else WAY)
    for token, wanted in zip(STEPS, expected, strict=True):
        logits, there, here = step.run(token, cache.length)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        assert there.up_rows == sum(hot)
        assert here.up_rows == sum(96 - depth for depth in hot)
    assert cache.length == len(PROMPT) + len(STEPS)


def test_a_cache_in_q8_0_is_each_layers_on_its_own_device(make_opt: Callable[[], Any]) -> None:
    """Of the same keys and values each device makes the same bytes, in its own order; and steps answer alike."""
    answers = []
    for seats in ((HERE, THERE), (THERE, HERE), (THERE, THERE)):
        transformer, cache = load_seats(make_opt(), Seating(RAM, VRAM, seats), cached=CacheType.Q8_0)
        expected = plainly(transformer, cache)
        step = CapturedStep(transformer, cache)
        for token, wanted in zip(STEPS, expected, strict=True):
            logits, _, _ = step.run(token, cache.length)
            np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        keys = cache.layers[0].keys
        if seats[0] is THERE:
            numbers, scales = (part.cpu().numpy() for part in parts_of(keys, 32) if part is not None)
        else:
            numbers, scales = keys[..., 2:].view(np.int8), keys[..., :2].copy().view(np.float16)
        answers.append((expected[0], numbers[:, : len(PROMPT)], scales[:, : len(PROMPT)]))
    for logits, numbers, scales in answers[1:]:
        assert np.abs(numbers.astype(int) - answers[0][1]).max() <= 1
        np.testing.assert_allclose(scales, answers[0][2], rtol=2.0**-10)
        assert np.abs(logits - answers[0][0]).max() <= 0.02 * np.abs(logits).max()


@pytest.mark.parametrize("hot", [(32, 64), (96, 0)])
def test_each_side_computes_what_is_predicted_of_its_own_neurons(tiny_model: Any, oracle: Any, hot: Any) -> None:
    with open_model(tiny_model) as source:
        predictor = oracle(source)
    exact, cache = load(tiny_model, hot)
    wanted, *counts = CapturedStep(exact, cache).run(4, len(PROMPT))
    predicted, cache = load(tiny_model, hot, predictor=predictor)
    ready = [replace(x, predictor=replace(x.predictor, tokens=1)) for x in predicted.layers if x.predictor is not None]
    logits, there, here = CapturedStep(replace(predicted, layers=tuple(ready)), cache).run(4, len(PROMPT))
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert (there.fired, here.fired) == tuple(count.fired for count in counts)
    assert there.up_rows + here.up_rows == there.fired + here.fired


@pytest.mark.parametrize("homes", [(HERE, THERE), (THERE, HERE), (HERE, HERE), (HERE, LayerSeat(VRAM, 32, 96))])
@pytest.mark.parametrize(("entry", "head"), [(VRAM, VRAM), (RAM, VRAM), (RAM, RAM)])
@pytest.mark.parametrize("predicts", [False, True])
def test_layers_of_the_cpu_are_in_the_recorded_step(
    tiny_model: Any, oracle: Any, homes: tuple[LayerSeat, ...], entry: Tier, head: Tier, predicts: bool
) -> None:
    source = open_model(tiny_model)
    transformer, cache = load_seats(
        source, Seating(entry, head, homes), oracle(source, shares=0.05) if predicts else None
    )
    if VRAM not in {device.tier for device in transformer.devices}:
        with pytest.raises(UsageError, match="on the GPU"):
            CapturedStep(transformer, cache)
        return
    expected = plainly(transformer, cache)
    step = CapturedStep(transformer, cache)
    assert step.way is WAY
    for token, wanted in zip(STEPS, expected, strict=True):
        logits, there, here = step.run(token, cache.length)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        cold = sum(seat.warm - seat.hot for seat in homes)
        if predicts:
            assert (here.fired > 0) is (here.up_rows > 0) is (cold > 0)
            assert here.up_rows < cold or not cold
        else:
            assert (there.up_rows, here.up_rows) == (192 - cold, cold)


@pytest.mark.parametrize("depths", [(0, 96), (32, 0), (96, 96), (64, 32)])
def test_a_predictor_of_the_cpu_selects_for_both_sides(tiny_model: Any, oracle: Any, depths: tuple[int, ...]) -> None:
    source = open_model(tiny_model)
    predictor = oracle(source, shares=0.05)
    seats = Seating(RAM, VRAM, tuple(LayerSeat(VRAM, depth, 96, predictor=RAM) for depth in depths))
    transformer, cache = load_seats(source, seats, predictor)
    expected = plainly(transformer, cache)
    step = CapturedStep(transformer, cache)
    assert step.way is WAY
    for token, wanted in zip(STEPS, expected, strict=True):
        logits, there, here = step.run(token, cache.length)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        assert there.up_rows < sum(depths)
        assert (here.up_rows > 0) is (depths != (96, 96))
        assert there.up_rows + here.up_rows == there.fired + here.fired


def test_what_a_captured_step_has_no_way_for_is_refused(tiny_model: Any, oracle: Any) -> None:
    source = open_model(tiny_model)
    for seat, error in ((LayerSeat(RAM, 32, 96), "all neurons"), (LayerSeat(RAM, 0, 96, predictor=VRAM), "predictor")):
        transformer, cache = load_seats(source, Seating(RAM, VRAM, (seat, THERE)), oracle(source, shares=0.05))
        with pytest.raises(UsageError, match=error):
            CapturedStep(transformer, cache)


@pytest.mark.parametrize("fault", [Fault.DIE, Fault.FAIL, Fault.STALL])
@pytest.mark.parametrize("taped", [False, True], ids=["neurons", "tape"])
def test_a_fault_of_the_cpu_ends_one_request(tiny_model: Any, fault: Fault, taped: bool) -> None:
    """At the second crossing, which hands over the cold neurons of a layer, or a whole layer that is on a tape."""
    second = HERE if taped else LayerSeat(VRAM, 32, 96)
    transformer, cache = load_seats(open_model(tiny_model), Seating(RAM, VRAM, (LayerSeat(VRAM, 32, 96), second)))
    step = CapturedStep(transformer, cache, patience=0.5)
    first = step.run(4, len(PROMPT))[0].copy()
    assert step._worker is not None
    step._worker.inject(fault, 1, 3.0)
    with pytest.raises(HardwareError):
        step.run(4, len(PROMPT))
    for _ in range(200):
        try:
            again = step.run(4, len(PROMPT))[0]
            break
        except HardwareError:
            continue
    assert again.tobytes() == first.tobytes()


def test_a_step_that_failed_waits_for_no_other_layer(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, cache = load(tiny_model, (32, 32))
    step = CapturedStep(transformer, cache, way=CrossingKind.PLAIN, patience=0.5)
    worker, waited = step._worker, list[int]()
    assert worker is not None
    wait = worker.wait
    monkeypatch.setattr(worker, "wait", lambda number: (waited.append(number), wait(number))[1])
    step.run(7, len(PROMPT))
    assert waited == [1, 2]
    worker.inject(Fault.STALL, 0, 3.0)
    with pytest.raises(HardwareError, match="in time"):
        step.run(7, len(PROMPT))
    assert waited == [1, 2, 1]


def test_a_step_that_was_given_up_on_spoils_no_other(tiny_model: Any) -> None:
    """Its tape is played late, and writes into the cache: other steps begin when it is done."""
    seats = Seating(RAM, VRAM, (LayerSeat(VRAM, 32, 96), HERE))
    transformer, cache = load_seats(open_model(tiny_model), seats)
    expected = [row.tobytes() for row in plainly(transformer, cache)]
    step = CapturedStep(transformer, cache, patience=0.5)
    assert step._worker is not None
    step._worker.inject(Fault.STALL, 1, 3.0)
    with pytest.raises(HardwareError):
        step.run(7, len(PROMPT))
    for _ in range(200):
        try:
            step.rest()
            break
        except HardwareError as error:
            assert "still computing" in str(error)  # noqa: PT017
    assert [row.tobytes() for row in plainly(transformer, cache)] == expected


def test_what_cannot_be_captured_is_refused(tiny_model: Any) -> None:
    transformer, cache = load_on_cpu(tiny_model)
    with pytest.raises(UsageError, match="on the GPU"):
        CapturedStep(transformer, cache)
    if INTERPRETED:
        gpu, cache = load(tiny_model, (32, 32))
        with pytest.raises(UsageError, match="needs a CUDA device"):
            CapturedStep(gpu, cache, way=CrossingKind.MEMORY)


def load_on_cpu(path: Any) -> tuple[Transformer, KVCache]:
    transformer, _ = load_transformer(open_model(path), CpuOps(1), n_ctx=32)
    return transformer, KVCache(transformer.spec, transformer.ops, 32)


def drive(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(
        "thermocline.runtime.captured.choose", lambda w, worker, streams: choose(w, worker, streams, driver, driver)
    )


class FakeStreams(Streams):
    """Streams as a GPU's: events that take three looks, and graphs that do when launched what was called."""

    def __init__(self, *, graphs: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self.real, self.graphs, self.capturing = True, graphs, False
        self.captures = self.launches = 0
        self.interrupt = False

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    @property
    def handle(self) -> int:
        return 7

    def wait(self) -> None:
        pass

    def watched(self) -> Callable[[], bool]:
        looks = iter((False, False))

        def look() -> bool:
            if self.interrupt:
                self.interrupt = False
                raise KeyboardInterrupt
            return next(looks, True)

        return look

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def captured(self, calls: Callable[[], None]) -> Callable[[], None]:
        if not self.graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        self.capture(calls)

        def launch() -> None:
            self.launches += 1
            calls()

        return launch

    def capture(self, calls: Callable[[], None]) -> None:
        self.capturing = True
        try:
            calls()
        finally:
            self.capturing = False


@interpreted
@pytest.mark.parametrize(
    ("refuse", "graphs", "way"),
    [
        ((), True, CrossingKind.MEMORY),
        (("captured wait",), True, CrossingKind.CALLS),
        (("captured wait", "captured call"), True, CrossingKind.PLAIN),
        ((), False, CrossingKind.PLAIN),
    ],
)
def test_a_step_becomes_a_graph_where_a_way_to_cross_can_be_captured(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, refuse: tuple[str, ...], graphs: bool, way: CrossingKind
) -> None:
    transformer, cache = load(tiny_model, (32, 64))
    expected = [CapturedStep(transformer, cache).run(4, len(PROMPT))[0].copy() for _ in range(2)]
    transformer.exit.ops.streams = streams = FakeStreams(graphs=graphs)
    drive(monkeypatch, driver := Driver(refuse, streams))
    step = CapturedStep(transformer, cache)
    assert (step.way, step.captured) == (way, way is not CrossingKind.PLAIN)
    assert (step.notice is None) is (way is CrossingKind.MEMORY)
    assert streams.captures == step.captured  # torch's graphs are for what a graph of the driver's holds
    driver.calls.clear()
    streams.launches = 0
    for wanted in expected:
        assert step.run(4, len(PROMPT))[0].tobytes() == wanted.tobytes()
    assert streams.launches == 2 * step.captured
    if way is CrossingKind.MEMORY:
        assert [value for _, value in driver.calls] == 2 * [1, 1, 0, 2, 2, 0]
    elif way is CrossingKind.PLAIN:
        assert f"{CrossingKind.MEMORY}:" in str(step.notice)


@interpreted
def test_layers_of_the_cpu_are_in_the_graph(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch a token, and one crossing for each of the layers."""
    source = open_model(tiny_model)
    seats = Seating(RAM, VRAM, (HERE, LayerSeat(VRAM, 32, 96)))
    transformer, cache = load_seats(source, seats)
    expected = [row.tobytes() for row in stepped(transformer, cache)]
    transformer.exit.ops.streams = streams = FakeStreams()
    drive(monkeypatch, driver := Driver((), streams))
    step = CapturedStep(transformer, cache)
    assert (step.way, step.captured) == (CrossingKind.MEMORY, True)
    driver.calls.clear()
    streams.launches = 0
    for token, wanted in zip(STEPS, expected, strict=True):
        assert step.run(token, cache.length)[0].tobytes() == wanted
    assert streams.launches == len(STEPS)
    assert [value for _, value in driver.calls] == len(STEPS) * [1, 1, 0, 2, 2, 0]


def stepped(transformer: Transformer, cache: KVCache) -> list[np.ndarray]:
    step = CapturedStep(transformer, cache)
    rows = [step.run(token, cache.length)[0].copy() for token in STEPS]
    cache.truncate(len(PROMPT))
    return rows


@interpreted
def test_who_interrupts_a_step_is_heard_when_it_is_done(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, cache = load(tiny_model, (32, 64))
    transformer.exit.ops.streams = streams = FakeStreams()
    drive(monkeypatch, Driver((), streams))
    step = CapturedStep(transformer, cache)
    expected = step.run(4, len(PROMPT))[0].copy()
    cache.truncate(len(PROMPT))
    streams.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        step.run(4, len(PROMPT))
    assert cache.length == len(PROMPT)
    assert step.run(4, len(PROMPT))[0].tobytes() == expected.tobytes()


@interpreted
def test_a_device_that_hangs_is_probed_no_further(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the next way to cross, which would wait for it without end, nor by what computes without one."""
    transformer, cache = load(tiny_model, (32, 64))
    transformer.exit.ops.streams = streams = FakeStreams()
    monkeypatch.setattr(streams, "watched", lambda: lambda: False)
    monkeypatch.setattr("thermocline.ops.cuda.waiting.HANGS", 0.1)
    drive(monkeypatch, driver := Driver((), streams))
    with pytest.raises(HangError, match="has not finished"):
        CapturedStep(transformer, cache, patience=0.05)
    assert [name for name, _ in driver.calls] == ["write", "wait", "write"]


class Driver:
    """A driver whose stream does everything at once."""

    def __init__(self, refuse: tuple[str, ...] = (), streams: FakeStreams | None = None) -> None:
        self.refuse = refuse
        self.calls: list[tuple[str, int]] = []
        self.streams = streams

    @property
    def captures(self) -> bool:
        """Whether a call is put into a graph instead of done."""
        return self.streams is not None and self.streams.capturing

    @contextmanager
    def captured(self, stream: int, calls: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """A graph of its own."""
        assert self.streams is not None
        assert stream == self.streams.handle
        if not self.streams.graphs:
            raise HardwareError("the driver cannot capture it (901)")
        self.streams.capture(calls)
        yield calls

    def _word(self, address: int) -> np.ndarray:
        import ctypes

        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), (1,))

    def _told(self, name: str, value: int) -> tuple[int]:
        self.calls.append((name, value))
        named = f"captured {name}" if self.captures else name
        return (801 if named in self.refuse else 0,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[int, int]:  # noqa: N802
        return 0, address

    def cuStreamWriteValue32(self, stream: int, address: int, value: int, flags: int) -> tuple[int]:  # noqa: N802
        told = self._told("write", value)
        if told == (0,) and not self.captures:
            self._word(address)[0] = value
        return told

    def cuStreamWaitValue32(self, stream: int, address: int, value: int, flags: int) -> tuple[int]:  # noqa: N802
        assert flags == 1
        while self._word(address)[0] != value and not self.captures:
            pass
        return self._told("wait", value)

    def cuLaunchHostFunc(self, stream: int, function: int, argument: int) -> tuple[int]:  # noqa: N802
        import ctypes

        told = self._told("call", 0)
        if told == (0,) and not self.captures:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
        return told


@interpreted
def test_ways_to_cross_are_probed_in_order(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, cache = load(tiny_model, (32, 64))
    expected = CapturedStep(transformer, cache).run(4, len(PROMPT))[0].copy()
    for refuse, way in (
        ((), CrossingKind.MEMORY),
        (("write",), CrossingKind.CALLS),
        (("write", "call"), CrossingKind.PLAIN),
    ):
        driver = Driver(refuse)
        drive(monkeypatch, driver)
        step = CapturedStep(transformer, cache)
        assert step.way is way
        assert (step.notice is None) is (way is CrossingKind.MEMORY)
        driver.calls.clear()
        assert step.run(4, len(PROMPT))[0].tobytes() == expected.tobytes()
        numbers = [value for name, value in driver.calls if name != "call"]
        assert numbers == ([1, 1, 0, 2, 2, 0] if way is CrossingKind.MEMORY else [])
        assert len(driver.calls) == {CrossingKind.MEMORY: 6, CrossingKind.CALLS: 4, CrossingKind.PLAIN: 0}[way]
        if way is not CrossingKind.MEMORY:
            with pytest.raises(UsageError, match="does not work here"):
                CapturedStep(transformer, cache, way=CrossingKind.MEMORY)


@pytest.mark.parametrize("cached", [CacheType.F16, CacheType.Q8_0])
def test_a_model_runs_with_device_cuda_as_it_does_on_the_cpu(
    tiny_wide: Any, agree: Callable[..., None], cached: CacheType
) -> None:
    """From the file to the logits: a plan under a budget, loading into it, and a captured step for every token."""
    rows = {}
    settings: dict[str, Any] = {"ctx_size": 32, "threads": 1, "cache_type_k": cached, "cache_type_v": cached}
    for device in ("cpu", "cuda"):
        budget = BUDGET if device == "cuda" else None
        with LLM.load(tiny_wide, **settings, device=device, vram_budget=budget) as llm:
            if device == "cuda":
                kept = llm._loaded.placing.memory.ledger.used(VRAM, Purpose.KV)
                assert kept == 2 * 32 * 2 * {CacheType.F16: 64, CacheType.Q8_0: 34}[cached]
            assert not any("plain way" in notice for notice in llm.notices)
            engine = llm._loaded.engine
            ticket = engine.begin()
            logits, _ = engine.prefill([5, 9, 2], reuse=False)
            rows[device] = [logits.copy(), *(engine.step(token, ticket).copy() for token in (7, 1))]
    for got, wanted in zip(rows["cuda"], rows["cpu"], strict=True):
        agree(got, wanted, 2, 96, integers=True)


def test_learned_positions_where_the_embedding_is_on_the_cpu(make_opt: Callable[[], Any]) -> None:
    rows = []
    for entry in (VRAM, RAM):
        transformer, cache = load_source(make_opt(), (32, 64), entry)
        rows.append(CapturedStep(transformer, cache).run(4, len(PROMPT))[0].copy())
    assert rows[0].tobytes() == rows[1].tobytes()
