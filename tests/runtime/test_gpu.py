"""On a real GPU: captured steps, every way of crossing, budgets, and that a placement changes no answer."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thermocline
from thermocline.api import LLM
from thermocline.config import CrossingKind
from thermocline.errors import HardwareError
from thermocline.files.formats import F16, Q8_0
from thermocline.files.open import open_model
from thermocline.files.quantize import quantize
from thermocline.files.weight import Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.families import family_of
from thermocline.model.network import Outputs, Segment
from thermocline.ops.contract import Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.ops.handover import Fault
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.runtime.captured import CapturedStep

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("machine_home", "worth_a_gpu")]

VRAM, RAM = Tier.VRAM, Tier.RAM
WAYS = [CrossingKind.MEMORY, CrossingKind.CALLS, CrossingKind.PLAIN]
SHIPPED = Path(thermocline.__file__).parent / "shipped" / "epilimnion.q8_0.gguf"
CONTEXT, TOKENS = 256, [5, 9, 2, 7]
POSITIONS = 1000


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """What an earlier test held of the device is let go."""
    gc.collect()
    torch.cuda.empty_cache()


class Split:
    """The shipped model, all attention on the GPU and a half of each layer's neurons, or other shares."""

    def __init__(self, share: float = 0.5, *, threads: int = 2) -> None:
        source = open_model(SHIPPED)
        self.ops = CudaOps(tf32=False)
        self.memory = Memory({VRAM: CudaDevice(self.ops), RAM: Host(CpuOps(threads))}, {VRAM: 4 << 30})
        spec = family_of(source).spec(source)
        seat = LayerSeat(VRAM, int(spec.n_ff * share) // 32 * 32, spec.n_ff)
        seats = Seating(RAM, VRAM, (seat,) * spec.n_layer)
        self.transformer, _ = load_transformer(source, self.memory, seats=seats, n_ctx=CONTEXT)
        arrays = [layer.device.ops for layer in self.transformer.layers]
        self.cache = KVCache(self.transformer.spec, arrays, CONTEXT)
        prompt = np.array(TOKENS, np.int32)
        workspace = self.transformer.workspace(len(prompt))
        self.transformer.step(prompt, (Segment(self.cache, 0, len(prompt)),), workspace, Outputs.NONE)

    def step(self, way: CrossingKind = CrossingKind.AUTO, patience: float = 10.0) -> CapturedStep:
        return CapturedStep(self.transformer, self.cache, way=way, patience=patience)

    def rows(self, step: CapturedStep, tokens: int = 8) -> list[bytes]:
        """Logits of so many tokens after the prompt, as bytes."""
        self.cache.truncate(len(TOKENS))
        found = [step.run(20 + i, len(TOKENS) + i)[0].tobytes() for i in range(tokens)]
        self.cache.truncate(len(TOKENS))
        return found


def test_a_captured_step_computes_what_the_plain_step_computes() -> None:
    split = Split()
    step = split.step()
    assert step.captured
    assert step.way is CrossingKind.MEMORY, step.notice
    workspace = split.transformer.workspace(1)
    for i, row in enumerate(split.rows(step)):
        at = len(TOKENS) + i
        split.cache.length = at
        result = split.transformer.step(np.array([20 + i], np.int32), (Segment(split.cache, at, 1),), workspace)
        wanted = split.transformer.ops.to_host(result.logits)[0]
        got = np.frombuffer(row, np.float32)
        # Sums of both sides meet in another order: a few roundings of the largest logit a layer.
        assert np.abs(got - wanted).max() <= 2.0**-17 * np.abs(wanted).max()


def test_every_way_to_cross_gives_the_same_bits() -> None:
    split = Split()
    found = {}
    for way in WAYS:
        step = split.step(way)
        assert step.way is way
        assert step.captured is (way is not CrossingKind.PLAIN)
        found[way] = [split.rows(step) for _ in range(2)]
    assert all(rows == found[CrossingKind.MEMORY][0] for both in found.values() for rows in both)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_layers_that_are_whole_on_one_side(share: float) -> None:
    split = Split(share)
    step = split.step()
    assert step.captured
    assert (step.way is None) is (share == 1.0)
    assert split.rows(step) == split.rows(step)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", [Fault.DIE, Fault.FAIL, Fault.STALL])
def test_a_fault_of_the_cpu_ends_one_request_whatever_the_way(way: CrossingKind, fault: Fault) -> None:
    split = Split()
    step = split.step(way, patience=0.5)
    before = split.rows(step, 2)
    assert step._worker is not None
    step._worker.inject(fault, 1, 1.0)
    with pytest.raises(HardwareError):
        step.run(20, len(TOKENS))
    for _ in range(200):
        try:
            again = split.rows(step, 2)
            break
        except HardwareError:
            continue
    assert again == before


def test_decoding_allocates_nothing() -> None:
    split = Split()
    step = split.step()
    split.rows(step, 2)
    before = torch.cuda.memory_stats()
    split.rows(step, 20)
    after = torch.cuda.memory_stats()
    for key in ("allocation.all.allocated", "reserved_bytes.all.current"):
        assert after[key] == before[key]


def loaded(**settings: Any) -> LLM:
    return LLM.load(SHIPPED, ctx_size=CONTEXT, device="cuda", **settings)


def on_the_gpu(llm: LLM) -> int:
    """Bytes of neurons that are there."""
    return llm._loaded.placing.memory.ledger.used(VRAM, Purpose.FFN)


def told(llm: LLM, tokens: list[int]) -> list[np.ndarray]:
    """Logits after each of the tokens, all but the first of which are decoded."""
    engine = llm._loaded.engine
    ticket = engine.begin()
    rows = [engine.prefill(tokens[:1], reuse=False)[0].copy()]
    return rows + [engine.step(token, ticket).copy() for token in tokens[1:]]


def test_two_loads_of_one_plan_agree_bit_for_bit() -> None:
    found = []
    for _ in range(2):
        with loaded(vram_budget="3GiB") as llm:
            assert on_the_gpu(llm)
            found.append([row.tobytes() for row in told(llm, list(range(40, 80)))])
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", ["2GiB", "3GiB", "4GiB"])
def test_a_budget_is_kept_and_the_ledger_is_true(budget: str) -> None:
    before = torch.cuda.memory_allocated()
    with loaded(vram_budget=budget) as llm:
        memory = llm._loaded.placing.memory
        ops = memory.devices[VRAM].ops
        assert on_the_gpu(llm)
        llm.generate(list(range(30, 200)), max_tokens=20)
        limit, ledger = memory.ledger.budgets[VRAM], memory.ledger.used(VRAM)
        assert ledger <= limit
        assert ops.held_bytes() <= limit
        assert torch.cuda.max_memory_allocated() - before <= ledger
        assert ops.scratch.nbytes <= memory.arenas[VRAM].claimed
        assert memory.is_true


def test_a_thousand_positions_agree_with_the_cpu() -> None:
    """Teacher forcing on free text: the CPU rounds activations to 8 bits, and that is all that may differ."""
    text = Path(argparse.__file__).read_text()
    rows: dict[str, list[np.ndarray]] = {"cpu": [], "cuda": []}
    for device, found in rows.items():
        settings = {"vram_budget": "3GiB"} if device == "cuda" else {}
        with LLM.load(SHIPPED, ctx_size=CONTEXT, device=device, **settings) as llm:
            assert device == "cpu" or on_the_gpu(llm)
            tokens = llm.tokenize(text)[: POSITIONS + POSITIONS // CONTEXT + 1]
            for start in range(0, POSITIONS, CONTEXT):
                found += told(llm, tokens[start : start + CONTEXT])
    same, divergence = 0, 0.0
    for wanted, got in list(zip(rows["cpu"], rows["cuda"], strict=True))[:POSITIONS]:
        same += int(wanted.argmax() == got.argmax())
        p, q = (row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64)) for row in (wanted, got))
        divergence += float((np.exp(p) * (p - q)).sum())
    assert same >= 0.98 * POSITIONS
    assert divergence / POSITIONS <= 1e-3


