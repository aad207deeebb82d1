"""How a stream and the CPU tell each other that a vector is there: the only calls that ROCm lacks or names otherwise.

Three ways, best first. `memory`: the stream itself writes and polls words of pinned memory (cuStreamWriteValue32 and
cuStreamWaitValue32), which costs no thread of the driver. `calls`: the stream calls native functions of the host
(cuLaunchHostFunc). `plain`: Python waits for the stream; it cannot be captured in a graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from thermocline.config import CrossingKind
from thermocline.errors import HangError, HardwareError, UsageError
from thermocline.ops.cuda.streams import Streams
from thermocline.ops.handover import DONE, ColdWorker

EQUAL: Final = 1
"""CU_STREAM_WAIT_VALUE_EQ."""
DRIVER: Final = "libcuda.so.1"
HIP: Final = "lib/libamdhip64.so"
"""HIP's runtime in a torch for ROCm, whose streams are of this one."""
THREAD_LOCAL: Final = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, and HIP's: other threads may use the device meanwhile."""


class Crossing(Protocol):
    """Both halves of a crossing, put into the current stream."""

    way: CrossingKind
    captured: bool
    """Whether a graph can hold it."""

    def post(self, number: int) -> None:
        """Say that layer `number`'s input is in the mailbox, once the stream has come so far."""

    def wait(self, number: int) -> None:
        """Let the stream go on when the layer's sum is in the mailbox."""


class Plain:
    """Python waits for the stream, and then for the worker."""

    way = CrossingKind.PLAIN
    captured = False

    def __init__(self, worker: ColdWorker, streams: Streams) -> None:
        self._worker = worker
        self._streams = streams

    def post(self, number: int) -> None:
        """See the protocol."""
        self._streams.wait()
        self._worker.post(number)

    def wait(self, number: int) -> None:
        """See the protocol.

        Raises:
            HardwareError: no answer came in time, and none of the step's other layers is to be waited for.
        """
        if not self._worker.wait(number):
            raise HardwareError(
                "the CPU did not compute its neurons in time; the request was ended, the next one may succeed"
            )


class StreamMemory:
    """The stream writes `ready`, and polls `done`."""

    way = CrossingKind.MEMORY
    captured = True

    def __init__(self, worker: ColdWorker, driver: Any, stream: Callable[[], int]) -> None:
        """`driver` is cuda.bindings.driver, `stream` gives the handle of the current stream."""
        self._driver = driver
        self._stream = stream
        words = worker.mailbox.words
        self._ready = self._address(words.ctypes.data)
        self._done = self._ready + DONE * words.itemsize

    def post(self, number: int) -> None:
        """See the protocol. What the stream wrote before is visible to the host before the flag is."""
        self._checked(self._driver.cuStreamWriteValue32(self._stream(), self._ready, number, 0))

    def wait(self, number: int) -> None:
        """See the protocol. The flag is taken down, for the same layer of the next token."""
        self._checked(self._driver.cuStreamWaitValue32(self._stream(), self._done, number, EQUAL))
        self._checked(self._driver.cuStreamWriteValue32(self._stream(), self._done, 0, 0))

    def _address(self, host: int) -> int:
        """The device's address of pinned memory: the host's own, where the driver has no other."""
        code, *address = self._driver.cuMemHostGetDevicePointer(host, 0)
        return host if int(code) != 0 else int(address[0])

    def _checked(self, result: tuple[Any, ...]) -> None:
        (code, *_) = result
        if int(code) != 0:
            raise HardwareError(f"the driver refuses stream memory operations ({code}); use --crossing calls")


class HostDriver:
    """The driver's own cuLaunchHostFunc, or what HIP calls it.

    That of cuda-bindings (12.9 to 13.4) hands a function of its own over, which takes Python's lock for the call and
    frees its argument after it: a graph that is launched twice would read freed memory.
    """

    def __init__(self, library: str = DRIVER, name: str = "cuLaunchHostFunc") -> None:
        """Raises OSError where there is no driver."""
        self._launch = getattr(ctypes.CDLL(library), name)
        self._launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._launch.restype = ctypes.c_int

    def cuLaunchHostFunc(self, stream: int, function: int, argument: int) -> tuple[int]:  # noqa: N802
        """As cuda-bindings would: a tuple that begins with the driver's code."""
        return (int(self._launch(stream, function, argument)),)


