"""What only a real device has: streams that run beside the caller, graphs of their calls, and memory they can reach."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from thermocline.ops.cuda.waiting import Nap, finish
from thermocline.ops.handover import ColdWorker


class Streams:
    """The current stream of a device. Where kernels are interpreted everything is done when a call returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.real = device.type == "cuda"
        self.pinned_bytes = 0
        """Of the host, that the device was given so far."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed memory of the host that the device reads and writes by itself."""
        array = torch.zeros(shape, dtype=dtype, pin_memory=self.real)
        self.pinned_bytes += 1 << max(array.nbytes - 1, 0).bit_length()  # torch pins powers of two
        return array

    @property
    def handle(self) -> int:
        """The current stream, as the driver calls it."""
        return int(torch.cuda.current_stream(self._device).cuda_stream) if self.real else 0

    def wait(self) -> None:
        """Until the current stream has done all it was given."""
        if self.real:
            torch.cuda.current_stream(self._device).synchronize()

    def watched(self) -> Callable[[], bool]:
        """A look at whether the current stream has done all that it was given before this call."""
        if not self.real:
            return lambda: True
        look: Callable[[], bool] = torch.cuda.current_stream(self._device).record_event().query
        return look

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, calls go to a stream of their own, after what was called before and before what is called later."""
        if not self.real:
            yield
            return
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            yield
        torch.cuda.current_stream(self._device).wait_stream(side)

    def another(self) -> Any:
        """A stream beside the current one, which begins when that has done what it was given so far."""
        if not self.real:
            return None
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return stream

    def mark(self) -> Any:
        """An event that comes when the current stream has done what it was given so far."""
        return torch.cuda.current_stream(self._device).record_event() if self.real else None

    def copied(self, stream: Any, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        """Copy pinned memory to the device in `stream`, after an event; what the current stream does next waits for it.

        Returns an event that comes when `source` may be overwritten.
        """
        if not self.real:
            target.copy_(source)
            return None
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = stream.record_event()
        torch.cuda.current_stream(self._device).wait_event(done)
        return done

    def captured(self, calls: Callable[[], None]) -> Callable[[], None]:
        """`calls` as one graph, and how to launch it. Nothing is computed yet, and other threads may use the device.

        Raises:
            RuntimeError: a call cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # Where a capture fails, torch leaves its stream the current one.
        here = torch.cuda.stream(torch.cuda.current_stream(self._device))
        with here, uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            calls()
        replay: Callable[[], None] = graph.replay
        return replay

    def settle(self, worker: ColdWorker | None, nap: Nap | None = None) -> None:
        """Return when the current stream has done all it was given. For steps that are alike, `nap` keeps how long.

        Who interrupts this is heard when the stream is done: one that waits for the worker would wait for ever.

        Raises:
            HangError: the device itself does not come to an end.
        """
        done = self.watched()
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                if nap is not None and interrupted is None:
                    nap.wait(done, worker)
                else:
                    finish(done, worker)
                break
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is collected: what frees memory or events of the device would break a capture."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
