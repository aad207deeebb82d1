"""Arcee (AFM): a Llama whose FFN has no gate and squares its ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from thermocline.model.families.base import Family


class Arcee(Family):
    """Quirk: as with Llama, GGUF files hold the rows of q and k permuted."""

    architecture = "arcee"
    interleaved = True
    gated = False
    default_activation = "relu2"
    hf_layer_names: ClassVar[Mapping[str, str]] = {
        hf: name for hf, name in Family.hf_layer_names.items() if name != "ffn_gate"
    }
