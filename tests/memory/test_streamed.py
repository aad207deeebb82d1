"""A trunk that stays on disk computes the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline.config import CacheType, Mode
from thermocline.errors import HardwareError, UsageError
from thermocline.files.open import open_model
from thermocline.hardware.machine import Tier
from thermocline.hardware.reader import Reader
from thermocline.memory import pieces
from thermocline.memory.arena import Memory
from thermocline.memory.convert import convert
from thermocline.memory.disk_store import DiskStore
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.memory.reads import Way
from thermocline.memory.streamed import StreamingOps
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import Host
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating

RAM, DISK = Tier.RAM, Tier.DISK
LAYERS, NEURONS, TOKENS = 2, 96, 9


def run(network: Transformer, splits: tuple[int, ...] = ()) -> np.ndarray:
    cache = KVCache(network.spec, network.ops, TOKENS, CacheType.F32, CacheType.F32)
    workspace = network.workspace(TOKENS)
    tokens, rows = np.array([5, 9, 5, 200, 1, 0, 9, 77, 3], np.int32), []
    for start, stop in zip((0, *splits), (*splits, TOKENS), strict=True):
        result = network.step(tokens[start:stop], (Segment(cache, start, stop - start),), workspace, Outputs.ALL)
        rows.append(result.logits.copy())
    return np.concatenate(rows)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few rows, so that every matrix has many."""
    monkeypatch.setattr(pieces, "PIECE", 1000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["embedding", "head", "layers", "all"])
def test_what_is_streamed_gives_the_same_bits(tiny_model: Path, tiny_silu: Path, where: str) -> None:
    for model in (tiny_model, tiny_silu):
        with open_model(model) as source:
            plain = run(load_transformer(source, CpuOps(1))[0], (4, 5))
            ops = StreamingOps(1)
            memory = Memory({RAM: Host(ops)}, {RAM: 1 << 24})
            ops.reserve(memory)
            homes = (DISK, RAM) if where == "layers" else (DISK, DISK) if where == "all" else (RAM, RAM)
            seats = Seating(
                DISK if where in ("embedding", "all") else RAM,
                DISK if where in ("head", "all") else RAM,
                tuple(LayerSeat(home, 0, NEURONS, RAM) for home in homes),
            )
            network, _ = load_transformer(source, memory, seats=seats)
            np.testing.assert_array_equal(run(network, (4, 5)), plain)
            assert ops.stats.requests > 0
            if where == "all":
                assert (
                    memory.ledger.used(RAM, Purpose.EMBEDDING) == memory.ledger.used(RAM, Purpose.OUTPUT) - 4 * 64 == 0
                )
            assert memory.is_true
            ops.close()
            memory.close()


def test_without_streaming_ops_it_is_refused(tiny_model: Path) -> None:
    seats = Seating(DISK, RAM, (LayerSeat(RAM, 0, NEURONS),) * LAYERS)
    with open_model(tiny_model) as source, pytest.raises(UsageError, match="ram-budget"):
        load_transformer(source, CpuOps(1), seats=seats)


@pytest.mark.usefixtures("small")
def test_a_failing_read_ends_that_step_only(tiny_model: Path) -> None:
    failing = [False]

    class Faulty(Reader):
        def wait(self, ticket: int) -> None:
            super().wait(ticket)
            if failing[0]:
                raise HardwareError("Input/output error")

    with open_model(tiny_model) as source:
        ops = StreamingOps(1, open_reader=lambda path: Faulty(path, depth=2, largest=1 << 18))
        memory = Memory({RAM: Host(ops)}, {RAM: 1 << 24})
        ops.reserve(memory)
        seats = Seating(DISK, DISK, (LayerSeat(DISK, 0, NEURONS, RAM),) * LAYERS)
        network, _ = load_transformer(source, memory, seats=seats)
        plain, used = run(network), memory.ledger.used(RAM)
        failing[0] = True
        with pytest.raises(HardwareError):
            run(network)
        failing[0] = False
        np.testing.assert_array_equal(run(network), plain)
        assert memory.ledger.used(RAM) == used
        ops.close()


def test_both_on_disk(tiny_model: Path, tmp_path: Path) -> None:
    """Trunk and neurons: nothing of the model but its norms is in memory."""
    with open_model(tiny_model) as source:
        convert(source, tmp_path / "records.gguf", None, records=True)
    with open_model(tmp_path / "records.gguf") as source:
        plain = run(load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0])
        ops = StreamingOps(1)
        memory: Any = Memory({RAM: Host(ops)}, {RAM: 1 << 24})
        ops.reserve(memory)
        store = DiskStore(memory, 20_000, Way(64))
        seats = Seating(DISK, DISK, (LayerSeat(DISK, 0, 0, RAM),) * LAYERS)
        network, _ = load_transformer(source, memory, mode=Mode.EXACT, seats=seats, store=store)
        np.testing.assert_array_equal(run(network), plain)
        store.close()
        ops.close()
        memory.close()
