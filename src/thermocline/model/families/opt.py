"""OPT: learned positions, LayerNorm, biases everywhere, an FFN of ReLU without a gate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from thermocline.files.metadata import Metadata
from thermocline.model.families.activation import ffn_from_hf
from thermocline.model.families.base import GGUF_NEUTRAL, Family
from thermocline.model.source import NetworkSource, require_neutral, uniform
from thermocline.model.spec import BOUNDS, EPS_BOUNDS, ModelSpec
from thermocline.ops.contract import FfnKind

OFFSET = 2
"""Rows of the table of positions before that of position 0."""

NEUTRAL: dict[str, object] = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
    "enable_bias": True,
    "quantization_config": None,
}
"""Keys of a config.json that change the arithmetic unless they have this value; OPT-350m has the first otherwise."""


class Opt(Family):
    """OPT, from 125M to 175B but for the 350M, which norms after attention and FFN and has projected embeddings.

    Its GGUF files are PowerInfer's, of the architecture `opt`: their context length counts the rows of the table of
    positions, the two unused ones included, and the epsilon of the norms is not in them.
    """

    architecture = "opt"
    gated = False
    default_activation = "relu"
    hf_layer: ClassVar[re.Pattern[str]] = re.compile(r"(?:model\.)?decoder\.layers\.(\d{1,4})\.(.+)")
    hf_names: ClassVar[Mapping[str, str]] = {
        f"{prefix}{hf}": name
        for prefix in ("model.", "")
        for hf, name in {
            "decoder.embed_tokens.weight": "token_embd.weight",
            "decoder.embed_positions.weight": "position_embd.weight",
            "decoder.final_layer_norm.weight": "output_norm.weight",
            "decoder.final_layer_norm.bias": "output_norm.bias",
        }.items()
    } | {"lm_head.weight": "output.weight"}
    hf_layer_names: ClassVar[Mapping[str, str]] = {
        "self_attn_layer_norm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn_up",
        "fc2": "ffn_down",
    }

    def ffn_from_hf(self, config: Metadata) -> FfnKind:
        """The key is `activation_function`."""
        return ffn_from_hf(config, self.default_activation, gated=False, key="activation_function")

    def spec_from_hf(self, source: NetworkSource) -> ModelSpec:
        """The spec from config.json (keys as in transformers' OPTConfig)."""
        config = source.metadata
        n_embd = config.integer("hidden_size", *BOUNDS["n_embd"])
        require_neutral(config, NEUTRAL | {"word_embed_proj_dim": n_embd})
        return self._spec(
            source,
            name=source.path.name,
            n_layer=config.integer("num_hidden_layers", *BOUNDS["n_layer"]),
            n_embd=n_embd,
            n_head=config.integer("num_attention_heads", *BOUNDS["n_head"]),
            n_ff=config.integer("ffn_dim", *BOUNDS["n_ff"]),
            n_ctx=config.integer("max_position_embeddings", *BOUNDS["n_ctx_train"]),
            ffn=self.ffn_from_hf(config),
            tied=config.boolean("tie_word_embeddings", True),
        )

    def spec_from_gguf(self, source: NetworkSource) -> ModelSpec:
        """The spec from GGUF metadata (keys as PowerInfer's converter writes them)."""
        metadata, prefix = source.metadata, self.architecture + "."
        require_neutral(metadata, GGUF_NEUTRAL, prefix)
        n_head = uniform(metadata, prefix + "attention.head_count", BOUNDS["n_head"])
        require_neutral(metadata, {"attention.head_count_kv": n_head}, prefix)
        length = metadata.integer(prefix + "context_length", OFFSET + 1, BOUNDS["n_ctx_train"][1])
        return self._spec(
            source,
            name=metadata.text("general.name", source.path.name),
            n_layer=metadata.integer(prefix + "block_count", *BOUNDS["n_layer"]),
            n_embd=metadata.integer(prefix + "embedding_length", *BOUNDS["n_embd"]),
            n_head=n_head,
            n_ff=uniform(metadata, prefix + "feed_forward_length", BOUNDS["n_ff"]),
            n_ctx=length - OFFSET,
            ffn=self.ffn_from_gguf(metadata, records=False),
            tied="output.weight" not in source.weights,
            eps=metadata.number(prefix + "attention.layer_norm_epsilon", *EPS_BOUNDS, 1e-5),
        )

    def _spec(
        self,
        source: NetworkSource,
        *,
        name: str,
        n_layer: int,
        n_embd: int,
        n_head: int,
        n_ff: int,
        n_ctx: int,
        ffn: FfnKind,
        tied: bool,
        eps: float = 1e-5,
    ) -> ModelSpec:
        n_vocab = self.rows(source, "token_embd.weight")
        self.check_vocabulary(source, n_vocab)
        return ModelSpec(
            family=self.architecture,
            name=name,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head,
            head_dim=n_embd // n_head,
            n_ff=n_ff,
            n_vocab=n_vocab,
            n_ctx_train=n_ctx,
            norm_eps=eps,
            rope=None,
            ffn=ffn,
            windows=(0,) * n_layer,
            tied_embeddings=tied,
            qkv_bias=True,
            out_bias=True,
            layer_norm=True,
            ffn_bias=True,
            position_offset=OFFSET,
        )
