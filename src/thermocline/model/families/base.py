"""What families share: reading a spec from a GGUF header or a config.json, and the names of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from thermocline.errors import ModelFormatError, UnsupportedModelError, printable
from thermocline.files.gguf_writer import NewTensor
from thermocline.files.metadata import Metadata
from thermocline.files.weight import Weight
from thermocline.model.families.activation import ffn_from_gguf, ffn_from_hf
from thermocline.model.families.scaling import rope_from_gguf, rope_from_hf
from thermocline.model.source import NetworkSource, require_neutral, uniform
from thermocline.model.spec import BOUNDS, EPS_BOUNDS, ModelSpec
from thermocline.model.tensors import refuse
from thermocline.ops.contract import FfnKind

GGUF_NEUTRAL: dict[str, object] = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}
"""Keys of a GGUF header, below the architecture, that change the arithmetic unless they have this value."""

HF_NEUTRAL: dict[str, object] = {
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_encoder_decoder": False,
}
"""Keys of a config.json that change the arithmetic unless they have this value."""


class Family:
    """A kind of network: how its spec is read, what its tensors are called, and its quirks.

    A subclass states what differs. `architecture` is the name in GGUF files; `interleaved` says whether
    GGUF files of this family hold the rows of q and k permuted, so that rotary pairs are neighbours. Hugging
    Face folders always pair halves.
    """

    architecture: str
    interleaved = False
    gated = True
    qk_norm = False
    default_activation = "silu"
    default_head_dim: int | None = None

    gguf_keys: ClassVar[dict[str, object]] = {}
    """What else the family's GGUF files say, below the architecture."""

    hf_layer: ClassVar[re.Pattern[str]] = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
    hf_names: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    hf_layer_names: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }

    def spec(self, source: NetworkSource) -> ModelSpec:
        """The network that the source describes.

        Raises:
            ModelFormatError: a value is missing, of a wrong type or impossible.
            UnsupportedModelError: a value asks for arithmetic that is not implemented.
        """
        return self.spec_from_gguf(source) if source.kind == "gguf" else self.spec_from_hf(source)

    def weights(self, source: NetworkSource, spec: ModelSpec) -> dict[str, Weight]:
        """The source's tensors by canonical names, without those that are explained but not of the network."""
        if source.kind == "gguf":
            named = {name: name for name in source.weights if not self.gguf_explained(name)}
        else:
            named = self._hf_named(source)
            if spec.tied_embeddings:
                named.pop("output.weight", None)
        found = {canonical: source.weights[name] for canonical, name in named.items()}
        return self.arranged(source.kind, spec, found)

    def arranged(self, kind: str, spec: ModelSpec, weights: dict[str, Weight]) -> dict[str, Weight]:
        """The weights by canonical names, where the files of a `kind` hold other ones; families override this."""
        return weights

    def file_tensors(self, spec: ModelSpec, tensors: Sequence[NewTensor]) -> Sequence[NewTensor]:
        """Canonical tensors as the family's GGUF files hold them, the inverse of `arranged`; families override this."""
        return tensors

    def canonical(self, name: str) -> str | None:
        """GGUF's name of a Hugging Face tensor, None if the family has no such tensor."""
        if name in self.hf_names:
            return self.hf_names[name]
        match = self.hf_layer.fullmatch(name)
        if match is not None:
            stem, _, kind = match[2].rpartition(".")
            if stem in self.hf_layer_names and kind in {"weight", "bias"}:
                return f"blk.{match[1]}.{self.hf_layer_names[stem]}.{kind}"
        return None

    def _hf_named(self, source: NetworkSource) -> dict[str, str]:
        """The source's names by canonical ones; old files also hold rotary frequencies, which the spec implies."""
        named: dict[str, str] = {}
        unknown = []
        for name in source.weights:
            canonical = self.canonical(name)
            if canonical in named:
                unknown.append(f"{printable(name)} and {printable(named[canonical])} are the same tensor")
            elif canonical is not None:
                named[canonical] = name
            elif not name.endswith("rotary_emb.inv_freq"):
                unknown.append(f"{printable(name)} does not belong to this network")
        refuse(source.path, unknown)
        return named

    def gguf_explained(self, name: str) -> bool:
        """Whether a GGUF tensor is read elsewhere: rotary factors with the spec, predictors with the activity."""
        return (
            name == "rope_freqs.weight" or re.fullmatch(r"blk\.\d+\.(fc[12]|attn_rot_embd)\.weight", name) is not None
        )

    def spec_from_gguf(self, source: NetworkSource) -> ModelSpec:
        """The spec from GGUF metadata (keys as in the GGUF specification of ggml)."""
        names, metadata, prefix = source.weights, source.metadata, self.architecture + "."
        require_neutral(metadata, GGUF_NEUTRAL, prefix)
        n_layer = metadata.integer(prefix + "block_count", *BOUNDS["n_layer"])
        n_embd = metadata.integer(prefix + "embedding_length", *BOUNDS["n_embd"])
        n_head = uniform(metadata, prefix + "attention.head_count", BOUNDS["n_head"])
        head_dim = metadata.integer(prefix + "attention.key_length", *BOUNDS["head_dim"], n_embd // n_head)
        if metadata.get(prefix + "attention.value_length", head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{printable(str(source.path))}: {prefix}attention.value_length differs from the keys' {head_dim}; "
                "implemented are equal lengths"
            )
        n_vocab = self.rows(source, "token_embd.weight")
        self.check_vocabulary(source, n_vocab)
        return ModelSpec(
            family=self.architecture,
            name=metadata.text("general.name", source.path.name),
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=uniform(metadata, prefix + "attention.head_count_kv", BOUNDS["n_head_kv"], n_head),
            head_dim=head_dim,
            n_ff=uniform(metadata, prefix + "feed_forward_length", BOUNDS["n_ff"]),
            n_vocab=n_vocab,
            n_ctx_train=metadata.integer(prefix + "context_length", *BOUNDS["n_ctx_train"]),
            norm_eps=metadata.number(prefix + "attention.layer_norm_rms_epsilon", *EPS_BOUNDS),
            rope=rope_from_gguf(source, prefix, head_dim, interleaved=self.interleaved),
            ffn=self.ffn_from_gguf(metadata, records="blk.0.ffn_down_t.weight" in names),
            windows=self.windows_from_gguf(metadata, n_layer),
            tied_embeddings="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            out_bias="blk.0.attn_output.bias" in names,
            qk_norm=self.qk_norm,
        )

    def spec_from_hf(self, source: NetworkSource) -> ModelSpec:
        """The spec from config.json (keys as in transformers' configuration classes)."""
        names, config = source.weights, source.metadata
        require_neutral(config, HF_NEUTRAL)
        n_layer = config.integer("num_hidden_layers", *BOUNDS["n_layer"])
        n_embd = config.integer("hidden_size", *BOUNDS["n_embd"])
        n_head = config.integer("num_attention_heads", *BOUNDS["n_head"])
        head_dim = config.integer("head_dim", *BOUNDS["head_dim"], self.default_head_dim or n_embd // n_head)
        n_vocab = config.integer("vocab_size", *BOUNDS["n_vocab"])
        self.check_vocabulary(source, self.rows(source, "token_embd.weight"))
        return ModelSpec(
            family=self.architecture,
            name=source.path.name,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=config.integer("num_key_value_heads", *BOUNDS["n_head_kv"], n_head),
            head_dim=head_dim,
            n_ff=config.integer("intermediate_size", *BOUNDS["n_ff"]),
            n_vocab=n_vocab,
            n_ctx_train=config.integer("max_position_embeddings", *BOUNDS["n_ctx_train"]),
            norm_eps=config.number("rms_norm_eps", *EPS_BOUNDS, 1e-6),
            rope=rope_from_hf(config, head_dim),
            ffn=self.ffn_from_hf(config),
            windows=self.windows_from_hf(config, n_layer),
            tied_embeddings=config.boolean("tie_word_embeddings", "lm_head.weight" not in names),
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
            out_bias="model.layers.0.self_attn.o_proj.bias" in names,
            qk_norm=self.qk_norm,
        )

    def ffn_from_gguf(self, metadata: Metadata, *, records: bool) -> FfnKind:
        """The FFN's formula. `records` tells whether down is stored in PowerInfer's layout."""
        return ffn_from_gguf(metadata, self.architecture + ".", self.default_activation, gated=self.gated)

    def ffn_from_hf(self, config: Metadata) -> FfnKind:
        """The FFN's formula."""
        return ffn_from_hf(config, self.default_activation, gated=self.gated)

    def windows_from_gguf(self, metadata: Metadata, n_layer: int) -> tuple[int, ...]:
        """Each layer's sliding window; the flags `sliding_window_pattern` say which layers have one."""
        key = self.architecture + ".attention.sliding_window"
        window = metadata.integer(key, 0, BOUNDS["n_ctx_train"][1], 0)
        pattern = metadata.get(key + "_pattern")
        if pattern is None:
            return (window,) * n_layer
        flags = np.asarray(pattern) if isinstance(pattern, list | np.ndarray) else np.empty(0)
        if flags.dtype != np.bool_ or len(flags) != n_layer:
            raise metadata.wrong(key + "_pattern", f"an array of {n_layer} times true or false")
        return tuple(window if slides else 0 for slides in flags)

    def windows_from_hf(self, config: Metadata, n_layer: int) -> tuple[int, ...]:
        """Each layer's sliding window; families with windows override this."""
        return (0,) * n_layer

    def rows(self, source: NetworkSource, canonical: str) -> int:
        """Rows of the tensor with that canonical name.

        Raises:
            ModelFormatError: it is missing; the message calls it as the source would.
        """
        hf = source.kind == "hf"
        names = [name for name, known in self.hf_names.items() if known == canonical] if hf else [canonical]
        for name in names:
            if name in source.weights:
                return source.weights[name].rows
        raise ModelFormatError(source.path, "tensors", f"{names[0]} is missing")

    def check_vocabulary(self, source: NetworkSource, rows: int) -> None:
        """Hold what the metadata says of the vocabulary to the rows of the embedding.

        Raises:
            ModelFormatError: they differ.
        """
        key = "vocab_size" if source.kind == "hf" else self.architecture + ".vocab_size"
        counts = {key: source.metadata.integer(key, *BOUNDS["n_vocab"], rows)}
        tokens = source.metadata.strings("tokenizer.ggml.tokens", default=None)
        if tokens is not None:
            counts["tokenizer.ggml.tokens"] = len(tokens)
        for name, count in counts.items():
            if count != rows:
                raise ModelFormatError(source.path, name, f"counts {count} tokens, but the embedding has {rows} rows")
