"""Reading a spec: round trips through GGUF metadata, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from thermocline.errors import ModelFormatError, ThermoclineError, UnsupportedModelError
from thermocline.files.formats import F32
from thermocline.files.gguf_writer import NewTensor
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.model.families import BY_ARCHITECTURE, BY_MODEL_TYPE, family_of
from thermocline.model.header import gguf_header
from thermocline.model.rope import LinearScaling, RopeSpec, YarnScaling
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import check_tensors, expected_tensors
from thermocline.ops.contract import Activation, FfnKind

SILU = FfnKind(Activation.SILU, gated=True)
SPECS: dict[str, ModelSpec] = {
    name: ModelSpec(
        family=name,
        name="tiny",
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_head_kv=1,
        head_dim=8,
        n_ff=12,
        n_vocab=20,
        n_ctx_train=64,
        norm_eps=float(np.float32(1e-5)),
        rope=RopeSpec(8, 10000.0, interleaved=family.interleaved),
        ffn=SILU,
        windows=(0, 0),
        tied_embeddings=False,
        qk_norm=family.qk_norm,
    )
    for name, family in BY_ARCHITECTURE.items()
}
SPECS["opt"] = replace(
    SPECS["opt"],
    n_head_kv=2,
    rope=None,
    ffn=FfnKind(Activation.RELU, gated=False),
    layer_norm=True,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    position_offset=2,
)
SPECS["falcon"] = replace(
    SPECS["falcon"], ffn=FfnKind(Activation.GELU, gated=False), layer_norm=True, parallel=True, shared_norm=True
)
SPECS["arcee"] = replace(SPECS["arcee"], ffn=FfnKind(Activation.RELU2, gated=False))
SPECS["bamboo"] = replace(SPECS["bamboo"], ffn=FfnKind(Activation.RELU, gated=True, both=True))


def weights_of(spec: ModelSpec, *, records: bool = False) -> dict[str, Weight]:
    """The tensors of a file of `spec`, all zeros."""
    tensors = [
        NewTensor(name, F32, shape, lambda shape=shape: np.zeros((shape[0], 4 * shape[1]), np.uint8))
        for name, shape in expected_tensors(spec, records=records).items()
    ]
    return {
        t.name: Weight(t.name, F32, (t.shape[0], t.shape[1]), t.produce())
        for t in BY_ARCHITECTURE[spec.family].file_tensors(spec, tensors)
    }


def plain(value: object) -> object:
    """A value as the reader of GGUF files gives it."""
    return value.item() if isinstance(value, np.generic) else value


def gguf(tiny: Any, spec: ModelSpec, *, records: bool = False, **changes: object) -> Any:
    """The source that a file of `spec` would be; `changes` replace keys of the architecture (None removes)."""
    header = {key: plain(value) for key, value in gguf_header(spec).items()}
    for name, value in changes.items():
        header[f"{spec.family}.{name.replace('__', '.')}"] = value
    header = {key: value for key, value in header.items() if value is not None}
    return tiny.source("gguf", Metadata("tiny", header), weights_of(spec, records=records))


ROUND_TRIPS: dict[str, ModelSpec] = {
    **SPECS,
    "tied": replace(SPECS["llama"], tied_embeddings=True),
    "biased": replace(SPECS["qwen2"], qkv_bias=True, out_bias=True),
    "reglu": replace(SPECS["llama"], ffn=FfnKind(Activation.RELU, gated=True)),
    "fatrelu": replace(SPECS["llama"], ffn=FfnKind(Activation.RELU, gated=True, threshold=0.25)),
    "drelu": replace(SPECS["qwen2"], ffn=FfnKind(Activation.RELU, gated=True, both=True)),
    "window": replace(SPECS["llama"], windows=(9, 9)),
    "upper window": replace(SPECS["qwen3"], windows=(0, 9)),
    "head size": replace(SPECS["qwen3"], head_dim=10, rope=RopeSpec(6, 5e5, interleaved=False)),
    "opt untied": replace(SPECS["opt"], tied_embeddings=True),
    "falcon two norms": replace(SPECS["falcon"], n_head_kv=2, shared_norm=False),
    "falcon biased": replace(SPECS["falcon"], qkv_bias=True, out_bias=True, ffn_bias=True, shared_norm=False),
    "reluFalcon": replace(SPECS["falcon"], ffn=FfnKind(Activation.RELU, gated=False)),
    "linear": replace(SPECS["llama"], rope=RopeSpec(8, 1e4, True, LinearScaling(4.0))),
    "yarn": replace(SPECS["qwen2"], rope=RopeSpec(8, 1e6, False, YarnScaling(1.0, 32, 1.5, 16.0, 2.0))),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_header_says_all_of_a_spec(tiny: Any, name: str) -> None:
    source = gguf(tiny, ROUND_TRIPS[name])
    family = family_of(source)
    spec = family.spec(source)
    assert spec == ROUND_TRIPS[name]
    check_tensors("tiny", spec, family.weights(source, spec))


def test_yarn_without_truncation_has_no_header() -> None:
    rope = RopeSpec(8, 1e4, True, YarnScaling(4.0, 32, 1.5, truncate=False))
    with pytest.raises(UnsupportedModelError, match="truncate"):
        gguf_header(replace(SPECS["llama"], rope=rope))


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_powerinfer_file_names_no_activation_and_means_relu(tiny: Any, name: str) -> None:
    source = gguf(tiny, SPECS[name], records=True, hidden_activation=None)
    assert family_of(source).spec(source).ffn == FfnKind(Activation.RELU, gated=SPECS[name].ffn.gated)
    standard = gguf(tiny, SPECS[name], hidden_activation=None)
    assert family_of(standard).spec(standard).ffn == SPECS[name].ffn


def test_what_powerinfer_leaves_out_of_its_files_of_opt(tiny: Any) -> None:
    """No epsilon, no heads of keys; the context length counts the rows of the table of positions."""
    changes = {"attention__layer_norm_epsilon": None, "attention__head_count_kv": None, "hidden_activation": None}
    source = gguf(tiny, SPECS["opt"], records=True, **changes)
    assert source.metadata["opt.context_length"] == SPECS["opt"].n_ctx_train + 2
    assert {"blk.1.ffn_down_t.bias", "blk.1.ffn_up.bias", "position_embd.weight"} <= set(source.weights)
    spec = family_of(source).spec(source)
    assert spec == replace(SPECS["opt"], norm_eps=1e-5)
    check_tensors("tiny", spec, family_of(source).weights(source, spec))


def test_bamboo_is_drelu_whatever_its_file_says(tiny: Any) -> None:
    for changes in ({"hidden_activation": None}, {}):
        source = gguf(tiny, SPECS["bamboo"], records=True, **changes)
        assert family_of(source).spec(source).ffn == FfnKind(Activation.RELU, gated=True, both=True)


def test_predictors_and_factors_are_explained(tiny: Any) -> None:
    source = gguf(tiny, SPECS["llama"], records=True)
    for name in ("blk.0.fc1.weight", "blk.1.fc2.weight"):
        source.weights[name] = from_float(name, np.zeros((4, 4), dtype=np.float32), F32)
    factors = np.array([[1, 2, 3, 4]], dtype=np.float32)
    source.weights["rope_freqs.weight"] = from_float("rope_freqs.weight", factors, F32)
    family = family_of(source)
    spec = family.spec(source)
    assert spec.rope.factors == (1, 2, 3, 4)
    check_tensors("tiny", spec, family.weights(source, spec))


KEYS: dict[str, tuple[dict[str, object], str]] = {
    "no layers": ({"block_count": 0}, "block_count.*found 0.*1 to 512"),
    "513 layers": ({"block_count": 513}, "block_count.*found 513"),
    "2^31 layers": ({"block_count": 1 << 31}, "block_count"),
    "layers as text": ({"block_count": "2"}, "block_count"),
    "layers missing": ({"block_count": None}, "llama.block_count: is missing"),
    "no heads": ({"attention__head_count": 0}, "attention.head_count"),
    "kv heads do not divide": ({"attention__head_count_kv": 3}, "n_head_kv.*is 3"),
    "no kv heads": ({"attention__head_count_kv": 0}, "head_count_kv"),
    "layers of two sizes": ({"feed_forward_length": np.array([12, 8])}, "differs between layers"),
    "huge context": ({"context_length": 1 << 31}, "context_length"),
    "rope base zero": ({"rope__freq_base": 0.0}, "freq_base"),
    "rope base nan": ({"rope__freq_base": float("nan")}, "freq_base"),
    "rope wider than a head": ({"rope__dimension_count": 10}, "dimension_count"),
    "rope odd": ({"rope__dimension_count": 7}, "rope dimensions: is 7"),
    "rope scaling unknown": ({"rope__scaling__type": "longrope"}, "rope scaling longrope.*known are none, linear"),
    "rope scaled by zero": ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, "scaling.factor"),
    "eps infinite": ({"attention__layer_norm_rms_epsilon": float("inf")}, "rms_epsilon"),
    "eps missing": ({"attention__layer_norm_rms_epsilon": None}, "rms_epsilon: is missing"),
    "values of other length": ({"attention__value_length": 4}, "value_length"),
    "experts": ({"expert_count": 8}, "expert_count is 8; implemented is only 0"),
    "soft cap": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    "activation unknown": ({"hidden_activation": "mish"}, "activation mish is not implemented; known are silu, swish"),
    "activation a number": ({"hidden_activation": 3}, "hidden_activation"),
    "threshold of silu": ({"hidden_activation_threshold": 0.1}, "0.1.*no meaning for silu"),
    "threshold nan": ({"hidden_activation_threshold": float("nan")}, "threshold"),
    "vocabulary": ({"vocab_size": 21}, "counts 21 tokens, but the embedding has 20 rows"),
    "window negative": ({"attention__sliding_window": -1}, "sliding_window"),
    "window pattern": (
        {"attention__sliding_window": 4, "attention__sliding_window_pattern": np.array([True])},
        "an array of 2 times",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_headers_that_are_refused(tiny: Any, case: str) -> None:
    changes, message = KEYS[case]
    source = gguf(tiny, SPECS["llama"], **changes)
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=message):
        family_of(source).spec(source)


def test_a_token_list_of_other_length_is_refused(tiny: Any) -> None:
    source = gguf(tiny, SPECS["llama"])
    source = replace(source, metadata=Metadata("tiny", {**source.metadata, "tokenizer.ggml.tokens": ["a"] * 19}))
    with pytest.raises(ModelFormatError, match="counts 19 tokens, but the embedding has 20 rows"):
        family_of(source).spec(source)


@pytest.mark.parametrize(
    ("kind", "key", "known"),
    [("gguf", "general.architecture", "llama, bamboo, qwen2"), ("hf", "model_type", "llama, sparsellama, mistral")],
)
def test_an_unknown_family_is_refused_by_name(tiny: Any, kind: str, key: str, known: str) -> None:
    source = tiny.source(kind, Metadata("tiny", {key: "mamba\x1b[2J"}), {})
    with pytest.raises(UnsupportedModelError, match=rf"family mamba\\x1b\[2J is not implemented; known are {known}"):
        family_of(source)
    with pytest.raises(ModelFormatError, match=key):
        family_of(tiny.source(kind, Metadata("tiny", {}), {}))


def test_every_family_of_a_folder_can_be_written(tiny: Any) -> None:
    assert {family.architecture for family in BY_MODEL_TYPE.values()} == set(BY_ARCHITECTURE)


def drop(*names: str) -> Callable[[dict[str, Weight]], None]:
    def change(weights: dict[str, Weight]) -> None:
        for name in names:
            del weights[name]

    return change


def put(name: str, rows: int, columns: int) -> Callable[[dict[str, Weight]], None]:
    def change(weights: dict[str, Weight]) -> None:
        weights[name] = from_float(name, np.zeros((rows, columns), dtype=np.float32), F32)

    return change


WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Weight]], None], str]] = {
    "missing": (drop("blk.1.attn_k.weight"), "blk.1.attn_k.weight is missing"),
    "unknown": (put("blk.0.ssm_in.weight", 2, 2), "blk.0.ssm_in.weight does not belong to this network"),
    "layer too many": (put("blk.2.attn_norm.weight", 1, 16), "blk.2.attn_norm.weight does not belong"),
    "bias of one layer": (put("blk.1.attn_q.bias", 1, 16), "blk.1.attn_q.bias does not belong"),
    "transposed": (put("blk.0.ffn_down.weight", 12, 16), "blk.0.ffn_down.weight is 12 x 16, wanted 16 x 12"),
    "head narrower": (put("output.weight", 19, 16), "output.weight is 19 x 16, wanted 20 x 16"),
    "both layouts": (put("blk.0.ffn_down_t.weight", 12, 16), "blk.1.ffn_down_t.weight is missing"),
    "more than five": (
        drop(*(f"blk.{i}.attn_{part}.weight" for i in range(2) for part in "qkv")),
        "blk.0.attn_v.weight is missing; blk.1.attn_q.weight is missing; blk.1.attn_k.weight is missing, and 1 more",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_refused(tiny: Any, case: str) -> None:
    change, message = WRONG_TENSORS[case]
    source = gguf(tiny, SPECS["llama"])
    change(source.weights)
    family = family_of(source)
    with pytest.raises(ModelFormatError, match=message):
        check_tensors("tiny", spec := family.spec(source), family.weights(source, spec))


def test_no_embedding_is_refused(tiny: Any) -> None:
    source = gguf(tiny, SPECS["llama"])
    del source.weights["token_embd.weight"]
    with pytest.raises(ModelFormatError, match=r"token_embd\.weight is missing"):
        family_of(source).spec(source)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "size as text": ({"hidden_size": "64"}, "hidden_size"),
    "size missing": ({"hidden_size": None}, "hidden_size: is missing"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "vocabulary": ({"vocab_size": 161}, "vocab_size: counts 161 tokens, but the embedding has 160 rows"),
    "activation": ({"hidden_act": "gelu_new"}, "activation gelu_new"),
    "no threshold": ({"hidden_act": "fatrelu"}, "hidden_act_param: is missing"),
    "ffn biases": ({"mlp_bias": True}, "mlp_bias"),
    "quantised elsewhere": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "rope of a part": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    "rope unknown": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling dynamic"),
    "rope without factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor: is missing"),
    "rope a list": ({"rope_parameters": [1]}, "rope_parameters"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
}


OTHER_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt-350m": ("OPT", {"do_layer_norm_before": False}, "do_layer_norm_before is False; implemented is only True"),
    "projected": ("OPT", {"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32; implemented is only 64"),
    "opt without biases": ("OPT", {"enable_bias": False}, "enable_bias is False"),
    "opt of galactica": ("OPT", {"activation_function": "gelu_new"}, "activation gelu_new is not implemented"),
    "alibi": ("Falcon", {"alibi": True}, "alibi is True; implemented is only False"),
    "falcon in sequence": ("Falcon", {"parallel_attn": False}, "parallel_attn is False; implemented is only True"),
    "three norms": ("Falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel"),
    "falcon's tanh": ("Falcon", {"activation": "gelu_pytorch_tanh"}, "activation gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("case", OTHER_CONFIGS)
def test_other_families_configs_that_are_refused(tiny: Any, case: str) -> None:
    family, changes, message = OTHER_CONFIGS[case]
    source = tiny.source_of(tiny.hugging_face(family), **changes)
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=message):
        family_of(source).spec(source)


@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_layouts_that_are_not_these(tiny: Any, name: str) -> None:
    changes = {"opt": {"attention__head_count_kv": 1}, "falcon": {"tensor_data_layout": "other"}}[name]
    source = gguf(tiny, SPECS[name], **changes)
    with pytest.raises(UnsupportedModelError, match=r"head_count_kv is 1|tensor_data_layout is 'other'"):
        family_of(source).spec(source)


def test_a_fused_matrix_of_other_rows_is_refused(tiny: Any) -> None:
    source = gguf(tiny, SPECS["falcon"])
    put("blk.1.attn_qkv.weight", 31, 16)(source.weights)
    family = family_of(source)
    with pytest.raises(ModelFormatError, match=r"blk\.1\.attn_qkv\.weight.*31 rows; 2 heads with 1 for keys need 32"):
        family.weights(source, family.spec(source))


def test_two_tensors_of_one_name_are_refused(tiny: Any) -> None:
    source = tiny.source_of(tiny.hugging_face("OPT"))
    put("decoder.layers.0.fc1.weight", 96, 64)(source.weights)
    family = family_of(source)
    with pytest.raises(ModelFormatError, match="are the same tensor"):
        family.weights(source, family.spec(source))


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(tiny: Any, case: str) -> None:
    changes, message = CONFIGS[case]
    source = tiny.source_of(tiny.hugging_face("Llama"), **changes)
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=message):
        family_of(source).spec(source)


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention", "round_attention", "full_attention"], "all"])
def test_layer_types_that_are_refused(tiny: Any, kinds: object) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    source = tiny.source_of(tiny.hugging_face("Qwen2"), **changes)
    with pytest.raises(ModelFormatError, match="layer_types"):
        family_of(source).spec(source)


def test_old_folders_hold_rotary_frequencies(tiny: Any) -> None:
    source = tiny.source_of(tiny.hugging_face("Llama"))
    put("model.layers.0.self_attn.rotary_emb.inv_freq", 1, 8)(source.weights)
    family = family_of(source)
    spec = family.spec(source)
    check_tensors("tiny", spec, family.weights(source, spec))
    for stray in ("model.layers.0.self_attn.q_proj.scales", "token_embd.weight", "model.layers.00.mlp.up_proj.weight"):
        put(stray, 1, 8)(source.weights)
        with pytest.raises(ThermoclineError, match=r"does not belong to this network|does not belong"):
            check_tensors("tiny", spec, family.weights(source, spec))
        del source.weights[stray]


def test_a_head_beside_tied_embeddings_is_not_used(tiny: Any) -> None:
    source = tiny.source_of(tiny.hugging_face("Llama", tie_word_embeddings=True))
    put("lm_head.weight", 160, 64)(source.weights)
    family = family_of(source)
    spec = family.spec(source)
    check_tensors("tiny", spec, family.weights(source, spec))
    assert spec.tied_embeddings