@pytest.mark.parametrize("fmt", [F16, Q8_0], ids=lambda f: f.name)
def test_rows_beyond_32_bits_on_the_device(fmt: Any) -> None:
    ops = CudaOps(tf32=False)
    columns = 1 << 16
    rows = ((1 << 31) + 4096) // columns + 1
    if torch.cuda.mem_get_info()[0] < 2 * rows * fmt.row_bytes(columns):
        pytest.skip("not enough memory is free")
    last = np.linspace(-1, 1, columns, dtype=np.float32)
    raw = ops.array((rows, fmt.row_bytes(columns)), "uint8")
    ops.upload(quantize(last[None], fmt), raw[-1:])
    matrix = ops.place(Weight("w", fmt, (rows, columns), raw))
    out, total = ops.array((1, columns)), ops.array((1, columns))
    ops.embed(matrix, np.array([rows - 1], np.int32), out)
    exact = out.cpu().numpy()
    assert np.abs(exact - last).max() <= 2.0**-7
    block = NeuronBlock(matrix, matrix, matrix, True, FfnKind(Activation.RELU, gated=True), rows)
    x = torch.from_numpy(exact / np.square(exact).sum()).to(ops.device)
    work = ops.ffn(x, block, ActiveSet(np.array([rows - 1], np.int32)), total, skip_zeros=True)
    assert work == (1, 1, 1, 1)
    np.testing.assert_allclose(total.cpu().numpy(), exact, rtol=1e-3, atol=1e-6)
