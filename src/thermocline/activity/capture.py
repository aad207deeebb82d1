"""What predictors are trained on: residual streams and which neurons fired, gathered on disk.

For each layer N four files grow token by token: `N.x` the residual streams (float16), `N.level` four bits for each
neuron: 0 if it was silent, else 15 less the octaves that its energy is below the token's highest, at least 1. Of the
tokens that are kept for measuring, `N.check` and `N.energy` are residual streams and energies (float16). The energy is
|activation| times the norm of the neuron's down row. Nothing of all this stays in memory. `capture.json` says how much
of the files counts: what a killed run wrote beyond it is cut off.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.activity.statistics import Floats
from thermocline.errors import NumericalError, OutputError, printable
from thermocline.files.pace import Pace
from thermocline.files.workplace import Workplace
from thermocline.ops.contract import Array

CHECK_EVERY: Final = 8
"""One of so many sequences is kept for measuring."""
MOST_CHECKED: Final = 8192
"""Tokens kept for measuring at most; more sharpen nothing."""
SAVE_SECONDS: Final = 20.0
STATE: Final = "capture"
NAMES: Final = ("x", "level", "check", "energy")
HIGHEST: Final = float(np.finfo(np.float16).max)
SMALLEST: Final = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True, slots=True, eq=False)
class LayerData:
    """One layer's tokens, mapped: `x` (T, n_embd) float16 and `level` (T, ceil(n_ff / 2)) of two neurons a byte (the
    even one in the low half) to train on, `check` (V, n_embd) and `energy` (V, n_ff) float16 to measure with; a neuron
    fired where its energy is not zero.
    """

    x: npt.NDArray[np.float16]
    level: npt.NDArray[np.uint8]
    check: npt.NDArray[np.float16]
    energy: npt.NDArray[np.float16]


class _Read(NamedTuple):
    """What was read to the end of a sequence: how many of them, their tokens, and those kept for measuring."""

    sequences: int
    tokens: int
    checked: int


class Capture:
    """An observer that writes the data of some layers; sequences come one after another.

    Args:
        place: where the files lie.
        layers: which layers are written.
        down_norms: (n_layer, n_ff), the norm of each neuron's down row.
        threshold: a neuron fires if its activation's magnitude is above this.
        to_host: gives the numpy array of an implementation's own.
    """

    def __init__(
        self,
        place: Workplace,
        layers: Sequence[int],
        n_embd: int,
        down_norms: Floats,
        threshold: float = 0.0,
        to_host: Callable[[Array], npt.NDArray[Any]] = np.asarray,
    ) -> None:
        self._place, self.layers, self._norms = place, tuple(layers), down_norms.astype(np.float32)
        self._threshold, self._to_host = threshold, to_host
        self.n_embd, self.n_ff = n_embd, down_norms.shape[1]
        self._widths = dict(zip(NAMES, (2 * n_embd, -(-self.n_ff // 2), 2 * n_embd, 2 * self.n_ff), strict=True))
        state = place.read_state(STATE)
        same = state.get("layers") == list(self.layers)
        state = state if same else {}
        self._read = _Read(*(int(state.get(name, 0)) for name in _Read._fields))
        self.done = bool(state.get("done"))
        self._checking = False
        self._files: dict[tuple[int, str], int] = {}

    @property
    def sequences(self) -> int:
        """Sequences that were read to their end."""
        return self._read.sequences

    @property
    def tokens(self) -> int:
        """Their tokens."""
        return self._read.tokens

    @property
    def checked(self) -> int:
        """Tokens of them that are kept for measuring."""
        return self._read.checked

    @property
    def trained(self) -> int:
        """Tokens to train on."""
        return self.tokens - self.checked

    @staticmethod
    def bytes_per_layer(n_embd: int, n_ff: int, tokens: int, window: int) -> int:
        """Bytes on disk of one layer's data of `tokens` tokens in sequences of up to `window`, at most."""
        checked = min(-(-tokens // CHECK_EVERY) + window, MOST_CHECKED + window, tokens)
        return (tokens - checked) * (2 * n_embd + -(-n_ff // 2)) + checked * (2 * n_embd + 2 * n_ff)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the files, at the state that was saved last; save it at the end, and where an interrupt comes, which it
        may at any moment.
        """
        with ExitStack() as stack, self._place.explained():
            for layer in self.layers:
                for name, width in self._widths.items():
                    path = self._place.folder / f"{layer}.{name}"
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    stack.callback(os.close, descriptor)
                    rows = self.checked if name in ("check", "energy") else self.trained
                    if os.fstat(descriptor).st_size < rows * width:
                        raise OutputError(f"{printable(str(path))}: has lost what was written; give --restart")
                    os.ftruncate(descriptor, rows * width)
                    os.lseek(descriptor, 0, os.SEEK_END)
                    self._files[layer, name] = descriptor
            self._pace = Pace(SAVE_SECONDS)
            try:
                yield
            except KeyboardInterrupt:
                if self.sequences:
                    self._save()
                raise
            self._save()
        self._files.clear()

    def begin_sequence(self) -> None:
        """Another sequence begins: the second of each `CHECK_EVERY` is kept for measuring."""
        self._checking = self.sequences % CHECK_EVERY == 1 and self.checked < MOST_CHECKED

    def end_sequence(self, tokens: int) -> None:
        """It ended, after so many tokens."""
        checked = tokens if self._checking else 0
        self._read = _Read(self.sequences + 1, self.tokens + tokens, self.checked + checked)  # at once: see `writing`
        if self._pace.due():
            self._save()

    def finish(self) -> None:
        """All was read."""
        self.done = True

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        """Write a layer's residual streams (T, n_embd).

        Raises:
            NumericalError: they are not finite.
        """
        if (layer, "x") not in self._files:
            return
        x = self._to_host(residual)
        if not np.isfinite(x).all():
            raise NumericalError(f"layer {layer} computed NaN or infinity; the model's weights or settings are broken")
        self._write(layer, "check" if self._checking else "x", np.clip(x, -HIGHEST, HIGHEST).astype(np.float16))

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        """Write how the neurons fired (T, n_ff).

        Raises:
            NumericalError: their energies are not finite.
        """
        if (layer, "x") not in self._files:
            return
        magnitude = np.abs(self._to_host(hidden))
        energy = np.where(magnitude <= self._threshold, 0, magnitude * self._norms[layer])  # so that NaN shows
        if not np.isfinite(energy).all():
            raise NumericalError(f"layer {layer} computed NaN or infinity; the model's weights or settings are broken")
        if self._checking:
            kept = np.clip(energy, SMALLEST, HIGHEST)  # so that what fired is not zero
            self._write(layer, "energy", np.where(energy > 0, kept, 0).astype(np.float16))
        else:
            self._write(layer, "level", pack_levels(energy))

    def data(self, layer: int) -> LayerData:
        """One layer's data, as views on its files."""

        def view(name: str, dtype: Any, rows: int, columns: int) -> Any:
            path = self._place.folder / f"{layer}.{name}"
            return np.memmap(path, dtype, "r", shape=(rows, columns)) if rows else np.zeros((0, columns), dtype)

        return LayerData(
            view("x", np.float16, self.trained, self.n_embd),
            view("level", np.uint8, self.trained, self._widths["level"]),
            view("check", np.float16, self.checked, self.n_embd),
            view("energy", np.float16, self.checked, self.n_ff),
        )

    @staticmethod
    def remove(place: Workplace) -> None:
        """Delete all that lies there."""
        place.forget_state(STATE)
        with place.explained():
            for name in NAMES:
                for path in place.folder.glob(f"*.{name}"):
                    path.unlink()

    def _write(self, layer: int, name: str, rows: npt.NDArray[Any]) -> None:
        left = np.ascontiguousarray(rows).data.cast("B")
        with self._place.explained():
            while left:
                left = left[os.write(self._files[layer, name], left) :]

    def _save(self) -> None:
        for descriptor in self._files.values():
            os.fsync(descriptor)
        self._place.write_state(STATE, {"layers": list(self.layers), **self._read._asdict(), "done": self.done})
        self._pace.saved()


def pack_levels(energy: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Energies (T, n_ff), from 0, as levels of four bits (T, ceil(n_ff / 2))."""
    highest = np.frexp(energy.max(axis=1, keepdims=True))[1]
    levels = np.clip(15 - (highest - np.frexp(energy)[1]), 1, 15).astype(np.uint8)
    levels[energy == 0] = 0
    if levels.shape[1] % 2:
        levels = np.pad(levels, ((0, 0), (0, 1)))
    packed: npt.NDArray[np.uint8] = levels[:, ::2] | (levels[:, 1::2] << 4)
    return packed


def layers_at_once(folder: Path, wanted: Sequence[int], bytes_per_layer: int) -> int:
    """For how many of the `wanted` layers the disk of `folder` has room; nine tenths of what is free are used.

    Raises:
        OutputError: it has not room for one.
    """
    free = shutil.disk_usage(folder).free
    room = int(0.9 * free) // max(bytes_per_layer, 1)
    if wanted and not room:
        raise OutputError(
            f"{printable(str(folder))}: the training data of one layer takes {bytes_per_layer:,} bytes and {free:,} "
            "are free on its disk: free some, read fewer tokens (--tokens), or write to another disk (-o)"
        )
    return min(len(wanted), room)
