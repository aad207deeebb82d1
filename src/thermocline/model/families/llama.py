"""Llama: RMS norms, rotary attention, gated FFN (SwiGLU, or ReGLU where the file says so)."""

from __future__ import annotations

from thermocline.files.metadata import Metadata
from thermocline.model.families.activation import ffn_from_gguf
from thermocline.model.families.base import Family
from thermocline.ops.contract import FfnKind


class Llama(Family):
    """Llama and its ReLU kin: ReluLLaMA (`relu`) and ProSparse (`fatrelu` with a threshold).

    Quirk: GGUF files hold the rows of q and k permuted, so that rotary pairs are neighbours.
    """

    architecture = "llama"
    interleaved = True

    def ffn_from_gguf(self, metadata: Metadata, *, records: bool) -> FfnKind:
        """As named in the file; PowerInfer's files name nothing, and its records are always ReGLU."""
        default = "relu" if records else self.default_activation
        return ffn_from_gguf(metadata, self.architecture + ".", default, gated=True)
