"""What is captured, with torch's calls replaced by ones that need no device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from thermocline.ops.cuda.streams import Streams


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    seen: list[Any] = []

    @contextmanager
    def graph(made: Any, capture_error_mode: str) -> Iterator[None]:
        seen.append(capture_error_mode)
        yield

    class Cyclic:
        """Garbage that only the collector finds."""

        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            seen.append("gone")

    def calls() -> None:
        seen.append(gc.isenabled())

    fakes = {"CUDAGraph": lambda: SimpleNamespace(replay=calls), "graph": graph, "stream": lambda _: nullcontext()}
    for name, fake in (fakes | {"current_stream": lambda _: None}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        Cyclic()
        replay = Streams(torch.device("cuda")).captured(calls)
        assert seen == ["gone", "thread_local", False]
        replay()
        assert seen[-1] is gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()
