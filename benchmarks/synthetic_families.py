"""The sizes of synthetic models, what their families differ in, and what their GGUF files say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from thermocline.model.families.opt import OFFSET

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
CONTEXT = 32768
POSITIONS = 2048
"""Context of a family whose positions are learned."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A family, as far as its arithmetic goes; every one of them fires by ReLU here.

    `gated`: up is multiplied with an activated gate; else up is activated itself. `both`: so is up then, too.
    `halves`: rotary pairs are the halves of a head, not neighbours. `learned`: positions are learned instead.
    `qk_norm`: each head of q and k is normed. `layer_norm`: norms take off the mean and have biases. `parallel`:
    attention and FFN read the same norm. `fused`: q, k and v are one tensor. `biases`: products have them, all zero.
    """

    activation: str = "relu"
    gated: bool = True
    both: bool = False
    halves: bool = False
    learned: bool = False
    qk_norm: bool = False
    layer_norm: bool = False
    parallel: bool = False
    fused: bool = False
    biases: bool = False


KINDS = {
    "llama": Kind(),
    "bamboo": Kind("drelu", both=True),
    "qwen2": Kind(halves=True),
    "qwen3": Kind(halves=True, qk_norm=True),
    "arcee": Kind("relu2", gated=False),
    "opt": Kind(gated=False, learned=True, layer_norm=True, biases=True),
    "falcon": Kind(gated=False, halves=True, layer_norm=True, parallel=True, fused=True),
}
"""By GGUF architecture."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a network."""

    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int = 32000

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


SHAPES = {
    "tiny": Shape(512, 1408, 4, 8, 4, 2048),
    "1.3b": Shape(2048, 5632, 24, 16, 16),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
}


def vocabulary(size: int) -> dict[str, object]:
    """A sentencepiece-like vocabulary that every engine can load: bytes and numbered words."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces = special + [(f"<0x{b:02X}>", 6) for b in range(256)] + [(f"▁w{i}", 1) for i in range(size - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p for p, _ in pieces],
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(i) for i in range(size - 259)], np.float32),
        "tokenizer.ggml.token_type": np.array([t for _, t in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
    }


def metadata(name: str, shape: Shape, active: float, family: str = "llama") -> dict[str, object]:
    """GGUF metadata of a synthetic model; its name and description say what it is."""
    kind = KINDS[family]
    own: dict[str, Any] = {
        "block_count": np.uint32(shape.n_layer),
        "context_length": np.uint32(POSITIONS + OFFSET if kind.learned else CONTEXT),
        "embedding_length": np.uint32(shape.n_embd),
        "feed_forward_length": np.uint32(shape.n_ff),
        "attention.head_count": np.uint32(shape.n_head),
        "attention.head_count_kv": np.uint32(shape.n_head_kv),
        f"attention.layer_norm_{'' if kind.layer_norm else 'rms_'}epsilon": np.float32(NORM_EPS),
        "vocab_size": np.uint32(shape.n_vocab),
        "hidden_activation": kind.activation,
    }
    if not kind.learned:
        own |= {"rope.dimension_count": np.uint32(shape.head_dim), "rope.freq_base": np.float32(ROPE_BASE)}
    if kind.qk_norm:
        own |= {"attention.key_length": np.uint32(shape.head_dim), "attention.value_length": np.uint32(shape.head_dim)}
    if kind.fused:
        own["tensor_data_layout"] = "jploski"
    return {
        "general.architecture": family,
        "general.name": name,
        "general.description": f"synthetic random weights, {active:.0%} of the neurons fire",
        **{f"{family}.{key}": value for key, value in own.items()},
        **vocabulary(shape.n_vocab),
    }
