"""Bamboo: a Mistral with ReLU on gate and up both (dReLU)."""

from __future__ import annotations

from thermocline.files.metadata import Metadata
from thermocline.model.families.activation import ffn_kind
from thermocline.model.families.mistral import Mistral
from thermocline.ops.contract import FfnKind


class Bamboo(Mistral):
    """Its config.json says `relu`, and its code (`BambooMLP`) applies it on both sides.

    GGUF files are PowerInfer's, of the architecture `bamboo`.
    """

    architecture = "bamboo"
    default_activation = "drelu"

    def ffn_from_gguf(self, metadata: Metadata, *, records: bool) -> FfnKind:
        """Always dReLU."""
        return ffn_kind(metadata.path, "drelu", 0.0, gated=True)

    def ffn_from_hf(self, config: Metadata) -> FfnKind:
        """Always dReLU."""
        return ffn_kind(config.path, "drelu", 0.0, gated=True)
