"""Native kernels, thread pool and CPU dispatch; wrapped by thermocline.ops.cpu."""

from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int32]
_Bytes = npt.NDArray[np.uint8]

def isa_levels() -> list[str]:
    """Kernel levels that this CPU can run, weakest first."""

def cpu_features() -> dict[str, bool]:
    """Instruction set extensions that matter to the kernels, and whether this CPU and its system have them."""

class Matrix:
    """A matrix in a block format, on the bytes (rows, row_bytes) of an array that it keeps alive."""

    def __init__(self, data: _Bytes, ggml_type: int, rows: int, cols: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def ggml_type(self) -> int: ...

class Context:
    """Threads, kernels and scratch memory of one engine. Calls from several threads run one after another."""

    def __init__(self, threads: int, isa: str = "auto", pin: bool = True, fetching: str = "auto") -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def fetching(self) -> str: ...
    @property
    def scratch_bytes(self) -> int: ...
    def park(self) -> None:
        """Send the worker threads to sleep at once; the next call wakes them."""

    def embed(self, table: Matrix, tokens: _Ints, out: _Floats) -> None: ...
    def rms_norm(self, x: _Floats, weight: _Floats, eps: float, out: _Floats) -> None: ...
    def layer_norm(self, x: _Floats, weight: _Floats, bias: _Floats, eps: float, out: _Floats) -> None: ...
    def linear(
        self,
        x: _Floats,
        matrices: tuple[Matrix, ...],
        outs: tuple[_Floats, ...],
        biases: tuple[_Floats | None, ...] | None,
        add: bool,
    ) -> None: ...
    def rope(self, x: _Floats, table: _Floats, positions: _Ints, interleaved: bool) -> None: ...
    def attention(
        self,
        q: _Floats,
        k: _Floats,
        v: _Floats,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        start: int,
        scale: float,
        window: int,
        out: _Floats,
    ) -> None: ...
    def ffn(
        self,
        x: _Floats,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        records: bool,
        activation: int,
        both: bool,
        threshold: float,
        up_bias: _Floats | None,
        rows: _Ints | None,
        active: _Ints | None,
        out: _Floats,
        skip_zeros: bool,
        hidden: _Floats | None,
    ) -> tuple[int, int, int, int]: ...
    def predict(self, x: _Floats, fc1: Matrix, fc2: Matrix, scores: _Floats) -> None: ...
    def select(self, scores: _Floats, threshold: float, out: _Ints) -> int:
        """Columns of `scores` (tokens, neurons) that reach the threshold in any row, into `out`; how many they are."""

    def transpose_requantize(self, source: Matrix, out: _Bytes, ggml_type: int) -> tuple[float, float, float]:
        """`source` transposed into `out` in another format; the largest and the RMS change, and the RMS element."""

    def arrange(self, source: Matrix, out: _Bytes, ggml_type: int) -> None:
        """A matrix in a format that only memory has, a negative ggml_type, into `out`, which may be its own bytes."""

    def check_finite(self, matrix: Matrix) -> int:
        """First row that holds a NaN or an infinity in a value or a block scale, or -1."""

class Tape:
    """Ops that are written down once and played again; wrapped by thermocline.ops.tape. It keeps their arrays alive."""

    def rms_norm(self, x: _Floats, weight: _Floats, eps: float, out: _Floats) -> None: ...
    def layer_norm(self, x: _Floats, weight: _Floats, bias: _Floats, eps: float, out: _Floats) -> None: ...
    def linear(
        self,
        x: _Floats,
        matrices: tuple[Matrix, ...],
        outs: tuple[_Floats, ...],
        biases: tuple[_Floats | None, ...] | None,
        add: bool,
    ) -> None: ...
    def rope(self, x: _Floats, table: _Floats, positions: _Ints, interleaved: bool) -> None: ...
    def attention(
        self,
        q: _Floats,
        k: _Floats,
        v: _Floats,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        start: _Ints,
        scale: float,
        window: int,
        out: _Floats,
    ) -> None: ...
    def ffn(
        self,
        x: _Floats,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        records: bool,
        activation: int,
        both: bool,
        threshold: float,
        up_bias: _Floats | None,
        active: _Ints | None,
        count: _Ints | None,
        out: _Floats,
        skip_zeros: bool,
    ) -> None: ...
    def predict(self, x: _Floats, fc1: Matrix, fc2: Matrix, scores: _Floats) -> None: ...
    def select(self, scores: _Floats, threshold: float, out: _Ints, count: _Ints) -> None: ...
    def add(self, x: _Floats, y: _Floats) -> None: ...
    def copy(self, source: _Floats, out: _Floats) -> None: ...
    def play(self, context: Context) -> tuple[int, int, int, int]:
        """Compute everything in order; gate, up and down rows that were read, and neurons that fired."""

    def __len__(self) -> int: ...

class Reader:
    """A file that is read past the page cache, with several reads in flight. Errors are OSError."""

    def __init__(self, path: str, depth: int, largest: int, direct: bool = True) -> None: ...
    @property
    def direct(self) -> bool: ...
    @property
    def depth(self) -> int: ...
    @property
    def largest(self) -> int: ...
    @property
    def size(self) -> int: ...
    def stats(self) -> tuple[int, int, float]:
        """Requests, bytes, and seconds during which something was in flight."""

    def submit(self, requests: npt.NDArray[np.int64], parts: npt.NDArray[np.int64], out: _Bytes) -> int: ...
    def wait(self, ticket: int) -> None: ...

def read_bandwidth(context: Context, buffer: _Bytes) -> float:
    """Bytes a second at which all threads of `context` together read `buffer` once."""

def read_rows(context: Context, matrix: Matrix, ids: npt.NDArray[np.int32] | None) -> float:
    """Bytes a second at which all threads of `context` together read these rows once, with nothing else to do.

    `ids`: rows of `matrix`; all of it if None.
    """

def tile_rate(context: Context, int8: bool) -> float:
    """Operations a second of all threads of `context` with AMX's tiles of bytes, or else of BF16, alone.

    A product and its addition are two operations. 0 where the level of `context` has no tiles.
    """

class HandOver:
    """A worker that computes the cold neurons which a device hands over; wrapped by thermocline.ops.handover."""

    def __init__(
        self,
        context: Context,
        words: _Ints,
        x: _Floats,
        partial: _Floats,
        active: _Ints,
        count: _Ints,
        patience: float,
    ) -> None: ...
    def add_layer(
        self,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        records: bool,
        activation: int,
        both: bool,
        threshold: float,
        up_bias: _Floats | None,
        rows: _Ints | None,
        skip: bool,
        listed: bool,
    ) -> int: ...
    def add_tape(self, tape: Tape) -> int: ...
    def begin(self) -> bool: ...
    def end(self) -> str | None: ...
    def post(self, number: int) -> None: ...
    def wait(self, number: int) -> bool: ...
    def release(self, reason: str) -> bool: ...
    def take_work(self) -> tuple[int, int, int, int]: ...
    def argument(self, number: int) -> int: ...
    def inject(self, fault: int, crossing: int, seconds: float = 0.0) -> None: ...
    def simulate(self, layers: int, crossings: int) -> tuple[int, int, float]: ...
    def cancel(self) -> None: ...
    @property
    def alive(self) -> bool: ...
    @property
    def crossings(self) -> int: ...

def handover_functions() -> tuple[int, int]:
    """Addresses of the C functions that post and wait for a device that calls the host."""

def watch_mapping(address: int, nbytes: int, words: str) -> int: ...
def forget_mapping(number: int) -> None: ...
def shelter_mapping(number: int, by: int) -> None: ...
def lost_mapping(number: int) -> bool: ...
