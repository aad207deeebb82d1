"""Falcon: attention and FFN side by side, few key heads, q, k and v in one matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError, printable
from thermocline.files.formats import F32
from thermocline.files.gguf_writer import NewTensor
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import from_float, to_float
from thermocline.files.weight import Bytes, PickedWeight, Weight
from thermocline.model.families.activation import ffn_from_gguf, ffn_from_hf
from thermocline.model.families.base import GGUF_NEUTRAL, Family
from thermocline.model.families.scaling import rope_from_gguf, rope_from_hf
from thermocline.model.source import NetworkSource, require_neutral, uniform
from thermocline.model.spec import BOUNDS, EPS_BOUNDS, ModelSpec
from thermocline.ops.contract import FfnKind

PARTS = ("attn_q", "attn_k", "attn_v")
CONTEXT = 2048
"""Context length where config.json says nothing."""


class Falcon(Family):
    """Falcon 7B, 40B, 180B and ReluFalcon; not the RW models, which bias attention by distance (ALiBi).

    Quirks: Hugging Face folders hold the fused matrix by groups of query heads with their key and value head, GGUF
    files all queries, then keys, then values. Where attention and FFN have a norm each, GGUF calls the FFN's
    `attn_norm` and attention's `attn_norm_2`. PowerInfer's files are ReLU, others the exact GELU, unless they say
    otherwise.
    """

    architecture = "falcon"
    gated = False
    default_activation = "gelu"
    gguf_keys: ClassVar[dict[str, object]] = {"tensor_data_layout": "jploski"}
    hf_layer: ClassVar[re.Pattern[str]] = re.compile(r"transformer\.h\.(\d{1,4})\.(.+)")
    hf_names: ClassVar[Mapping[str, str]] = {
        "transformer.word_embeddings.weight": "token_embd.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "transformer.ln_f.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    }
    hf_layer_names: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attn_norm",
        "ln_attn": "attn_norm",
        "ln_mlp": "ffn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    }

    def ffn_from_gguf(self, metadata: Metadata, *, records: bool) -> FfnKind:
        """As named in the file; else ReLU for neuron records, which are PowerInfer's."""
        default = "relu" if records else self.default_activation
        return ffn_from_gguf(metadata, self.architecture + ".", default, gated=False)

    def ffn_from_hf(self, config: Metadata) -> FfnKind:
        """The key is `activation`."""
        return ffn_from_hf(config, self.default_activation, gated=False, key="activation")

    def spec_from_hf(self, source: NetworkSource) -> ModelSpec:
        """The spec from config.json (keys as in transformers' FalconConfig)."""
        config = source.metadata
        grouped = config.boolean("new_decoder_architecture", False)
        neutral = {"alibi": False, "quantization_config": None}
        require_neutral(config, neutral if grouped else neutral | {"parallel_attn": True})
        n_layer = config.integer("num_hidden_layers", *BOUNDS["n_layer"])
        n_embd = config.integer("hidden_size", *BOUNDS["n_embd"])
        n_head = config.integer("num_attention_heads", *BOUNDS["n_head"])
        n_head_kv = n_head
        if grouped:
            n_head_kv = config.integer("num_kv_heads", *BOUNDS["n_head_kv"], n_head)
        elif config.boolean("multi_query", True):
            n_head_kv = 1
        n_vocab = self.rows(source, "token_embd.weight")
        self.check_vocabulary(source, n_vocab)
        bias = config.boolean("bias", False)
        return ModelSpec(
            family=self.architecture,
            name=source.path.name,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=n_embd // n_head,
            n_ff=config.integer("ffn_hidden_size", *BOUNDS["n_ff"], 4 * n_embd),
            n_vocab=n_vocab,
            n_ctx_train=config.integer("max_position_embeddings", *BOUNDS["n_ctx_train"], CONTEXT),
            norm_eps=config.number("layer_norm_epsilon", *EPS_BOUNDS, 1e-5),
            rope=rope_from_hf(config, n_embd // n_head),
            ffn=self.ffn_from_hf(config),
            windows=(0,) * n_layer,
            tied_embeddings=config.boolean("tie_word_embeddings", True),
            qkv_bias=bias,
            out_bias=bias,
            ffn_bias=bias,
            layer_norm=True,
            parallel=True,
            shared_norm=not (grouped and config.integer("num_ln_in_parallel_attn", 1, 2, 2) == 2),
        )

    def spec_from_gguf(self, source: NetworkSource) -> ModelSpec:
        """The spec from GGUF metadata (keys as llama.cpp's converter writes them)."""
        names, metadata, prefix = source.weights, source.metadata, self.architecture + "."
        require_neutral(metadata, GGUF_NEUTRAL | self.gguf_keys, prefix)
        n_layer = metadata.integer(prefix + "block_count", *BOUNDS["n_layer"])
        n_embd = metadata.integer(prefix + "embedding_length", *BOUNDS["n_embd"])
        n_head = uniform(metadata, prefix + "attention.head_count", BOUNDS["n_head"])
        n_vocab = self.rows(source, "token_embd.weight")
        self.check_vocabulary(source, n_vocab)
        bias = "blk.0.attn_qkv.bias" in names
        return ModelSpec(
            family=self.architecture,
            name=metadata.text("general.name", source.path.name),
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=uniform(metadata, prefix + "attention.head_count_kv", BOUNDS["n_head_kv"], n_head),
            head_dim=n_embd // n_head,
            n_ff=uniform(metadata, prefix + "feed_forward_length", BOUNDS["n_ff"]),
            n_vocab=n_vocab,
            n_ctx_train=metadata.integer(prefix + "context_length", *BOUNDS["n_ctx_train"]),
            norm_eps=metadata.number(prefix + "attention.layer_norm_epsilon", *EPS_BOUNDS),
            rope=rope_from_gguf(source, prefix, n_embd // n_head, interleaved=False),
            ffn=self.ffn_from_gguf(metadata, records="blk.0.ffn_down_t.weight" in names),
            windows=(0,) * n_layer,
            tied_embeddings="output.weight" not in names,
            qkv_bias=bias,
            out_bias=bias,
            ffn_bias=bias,
            layer_norm=True,
            parallel=True,
            shared_norm="blk.0.attn_norm_2.weight" not in names,
        )

    def arranged(self, kind: str, spec: ModelSpec, weights: dict[str, Weight]) -> dict[str, Weight]:
        """With q, k and v apart, and attention's norm as `attn_norm`."""
        order = _fused_order(spec) if kind == "hf" else None
        found: dict[str, Weight] = {}
        for name, weight in weights.items():
            stem, part, suffix = name.rpartition(".")[0].rpartition(".")[0], *name.split(".")[-2:]
            if part == "attn_qkv":
                found |= {f"{stem}.{p}.{suffix}": w for p, w in _split(spec, weight, suffix, order)}
            elif kind == "gguf" and not spec.shared_norm and part in {"attn_norm", "attn_norm_2"}:
                found[f"{stem}.{'ffn_norm' if part == 'attn_norm' else 'attn_norm'}.{suffix}"] = weight
            else:
                found[name] = weight
        return found

    def file_tensors(self, spec: ModelSpec, tensors: Sequence[NewTensor]) -> Sequence[NewTensor]:
        """With q, k and v in one tensor, and attention's own norm as `attn_norm_2`."""
        by_name = {tensor.name: tensor for tensor in tensors}
        renamed = {} if spec.shared_norm else {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}
        found = []
        for name, tensor in by_name.items():
            stem, _, part = name.rpartition(".")[0].rpartition(".")
            suffix = name.rpartition(".")[2]
            if part == PARTS[0]:
                found.append(_joined(f"{stem}.attn_qkv.{suffix}", [by_name[f"{stem}.{p}.{suffix}"] for p in PARTS]))
            elif part not in PARTS:
                new = f"{stem}.{renamed.get(part, part)}.{suffix}" if stem else name
                found.append(NewTensor(new, tensor.format, tensor.shape, tensor.produce))
        return found


def _fused_order(spec: ModelSpec) -> npt.NDArray[np.intp]:
    """The rows of a folder's fused matrix that are those of the queries, then of the keys, then of the values."""
    group = spec.n_head // spec.n_head_kv
    rows = np.arange(spec.n_q + 2 * spec.n_kv).reshape(spec.n_head_kv, group + 2, spec.head_dim)
    return np.concatenate([rows[:, :group].ravel(), rows[:, group].ravel(), rows[:, group + 1].ravel()])


def _split(
    spec: ModelSpec, weight: Weight, suffix: str, order: npt.NDArray[np.intp] | None
) -> list[tuple[str, Weight]]:
    """The fused matrix or bias as its three parts; views where its rows lie as they should."""
    ends = np.cumsum([0, spec.n_q, spec.n_kv, spec.n_kv]).tolist()
    length = weight.columns if suffix == "bias" else weight.rows
    if length != ends[-1]:
        problem = f"{length} rows; {spec.n_head} heads with {spec.n_head_kv} for keys need {ends[-1]}"
        raise ModelFormatError(spec.name, f"tensor {printable(weight.name)}", problem)
    cuts = [(name, start, stop) for name, start, stop in zip(PARTS, ends, ends[1:], strict=False)]
    if suffix == "bias":
        values = to_float(weight)
        values = values if order is None else values[:, order]
        return [(name, from_float(name, values[:, start:stop], F32)) for name, start, stop in cuts]
    if order is None or spec.n_head_kv == 1:
        return [(name, weight.slice(start, stop)) for name, start, stop in cuts]
    return [(name, PickedWeight(weight.name, weight, order[start:stop])) for name, start, stop in cuts]


def _joined(name: str, parts: Sequence[NewTensor]) -> NewTensor:
    def produce() -> Bytes:
        if parts[0].shape[0] == 1:
            return np.concatenate([np.ascontiguousarray(part.produce()).reshape(1, -1) for part in parts], axis=1)
        return np.concatenate([part.produce() for part in parts])

    if parts[0].shape[0] == 1:
        return NewTensor(name, parts[0].format, (1, sum(part.shape[1] for part in parts)), produce)
    return NewTensor(name, parts[0].format, (sum(part.shape[0] for part in parts), parts[0].shape[1]), produce)
