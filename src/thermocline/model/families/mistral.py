"""Mistral: a Llama with a sliding window in every layer."""

from __future__ import annotations

from thermocline.files.metadata import Metadata
from thermocline.model.families.llama import Llama
from thermocline.model.spec import BOUNDS


class Mistral(Llama):
    """Its GGUF files are of the `llama` architecture."""

    def windows_from_hf(self, config: Metadata, n_layer: int) -> tuple[int, ...]:
        """The same window in every layer, none if `sliding_window` is null; absent means 4096, as in transformers."""
        window = (
            config.integer("sliding_window", 0, BOUNDS["n_ctx_train"][1], 0) if "sliding_window" in config else 4096
        )
        return (window,) * n_layer
