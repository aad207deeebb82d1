"""Qwen3: norms on every head of q and k, a head size of its own, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from thermocline.model.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Qwen3, dense."""

    architecture = "qwen3"
    qk_norm = True
    default_head_dim = 128
    hf_layer_names: ClassVar[Mapping[str, str]] = {
        **Qwen2.hf_layer_names,
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