class Captures:
    """Graphs of the driver's own, or of HIP's.

    Where one cannot be ended, torch (2.13) goes on taking a capture to be under way and frees no memory any more; so
    what is only tried is captured without it.
    """

    def __init__(self, library: str = DRIVER, prefix: str = "cu") -> None:
        """Raises OSError where there is no driver, AttributeError where it is too old."""
        driver = ctypes.CDLL(library)
        begin = "StreamBeginCapture_v2" if prefix == "cu" else "StreamBeginCapture"
        self._begin = self._found(driver, prefix + begin, ctypes.c_void_p, ctypes.c_int)
        self._end = self._found(driver, f"{prefix}StreamEndCapture", ctypes.c_void_p, ctypes.c_void_p)
        self._instantiate = self._found(
            driver, f"{prefix}GraphInstantiateWithFlags", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong
        )
        self._launch = self._found(driver, f"{prefix}GraphLaunch", ctypes.c_void_p, ctypes.c_void_p)
        self._destroy_ready = self._found(driver, f"{prefix}GraphExecDestroy", ctypes.c_void_p)
        self._destroy = self._found(driver, f"{prefix}GraphDestroy", ctypes.c_void_p)

    @contextmanager
    def captured(self, stream: int, calls: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Within, what `calls` puts into `stream` is a graph: how to launch it there.

        Raises:
            HardwareError: the driver cannot capture that.
        """
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._checked(self._begin(stream, THREAD_LOCAL))
        try:
            try:
                calls()
            finally:
                ended = self._end(stream, ctypes.byref(graph))
            self._checked(ended)
            self._checked(self._instantiate(ctypes.byref(ready), graph, 0))
            yield lambda: self._checked(self._launch(ready, stream))
        finally:
            if ready:
                self._destroy_ready(ready)
            if graph:
                self._destroy(graph)

    @staticmethod
    def _found(driver: ctypes.CDLL, name: str, *types: Any) -> Callable[..., int]:
        function = getattr(driver, name)
        function.argtypes, function.restype = types, ctypes.c_int
        found: Callable[..., int] = function
        return found

    @staticmethod
    def _checked(code: int) -> None:
        if code != 0:
            raise HardwareError(f"the driver cannot capture it ({code})")


class HostCalls:
    """The stream calls native functions that set `ready` and wait for `done`; they know a deadline."""

    way = CrossingKind.CALLS
    captured = True

    def __init__(self, worker: ColdWorker, driver: Any, stream: Callable[[], int]) -> None:
        self._worker = worker
        self._driver = driver
        self._stream = stream
        self._addresses: dict[int, tuple[int, int, int]] = {}

    def post(self, number: int) -> None:
        """See the protocol."""
        post, _, argument = self._of(number)
        self._call(post, argument)

    def wait(self, number: int) -> None:
        """See the protocol."""
        _, wait, argument = self._of(number)
        self._call(wait, argument)

    def _of(self, number: int) -> tuple[int, int, int]:
        if number not in self._addresses:
            self._addresses[number] = self._worker.callbacks(number)
        return self._addresses[number]

    def _call(self, function: int, argument: int) -> None:
        (code, *_) = self._driver.cuLaunchHostFunc(self._stream(), function, argument)
        if int(code) != 0:
            raise HardwareError(f"the driver refuses calls of the host ({code}); use --crossing plain")


def choose(
    way: CrossingKind, worker: ColdWorker, streams: Streams, driver: Any | None = None, captures: Any | None = None
) -> tuple[Crossing, str | None]:
    """The crossing asked for, or the first that works; and what there is to say about a fallback.

    `driver` and `captures` are for tests.

    Raises:
        UsageError: the one asked for does not exist here.
        HangError: the device does not come to an end.
    """
    if not streams.real and driver is None:
        if way in (CrossingKind.MEMORY, CrossingKind.CALLS):
            raise UsageError(f"crossing by {way} needs a CUDA device; use --crossing auto")
        return Plain(worker, streams), None
    reasons = []
    for kind in (StreamMemory, HostCalls):
        if way in (CrossingKind.AUTO, kind.way):
            try:
                crossing = kind(worker, driver or _driver(kind.way), lambda: streams.handle)
                probe(crossing, worker, streams, captures)
            except HangError:
                raise
            except (AttributeError, HardwareError, ImportError, OSError, RuntimeError, TypeError) as error:
                if way is not CrossingKind.AUTO:
                    raise UsageError(f"crossing by {way} does not work here: {error}") from error
                reasons.append(f"{kind.way}: {error}")
            else:
                return crossing, _told(crossing, reasons)
    return (plain := Plain(worker, streams)), _told(plain, reasons)


def probe(crossing: Crossing, worker: ColdWorker, streams: Streams, captures: Captures | None = None) -> None:
    """Cross once, and once more in a graph, as a driver may have stream memory operations but not capture them.

    Raises:
        HardwareError: no answer came, or the graph cannot be made.
        HangError: the device does not come to an end.
    """

    def cross() -> None:
        crossing.post(1)
        crossing.wait(1)

    with streams.aside():
        with worker.step():
            cross()
            streams.settle(worker)
        if not streams.real:
            return
        with (captures or _captures()).captured(streams.handle, cross) as launch, worker.step():
            launch()
            streams.settle(worker)


def _told(crossing: Crossing, reasons: list[str]) -> str | None:
    return f"crossing by {crossing.way} ({'; '.join(reasons)})" if reasons else None


def _driver(way: CrossingKind) -> Any:
    rocm = torch.version.hip is not None
    if way is CrossingKind.CALLS:
        return HostDriver(_hip(), "hipLaunchHostFunc") if rocm else HostDriver()
    if rocm:
        raise HardwareError("its stream memory operations are CUDA's, and this torch is built for ROCm")
    return import_module("cuda.bindings.driver")


def _captures() -> Captures:
    return Captures(_hip(), "hip") if torch.version.hip is not None else Captures()


def _hip() -> str:
    return str(Path(torch.__file__).parent / HIP)
