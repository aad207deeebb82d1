"""A sparse model of PowerInfer written here, read back by hand, and run."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from thermocline.activity.order import By, Order
from thermocline.activity.predictor import Predictor
from thermocline.config import CacheType, Mode
from thermocline.errors import (
    ModelFormatError,
    NumericalError,
    OutputError,
    ThermoclineError,
    UnsupportedModelError,
    UsageError,
)
from thermocline.files.formats import F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.open import open_model
from thermocline.files.powerinfer import PowerinferPredictor, PredictorLayer, read_predictor
from thermocline.files.quantize import from_float, quantize, to_float
from thermocline.memory.convert import convert
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.memory.powerinfer import write_powerinfer
from thermocline.model.families import BY_ARCHITECTURE, family_of
from thermocline.model.header import gguf_header, rope_factors
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.rope import LinearScaling, YarnScaling
from thermocline.model.tensors import expected_tensors
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.reference import ReferenceOps

OPS = ReferenceOps()
N_EMBD, N_FF, N_VOCAB, RANKS = 64, 96, 50, (32, 64)
DRELU = FfnKind(Activation.RELU, gated=True, both=True)
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down_t")


# An independent reader of the format, for all types of values


@dataclass
class Stored:
    magic: bytes
    version: int
    keys: dict[str, Any]
    types: dict[str, int]
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]]


def by_hand(path: Path) -> Stored:
    raw = path.read_bytes()
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, raw, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return raw[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            element, count = take("I"), take("Q")
            return [value(element) for _ in range(count)]
        return take("BbHhIif?__Qqd"[kind])

    magic, version, n_tensors, n_keys = raw[:4], take("I") and take("I"), take("Q"), take("Q")
    keys, types = {}, {}
    for _ in range(n_keys):
        name, kind = text(), take("I")
        types[name] = kind
        keys[name] = value(kind)
    table = []
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        table.append((name, tuple(take("Q") for _ in range(n_dims)), take("I"), take("Q")))
    start = at + -at % 32
    tensors = {}
    end = 0
    for name, ne, kind, offset in table:
        assert offset == end + -end % 32
        block, size = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}[kind]
        assert ne[0] % block == 0
        end = offset + int(np.prod(ne)) // block * size
        tensors[name] = (ne, kind, raw[start + offset : start + end])
    assert len(raw) == start + end + -end % 32
    return Stored(magic, version, keys, types, tensors)


# A source with a tokenizer, and a predictor for it


def source_file(
    make_source: Callable[..., Any],
    path: Path,
    ffn: FfnKind | None = None,
    family: str = "llama",
    header: Mapping[str, object] = MappingProxyType({}),
    **changes: Any,
) -> GgufFile:
    """A GGUF model in F32 with a tokenizer; `changes` replaces fields of its spec."""
    base = make_source(F32) if ffn is None else make_source(F32, ffn)
    spec = replace(family_of(base).spec(base), family=family, **changes)
    weights = dict(base.weights) if family not in UNGATED else {}
    rng = np.random.default_rng(2)
    for name, shape in expected_tensors(spec, records=False).items():
        if name not in weights or weights[name].shape != shape:
            weights[name] = from_float(name, rng.standard_normal(shape).astype(np.float32), F32)
    keys = gguf_header(spec) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(N_VOCAB)],
        "tokenizer.ggml.scores": np.arange(N_VOCAB, dtype=np.float32),
        "tokenizer.ggml.token_type": np.ones(N_VOCAB, np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "other.key": "not for PowerInfer",
        **header,
    }
    factors = rope_factors(spec.rope)
    if factors is not None:
        weights["rope_freqs.weight"] = from_float("rope_freqs.weight", factors[None], F32)
    tensors = [NewTensor(name, w.format, w.shape, lambda w=w: w.data) for name, w in weights.items()]
    write_gguf(path, keys, BY_ARCHITECTURE[family].file_tensors(spec, tensors))
    return GgufFile.open(path)


def predictor_of(fmt: BlockFormat = F32, n_layer: int = 2) -> PowerinferPredictor:
    rng = np.random.default_rng(5)
    layers = []
    for rank in RANKS[:n_layer]:
        fc1 = rng.standard_normal((rank, N_EMBD)).astype(np.float32)
        fc2 = rng.standard_normal((N_FF, rank)).astype(np.float32)
        layers.append(PredictorLayer(from_float("fc1.weight", fc1, fmt), from_float("fc2.weight", fc2, fmt)))
    return PowerinferPredictor(tuple(layers), 0.125)


def logits_of(transformer: Transformer) -> np.ndarray:
    tokens = np.arange(12, dtype=np.int32)
    cache = KVCache(transformer.spec, transformer.ops, 12, CacheType.F32, CacheType.F32)
    workspace = Workspace(transformer.spec, transformer.ops, 12)
    return transformer.step(tokens, (Segment(cache, 0, 12),), workspace, Outputs.ALL).logits.copy()


# What is written


@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "bamboo"])
def test_names_shapes_types_and_keys(
    family: str, outtype: str, make_source: Callable[..., Any], tmp_path: Path
) -> None:
    """Exactly what PowerInfer's loader asks for: it refuses other tensors, and keys of other types."""
    source = source_file(make_source, tmp_path / "s.gguf", DRELU if family == "bamboo" else None, family)
    predictor = predictor_of()
    report = write_powerinfer(source, predictor, tmp_path / "m.gguf", outtype)
    stored = by_hand(tmp_path / "m.gguf")
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert (stored.magic, stored.version) == (b"PWRI", 3)
    kind, head = (1, 1) if outtype == "f16" else (2, 8)
    wanted: dict[str, tuple[tuple[int, ...], int]] = {
        "token_embd.weight": ((N_EMBD, N_VOCAB), head),
        "output.weight": ((N_EMBD, N_VOCAB), head),
        "output_norm.weight": ((N_EMBD,), 0),
    }
    for i, rank in enumerate(RANKS):
        rows = {"attn_k": 32, "attn_v": 32, "ffn_gate": N_FF, "ffn_up": N_FF, "ffn_down_t": N_FF}
        wanted |= {f"blk.{i}.{name}.weight": ((N_EMBD, rows.get(name, N_EMBD)), kind) for name in MATRICES}
        wanted |= {f"blk.{i}.{name}.weight": ((N_EMBD,), 0) for name in ("attn_norm", "ffn_norm")}
        wanted[f"blk.{i}.fc1.weight"] = ((N_EMBD, rank), kind)
        wanted[f"blk.{i}.fc2.weight"] = ((rank, N_FF), kind)
    assert {name: (ne, k) for name, (ne, k, _) in stored.tensors.items()} == wanted
    u32, f32, string, array = 4, 6, 8, 9
    assert stored.types == {
        "general.architecture": string,
        "general.name": string,
        f"{family}.context_length": u32,
        f"{family}.embedding_length": u32,
        f"{family}.block_count": u32,
        f"{family}.feed_forward_length": u32,
        f"{family}.rope.dimension_count": u32,
        f"{family}.attention.head_count": u32,
        f"{family}.attention.head_count_kv": u32,
        f"{family}.attention.layer_norm_rms_epsilon": f32,
        f"{family}.rope.freq_base": f32,
        "general.file_type": u32,
        "general.quantization_version": u32,
        "powerinfer.sparse_threshold": f32,
        "tokenizer.ggml.model": string,
        "tokenizer.ggml.tokens": array,
        "tokenizer.ggml.scores": array,
        "tokenizer.ggml.token_type": array,
        "tokenizer.ggml.bos_token_id": u32,
    }
    assert stored.keys["general.architecture"] == family
    assert stored.keys["general.file_type"] == {"f16": 1, "q4_0": 2}[outtype]
    assert stored.keys["powerinfer.sparse_threshold"] == 0.125
    assert stored.keys[f"{family}.block_count"] == 2
    assert stored.keys[f"{family}.rope.dimension_count"] == 32
    assert stored.keys["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(N_VOCAB)]


@pytest.mark.parametrize(("outtype", "fmt"), [("f16", F16), ("q4_0", Q4_0)])
def test_the_numbers(outtype: str, fmt: BlockFormat, make_source: Callable[..., Any], tmp_path: Path) -> None:
    source = source_file(make_source, tmp_path / "s.gguf")
    predictor = predictor_of()
    write_powerinfer(source, predictor, tmp_path / "m.gguf", outtype)
    tensors = {name: data for name, (_, _, data) in by_hand(tmp_path / "m.gguf").tensors.items()}
    for i, layer in enumerate(predictor.layers):
        blk = f"blk.{i}."
        for name in MATRICES[:-1]:
            x = to_float(source.weights[f"{blk}{name}.weight"])
            assert tensors[f"{blk}{name}.weight"] == quantize(x, fmt).tobytes()
        down = np.ascontiguousarray(to_float(source.weights[blk + "ffn_down.weight"]).T)
        assert tensors[blk + "ffn_down_t.weight"] == quantize(down, fmt).tobytes()
        assert tensors[blk + "fc1.weight"] == quantize(to_float(layer.fc1), fmt).tobytes()
        assert tensors[blk + "fc2.weight"] == quantize(to_float(layer.fc2), fmt).tobytes()
    embedding = to_float(source.weights["token_embd.weight"])
    assert tensors["token_embd.weight"] == quantize(embedding, F16 if fmt is F16 else Q8_0).tobytes()
    assert tensors["output.weight"] == tensors["token_embd.weight"]  # tied, which PowerInfer does not know


def test_an_output_head_of_its_own_is_kept(make_source: Callable[..., Any], tmp_path: Path) -> None:
    source = source_file(make_source, tmp_path / "s.gguf", tied_embeddings=False)
    write_powerinfer(source, predictor_of(), tmp_path / "m.gguf")
    tensors = by_hand(tmp_path / "m.gguf").tensors
    head = quantize(to_float(source.weights["output.weight"]), F16).tobytes()
    assert tensors["output.weight"][2] == head != tensors["token_embd.weight"][2]


NEITHER = FfnKind(Activation.RELU, gated=False)
COMMON = {"ffn": NEITHER, "layer_norm": True}
UNGATED: dict[str, dict[str, Any]] = {
    "opt": COMMON
    | {"n_head_kv": 2, "rope": None, "qkv_bias": True, "out_bias": True, "ffn_bias": True, "position_offset": 2},
    "falcon": COMMON | {"parallel": True},
}
"""How OPT and ReluFalcon differ from the networks of the tests above."""
TENSORS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "opt": {
        "position_embd.weight": ((N_EMBD, 34), 1),
        **{f"{name}.bias": ((N_EMBD,), 0) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down_t")},
        **{f"{name}.{part}": ((N_EMBD,), 0) for name in ("attn_norm", "ffn_norm") for part in ("weight", "bias")},
        **{f"{name}.weight": ((N_EMBD, N_EMBD), 1) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        "ffn_up.bias": ((N_FF,), 0),
    },
    "falcon": {
        **{f"{name}.{part}": ((N_EMBD,), 0) for name in ("attn_norm", "attn_norm_2") for part in ("weight", "bias")},
        "attn_qkv.weight": ((N_EMBD, N_EMBD + 2 * 32), 1),
        "attn_output.weight": ((N_EMBD, N_EMBD), 1),
    },
}
"""Their tensors: of the file, or of each layer."""


@pytest.mark.parametrize("family", UNGATED)
def test_names_shapes_types_and_keys_without_a_gate(
    family: str, make_source: Callable[..., Any], tmp_path: Path
) -> None:
    source = source_file(make_source, tmp_path / "s.gguf", family=family, **UNGATED[family])
    write_powerinfer(source, predictor_of(), tmp_path / "m.gguf")
    stored = by_hand(tmp_path / "m.gguf")
    assert (stored.magic, stored.version) == (b"PWRI", 3)
    wanted: dict[str, tuple[tuple[int, ...], int]] = {
        "token_embd.weight": ((N_EMBD, N_VOCAB), 1),
        "output.weight": ((N_EMBD, N_VOCAB), 1),
        "output_norm.weight": ((N_EMBD,), 0),
        "output_norm.bias": ((N_EMBD,), 0),
    }
    for name, tensor in TENSORS[family].items():
        wanted |= {name: tensor} if "position" in name else {f"blk.{i}.{name}": tensor for i in range(2)}
    for i, rank in enumerate(RANKS):
        wanted |= {f"blk.{i}.{name}.weight": ((N_EMBD, N_FF), 1) for name in ("ffn_up", "ffn_down_t")}
        wanted |= {f"blk.{i}.fc1.weight": ((N_EMBD, rank), 1), f"blk.{i}.fc2.weight": ((rank, N_FF), 1)}
    assert {name: (ne, k) for name, (ne, k, _) in stored.tensors.items()} == wanted
    u32, f32, string = 4, 6, 8
    own = {name: kind for name, kind in stored.types.items() if name.startswith(f"{family}.")}
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length")
    heads = ("attention.head_count", "attention.head_count_kv")
    rotary = {"rope.dimension_count": u32, "rope.freq_base": f32, "tensor_data_layout": string}
    assert own == {
        **{f"{family}.{name}": u32 for name in (*sizes, *heads)},
        f"{family}.attention.layer_norm_epsilon": f32,
        **({f"{family}.{name}": kind for name, kind in rotary.items()} if family == "falcon" else {}),
    }
    assert stored.keys["general.architecture"] == family
    assert stored.keys[f"{family}.context_length"] == (34 if family == "opt" else 32)
    if family == "falcon":
        assert stored.keys["falcon.tensor_data_layout"] == "jploski"


@pytest.mark.parametrize("family", UNGATED)
def test_it_runs_as_it_is_without_a_gate(family: str, make_source: Callable[..., Any], tmp_path: Path) -> None:
    source = source_file(make_source, tmp_path / "s.gguf", family=family, **UNGATED[family])
    write_powerinfer(source, predictor_of(), tmp_path / "m.gguf")
    model = open_model(tmp_path / "m.gguf", strict=True)
    transformer, report = load_transformer(model, OPS, check=True)
    assert transformer.spec.ffn == NEITHER
    assert transformer.mode is Mode.EXACT
    assert report.reblocked == ()
    convert(source, tmp_path / "plain.gguf", "f16")
    plain, _ = load_transformer(GgufFile.open(tmp_path / "plain.gguf"), OPS)
    np.testing.assert_array_equal(logits_of(transformer), logits_of(plain))
    predicted = load_transformer(model, OPS, mode=Mode.PREDICTED, predictor=Predictor.of_powerinfer(predictor_of()))[0]
    assert predicted.mode is Mode.PREDICTED


def test_neurons_in_order_and_the_predictor_with_them(make_source: Callable[..., Any], tmp_path: Path) -> None:
    source = source_file(make_source, tmp_path / "s.gguf", family="opt", **UNGATED["opt"])
    rows = np.stack([np.random.default_rng(i).permutation(N_FF) for i in range(2)]).astype(np.int32)
    order = Order("m" * 64, "tiny", By.FREQUENCY, 1, rows, np.zeros((2, N_FF)))
    write_powerinfer(source, predictor_of(), tmp_path / "plain.gguf")
    write_powerinfer(source, predictor_of(), tmp_path / "sorted.gguf", order=order)
    plain, stored = by_hand(tmp_path / "plain.gguf"), by_hand(tmp_path / "sorted.gguf")
    for name, (ne, kind, data) in plain.tensors.items():
        part = ".".join(name.split(".")[-2:])
        if part in {"ffn_up.weight", "ffn_up.bias", "ffn_down_t.weight", "fc2.weight"}:
            cells = np.frombuffer(data, np.uint8).reshape(N_FF, -1)
            data = cells[rows[int(name.split(".")[1])]].tobytes()
        assert stored.tensors[name] == (ne, kind, data)
    assert stored.keys["thermocline.neuron_order"] == rows.ravel().tolist()
    assert {k: v for k, v in stored.keys.items() if "thermocline" not in k} == plain.keys


# What is read back


@pytest.mark.parametrize(("family", "ffn"), [("llama", FfnKind(Activation.RELU, gated=True)), ("bamboo", DRELU)])
@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
def test_it_runs_as_it_is(
    family: str, ffn: FfnKind, outtype: str, make_source: Callable[..., Any], tmp_path: Path
) -> None:
    """Mapped without a copy, in exact mode, with the logits of the plain file of the same numbers."""
    source = source_file(make_source, tmp_path / "s.gguf", ffn, family)
    write_powerinfer(source, predictor_of(), tmp_path / "m.gguf", outtype)
    model = open_model(tmp_path / "m.gguf", strict=True)
    assert isinstance(model, GgufFile)
    assert model.powerinfer
    assert "activation" not in " ".join(model.metadata)  # the file does not say ReLU: its magic does
    transformer, report = load_transformer(model, OPS, check=True)
    assert transformer.spec.ffn == ffn
    assert transformer.mode is Mode.EXACT
    assert report.reblocked == ()
    down = transformer.layers[1].ffn.parts[0].block.down
    assert np.shares_memory(down.data, model.tensors["blk.1.ffn_down_t.weight"].data)
    convert(source, tmp_path / "plain.gguf", outtype, records=True)
    plain, _ = load_transformer(GgufFile.open(tmp_path / "plain.gguf"), OPS)
    np.testing.assert_array_equal(logits_of(transformer), logits_of(plain))
    assert np.isfinite(logits_of(transformer)).all()


def test_back_and_forth_is_the_same_file(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """A file of PowerInfer's, its predictors read and written again with it: every byte is the same."""
    write_powerinfer(source_file(make_source, tmp_path / "s.gguf"), predictor_of(), tmp_path / "a.gguf")
    first = GgufFile.open(tmp_path / "a.gguf")
    predictor = read_predictor(first)
    assert predictor is not None
    assert predictor.threshold == 0.125
    assert [layer.rank for layer in predictor.layers] == list(RANKS)
    write_powerinfer(first, predictor, tmp_path / "b.gguf")
    one, two = by_hand(tmp_path / "a.gguf"), by_hand(tmp_path / "b.gguf")
    assert one.tensors == two.tensors
    assert one.keys == two.keys
    assert one.types == two.types


def test_predictors_of_other_formats_become_the_files(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """Rows that are no whole number of blocks stay F16."""
    source = source_file(make_source, tmp_path / "s.gguf")
    odd = PredictorLayer(
        from_float("fc1.weight", np.ones((8, N_EMBD), np.float32), Q8_0),
        from_float("fc2.weight", np.ones((N_FF, 8), np.float32), F32),
    )
    write_powerinfer(source, PowerinferPredictor((odd, odd)), tmp_path / "m.gguf", "q4_0")
    tensors = by_hand(tmp_path / "m.gguf").tensors
    assert tensors["blk.0.fc1.weight"][:2] == ((N_EMBD, 8), 2)
    assert tensors["blk.0.fc2.weight"][:2] == ((8, N_FF), 1)


def test_linear_scaling_and_what_powerinfer_computes_otherwise(make_source: Callable[..., Any], tmp_path: Path) -> None:
    base = make_source()
    rope = replace(family_of(base).spec(base).rope, scaling=LinearScaling(4.0))
    ffn = FfnKind(Activation.RELU, gated=True, threshold=0.01)
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
    source = source_file(make_source, tmp_path / "s.gguf", ffn, rope=rope, windows=(16, 16), header=tokenizer)
    report = write_powerinfer(source, predictor_of(), tmp_path / "m.gguf")
    keys = by_hand(tmp_path / "m.gguf").keys
    assert keys["llama.rope.scaling.type"] == "linear"
    assert keys["llama.rope.scaling.factor"] == 4.0
    assert report.notes == (
        "PowerInfer splits text by GPT-2's rule, not by the tokenizer's qwen2: it makes other tokens of a prompt",
        "PowerInfer has no sliding window: outputs differ after 16 tokens",
        "PowerInfer computes ReLU without the threshold of 0.01: outputs differ",
    )


# What is refused


NOT_RUNNABLE: dict[str, tuple[dict[str, Any], str]] = {
    "silu": ({"ffn": FfnKind(Activation.SILU, gated=True)}, "PowerInfer cannot run this FFN; in llama it is ReGLU"),
    "relu-squared": ({"ffn": FfnKind(Activation.RELU2, gated=True)}, "this FFN; in llama it is ReGLU"),
    "drelu-in-llama": ({"ffn": DRELU}, "this FFN; in llama it is ReGLU"),
    "biases": ({"qkv_bias": True}, "biases of attention"),
    "norms": ({"family": "qwen3", "qk_norm": True}, "family qwen3; known are llama, bamboo, opt, falcon"),
    "heads": ({"head_dim": 16, "rope": {"rotary_dim": 16}}, "heads that are not n_embd together"),
    "part-of-a-head": ({"rope": {"rotary_dim": 16}}, "rotary dimensions that are not the whole head"),
    "yarn": ({"rope": {"scaling": YarnScaling(4.0, 8, 1.0)}}, "factors of rotary frequencies, nor any scaling but lin"),
    "gelu": (
        UNGATED["falcon"] | {"family": "falcon", "ffn": FfnKind(Activation.GELU, gated=False)},
        "in falcon it is ReLU without a gate",
    ),
    "biased falcon": (
        UNGATED["falcon"] | {"family": "falcon", "qkv_bias": True, "out_bias": True, "ffn_bias": True},
        "biases of attention and FFN",
    ),
    "factors": ({"rope": {"factors": (2.0,) * 16}}, "factors of rotary frequencies"),
}
"""Changes of the source, and what the refusal says."""


@pytest.mark.parametrize("name", NOT_RUNNABLE)
def test_networks_that_powerinfer_cannot_run(name: str, make_source: Callable[..., Any], tmp_path: Path) -> None:
    changes, decisive = NOT_RUNNABLE[name]
    if "rope" in changes:
        base = make_source()
        changes = changes | {"rope": replace(family_of(base).spec(base).rope, **changes["rope"])}
    source = source_file(make_source, tmp_path / "s.gguf", **changes)
    with pytest.raises(UnsupportedModelError, match=decisive):
        write_powerinfer(source, predictor_of(), tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["s.gguf"]


def nan_in_fc1(predictor: PowerinferPredictor) -> PowerinferPredictor:
    fc1 = to_float(predictor.layers[0].fc1).copy()
    fc1[0, 0] = np.nan
    layer = PredictorLayer(from_float("fc1.weight", fc1, F32), predictor.layers[0].fc2)
    return replace(predictor, layers=(layer, *predictor.layers[1:]))


REFUSED: dict[str, tuple[Callable[[GgufFile, Path], object], type[ThermoclineError], str]] = {
    "q8_0": (
        lambda s, p: write_powerinfer(s, predictor_of(), p, "q8_0"),
        UsageError,
        "outtype is q8_0; PowerInfer computes sparsely with f16, q4_0",
    ),
    "layers": (
        lambda s, p: write_powerinfer(s, predictor_of(n_layer=1), p),
        ModelFormatError,
        "layers of the predictor: found 1; the model has 2",
    ),
    "nan": (
        lambda s, p: write_powerinfer(s, nan_in_fc1(predictor_of()), p, "q4_0"),
        NumericalError,
        "which Q4_0 cannot store",
    ),
    "folder": (
        lambda s, p: write_powerinfer(s, predictor_of(), p / "no" / "m.gguf"),
        OutputError,
        "No such file or directory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_left(name: str, make_source: Callable[..., Any], tmp_path: Path) -> None:
    act, error, decisive = REFUSED[name]
    source = source_file(make_source, tmp_path / "s.gguf")
    with pytest.raises(error) as caught:
        act(source, tmp_path / "m.gguf")
    assert decisive in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["s.gguf"]


def test_a_model_without_a_tokenizer(make_source: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a model without a tokenizer"):
        write_powerinfer(make_source(), predictor_of(), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
