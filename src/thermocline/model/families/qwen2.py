"""Qwen2: biases on q, k and v; rotary pairs are halves in every file; the upper layers may have a window."""

from __future__ import annotations

from thermocline.files.metadata import Metadata
from thermocline.model.families.base import Family
from thermocline.model.spec import BOUNDS


class Qwen2(Family):
    """Qwen2 and Qwen2.5, dense."""

    architecture = "qwen2"

    def windows_from_hf(self, config: Metadata, n_layer: int) -> tuple[int, ...]:
        """A window where `layer_types` says so, else from layer `max_window_layers` on, if it is used at all."""
        if not config.boolean("use_sliding_window", False):
            return (0,) * n_layer
        window = config.integer("sliding_window", 0, BOUNDS["n_ctx_train"][1], 4096)
        kinds = config.strings("layer_types", length=n_layer, default=None)
        if kinds is None:
            first = config.integer("max_window_layers", 0, BOUNDS["n_layer"][1], 28)
            return tuple(window if layer >= first else 0 for layer in range(n_layer))
        allowed = {"sliding_attention": window, "full_attention": 0}
        if any(kind not in allowed for kind in kinds):
            raise config.wrong("layer_types", f"an array of {' and '.join(allowed)}")
        return tuple(allowed[kind] for kind in kinds)
