"""A recorded decode step computes what the plain step computes, and its CPU side may fail without a hang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.activity.predictor import Predictor
from thermocline.api import LLM
from thermocline.config import CacheType, CrossingKind, Mode
from thermocline.errors import BudgetError, HardwareError, UsageError
from thermocline.files.open import open_model
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.crossing import choose
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.ops.handover import Fault
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.runtime.captured import CapturedStep

VRAM, RAM = Tier.VRAM, Tier.RAM
PROMPT, STEPS = [5, 9, 2, 7], [4, 1, 8]


@pytest.fixture(scope="module", autouse=True)
def machine_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of the machine is not kept for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMOCLINE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def load(
    path: Any, hot: tuple[int, ...], entry: Tier = RAM, predictor: Predictor | None = None
) -> tuple[Transformer, KVCache]:
    source = open_model(path)
    mode = Mode.AUTO if predictor is None else Mode.PREDICTED
    memory = Memory({VRAM: CudaDevice(CudaOps(tf32=False)), RAM: Host(CpuOps(1))}, {VRAM: 1 << 30})
    seats = Seating(entry, VRAM, tuple(LayerSeat(VRAM, depth, 96) for depth in hot))
    transformer, _ = load_transformer(source, memory, seats=seats, n_ctx=32, mode=mode, predictor=predictor)
    cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 32, CacheType.F16)
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
    assert step.way is (None if hot == (96, 96) else CrossingKind.PLAIN)
    for token, wanted in zip(STEPS, expected, strict=True):
        logits, there, here = step.run(token, cache.length)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        assert there.up_rows == sum(hot)
        assert here.up_rows == sum(96 - depth for depth in hot)
    assert cache.length == len(PROMPT) + len(STEPS)


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


@pytest.mark.parametrize("fault", [Fault.DIE, Fault.FAIL, Fault.STALL])
def test_a_fault_of_the_cpu_ends_one_request(tiny_model: Any, fault: Fault) -> None:
    transformer, cache = load(tiny_model, (32, 32))
    step = CapturedStep(transformer, cache, patience=0.5)
    first = step.run(4, len(PROMPT))[0].copy()
    assert step._worker is not None
    step._worker.inject(fault, 1, 1.0)
    with pytest.raises(HardwareError):
        step.run(4, len(PROMPT))
    for _ in range(200):
        try:
            again = step.run(4, len(PROMPT))[0]
            break
        except HardwareError:
            continue
    assert again.tobytes() == first.tobytes()


def test_what_cannot_be_captured_is_refused(tiny_model: Any) -> None:
    transformer, cache = load_on_cpu(tiny_model)
    with pytest.raises(UsageError, match="on the GPU"):
        CapturedStep(transformer, cache)
    gpu, cache = load(tiny_model, (32, 32))
    with pytest.raises(UsageError, match="needs a CUDA device"):
        CapturedStep(gpu, cache, way=CrossingKind.MEMORY)


def load_on_cpu(path: Any) -> tuple[Transformer, KVCache]:
    transformer, _ = load_transformer(open_model(path), CpuOps(1), n_ctx=32)
    return transformer, KVCache(transformer.spec, transformer.ops, 32)


class Driver:
    """A driver whose stream does everything at once."""

    def __init__(self, refuse: tuple[str, ...] = ()) -> None:
        self.refuse = refuse
        self.calls: list[tuple[str, int]] = []

    def _word(self, address: int) -> np.ndarray:
        import ctypes

        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), (1,))

    def _told(self, name: str, value: int) -> tuple[int]:
        self.calls.append((name, value))
        return (801 if name in self.refuse else 0,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[int, int]:  # noqa: N802
        return 0, address

    def cuStreamWriteValue32(self, stream: int, address: int, value: int, flags: int) -> tuple[int]:  # noqa: N802
        told = self._told("write", value)
        if told == (0,):
            self._word(address)[0] = value
        return told

    def cuStreamWaitValue32(self, stream: int, address: int, value: int, flags: int) -> tuple[int]:  # noqa: N802
        assert flags == 1
        while self._word(address)[0] != value:
            pass
        return self._told("wait", value)

    def cuLaunchHostFunc(self, stream: int, function: int, argument: int) -> tuple[int]:  # noqa: N802
        import ctypes

        told = self._told("call", 0)
        if told == (0,):
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
        return told


def test_ways_to_cross_are_probed_in_order(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, cache = load(tiny_model, (32, 64))
    expected = CapturedStep(transformer, cache).run(4, len(PROMPT))[0].copy()
    for refuse, way in (
        ((), CrossingKind.MEMORY),
        (("write",), CrossingKind.CALLS),
        (("write", "call"), CrossingKind.PLAIN),
    ):
        driver = Driver(refuse)
        monkeypatch.setattr("thermocline.ops.cuda.crossing._stream", lambda device: 0)
        monkeypatch.setattr(
            "thermocline.runtime.captured.choose", lambda w, worker, device, d=driver: choose(w, worker, device, d)
        )
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


def test_a_model_runs_with_device_cuda_as_it_does_on_the_cpu(tiny_model: Any) -> None:
    """From the file to the logits: a plan under a budget, loading into it, and a captured step for every token."""
    rows = {}
    for device in ("cpu", "cuda"):
        budget = "10M" if device == "cuda" else None
        with LLM.load(tiny_model, ctx_size=32, threads=1, device=device, vram_budget=budget) as llm:
            assert not any("plain way" in notice for notice in llm.notices)
            engine = llm._loaded.engine
            ticket = engine.begin()
            logits, _ = engine.prefill([5, 9, 2], reuse=False)
            rows[device] = [logits.copy(), *(engine.step(token, ticket).copy() for token in (7, 1))]
    for got, wanted in zip(rows["cuda"], rows["cpu"], strict=True):
        # The CPU rounds activations to 8 bits where weights are Q8_0.
        assert np.abs(got - wanted).max() <= 0.06 * np.abs(wanted).max()


def test_a_gpu_that_holds_more_than_its_budget_gets_a_smaller_plan(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([(10 << 20) + 4096, 0])
    monkeypatch.setattr(CudaOps, "held_bytes", lambda ops: next(held))
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget="10MiB") as llm:
        assert llm._loaded.placing.memory.ledger.budgets[VRAM] == (10 << 20) - 4096
        assert any("planned again" in notice for notice in llm.notices)


def test_memory_that_runs_out_ends_one_request(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget="10MiB") as llm:
        with monkeypatch.context() as patch:
            patch.setattr(CudaOps, "rms_norm", full)
            with pytest.raises(BudgetError, match="ran out of it"):
                llm.generate([5], max_tokens=1)
        assert llm.generate([5], max_tokens=1).text is not None


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("none left")
