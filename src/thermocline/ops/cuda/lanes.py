"""Two pinned buffers of the host and two of the device, and a stream that copies from the ones to the others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from thermocline.ops.contract import Array, Arrays
from thermocline.ops.cuda.streams import Streams

COPIERS = 4
"""Threads that fill a pinned buffer: one alone is slower than the link."""

Bytes = npt.NDArray[np.uint8]


class PinnedLanes:
    """While one buffer is computed with the next is on its way, and the one after that is being filled.

    A pinned buffer is filled again when its copy is done, which the host waits for; a buffer of the device is
    overwritten when what was computed with it is done, which the copying stream waits for.
    """

    def __init__(self, streams: Streams, arrays: Arrays, nbytes: int) -> None:
        self._streams = streams
        self._there = [arrays.array((nbytes,), "uint8") for _ in range(2)]
        self._here = [streams.pinned((nbytes,), torch.uint8) for _ in range(2)]
        self._copying = streams.another()
        self._sent: list[Any] = [None, None]
        self._free: list[Any] = [None, None]
        self._copiers = ThreadPoolExecutor(COPIERS, thread_name_prefix="lanes")
        self._turn = 0

    def send(self, parts: Sequence[Bytes]) -> list[Array]:
        """See `memory.sent.Lanes`."""
        turn = self._turn = 1 - self._turn
        if self._sent[turn] is not None:
            self._sent[turn].synchronize()
        here, there = self._here[turn], self._there[turn]
        found, targets, at = [], [], 0
        for part in parts:
            found.append(there[at : at + part.size].view(part.shape))
            targets.append(here[at : at + part.size].view(part.shape).numpy())
            at += -(-part.size // 256) * 256
        pieces = [(target[i::COPIERS], part[i::COPIERS]) for target, part in zip(targets, parts, strict=True)
                  for i in range(COPIERS)]  # fmt: skip
        for _ in self._copiers.map(lambda pair: np.copyto(*pair), pieces):
            pass
        self._sent[turn] = self._streams.copied(self._copying, here[:at], there[:at], after=self._free[turn])
        return found

    def used(self) -> None:
        """See `memory.sent.Lanes`."""
        self._free[self._turn] = self._streams.mark()
