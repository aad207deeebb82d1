"""Runs sequences through prefill while somebody watches the FFNs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.config import LoadSettings
from thermocline.memory.kv_cache import KVCache
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.observers import Observer
from thermocline.ops.contract import Array
from thermocline.runtime.sequence import Tokens


class ObservedRunner:
    """A loaded network with a cache and a workspace of its own, for sequences of up to `window` tokens.

    Logits are not computed.
    """

    def __init__(self, transformer: Transformer, window: int, settings: LoadSettings) -> None:
        self.window = min(window, transformer.n_ctx)
        self.batch = min(settings.ubatch, self.window)
        self._transformer = transformer
        types = settings.cache_type_k, settings.cache_type_v
        homes = [layer.device.ops for layer in transformer.layers]
        self._cache = KVCache(transformer.spec, homes, self.window, *types)
        self._workspace = transformer.workspace(self.batch, 1, observed=True)

    def run(self, tokens: Tokens, observer: Observer) -> None:
        """Run `tokens` (1 to `window`) from an empty cache, in steps of `batch`.

        Raises:
            ContextError: there are more.
        """
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            segment = Segment(self._cache, start, len(part))
            self._transformer.step(part, (segment,), self._workspace, Outputs.NONE, observer)

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """An observed array as numpy's."""
        return np.asarray(self._transformer.ops.to_host(array))
