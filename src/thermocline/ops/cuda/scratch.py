"""Memory that calls use and leave, kept for the next call."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Buffers by purpose, each as large as its largest use so far. One stream, one call at a time.

    A graph goes on using the buffers that it was captured with: from `hold` on, those that are outgrown are kept too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []
        self._held = False

    def hold(self) -> None:
        """Let go of no buffer any more."""
        self._held = True

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An array of that shape, with what the last call left in it."""
        size = math.prod(shape)
        buffer = self._buffers.get((purpose, dtype))
        if buffer is None or len(buffer) < size:
            if self._held and buffer is not None:
                self._outgrown.append(buffer)
            buffer = self._buffers[purpose, dtype] = torch.zeros(size, dtype=dtype, device=self._device)
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() * b.element_size() for b in (*self._buffers.values(), *self._outgrown))
