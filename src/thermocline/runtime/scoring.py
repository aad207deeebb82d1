"""Logits for the tokens of given texts, in whatever mode a network runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from thermocline.config import LoadSettings, Mode
from thermocline.memory.kv_cache import KVCache
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.observers import Observer
from thermocline.runtime.sequence import Logits, Tokens

ROW_BYTES = 64 << 20
"""Bytes of logits that a step makes at most."""


class Scorer:
    """A loaded network with a cache and a workspace of its own that gives the logits of every token of a sequence.

    In mode predicted, tokens run one by one, as decoding does: a batch would be computed by the union of its active
    sets, or exactly, and show nothing of what the predictor misses.
    """

    def __init__(
        self,
        transformer: Transformer,
        window: int,
        settings: LoadSettings,
        *,
        batch: int | None = None,
        observed: bool = False,
    ) -> None:
        self.window = min(window, transformer.n_ctx)
        spec = transformer.spec
        wanted = batch or (1 if transformer.mode is Mode.PREDICTED else settings.ubatch)
        self.batch = min(wanted, self.window)
        self.rows = max(1, min(self.batch, ROW_BYTES // (4 * spec.n_vocab)))
        self._transformer = transformer
        homes = [layer.device.ops for layer in transformer.layers]
        self._cache = KVCache(spec, homes, self.window, settings.cache_type_k, settings.cache_type_v)
        self._workspace = transformer.workspace(self.batch, self.rows, observed=observed)

    def run(self, tokens: Tokens, first: int = 0) -> Iterator[tuple[int, Logits]]:
        """The logits (T, n_vocab) that follow the tokens from `first` on, step by step, each with its first position.

        `tokens` are a sequence of their own; the logits are overwritten by the next step.
        """
        for start in range(0, first, self.batch):
            self.step(tokens[start : min(start + self.batch, first)], start, Outputs.NONE)
        for start in range(first, len(tokens), self.rows):
            yield start, self.step(tokens[start : start + self.rows], start)

    def step(
        self, tokens: Tokens, start: int, outputs: Outputs = Outputs.ALL, observer: Observer | None = None
    ) -> Logits:
        """One step of up to `rows` tokens (`batch` where no logits are asked for) from position `start`."""
        segment = Segment(self._cache, start, len(tokens))
        result = self._transformer.step(tokens, (segment,), self._workspace, outputs, observer)
        return np.asarray(self._transformer.ops.to_host(result.logits))
