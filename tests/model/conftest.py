"""Tiny random transformers models, and the same models as our sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from thermocline.config import CacheType
from thermocline.errors import HardwareError
from thermocline.files.formats import F32
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import Ops
from thermocline.ops.cpu import LEVELS, CpuOps
from thermocline.ops.reference import ReferenceOps

torch.set_num_threads(1)  # the models are too small to share

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


OWN: dict[str, dict[str, Any]] = {
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True},
    "Falcon": {"ffn_hidden_size": 96, "tie_word_embeddings": True},
}
"""What some families call otherwise, or have otherwise."""


@dataclass(frozen=True)
class DictSource:
    """A source made in memory."""

    kind: str
    metadata: Metadata
    weights: Mapping[str, Weight]
    path: Path = field(default=Path("tiny"))
    fingerprint: str = "0" * 64


def hugging_face(name: str, **changes: Any) -> Any:
    """A tiny random model of transformers, in float32, with weights large enough to matter in every part."""
    config = getattr(transformers, name + "Config")(**SIZES | OWN.get(name, {}) | changes)
    torch.manual_seed(7)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm, is_bias = "norm" in key or ".ln_" in key, key.endswith("bias")
            centre = 1.0 if is_norm and not is_bias else 0.0
            parameter.normal_(centre, 0.2 if is_norm else 0.5 if is_bias else 0.15)
    return model


def source_of(model: Any, **config: Any) -> DictSource:
    """A Hugging Face model as a source; `config` replaces values of its config.json."""
    weights = {}
    for name, tensor in model.state_dict().items():
        values = tensor.detach().float().numpy()
        weights[name] = from_float(name, values.reshape(-1, values.shape[-1]), F32)
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return DictSource("hf", Metadata("tiny", model.config.to_dict() | config), weights)


def logits_of(
    transformer: Transformer, tokens: list[int] | np.ndarray, splits: tuple[int, ...] = (), cache_type: str = "f32"
) -> np.ndarray:
    """Logits of every token of one sequence, run in pieces that end at `splits`."""
    tokens = np.asarray(tokens, dtype=np.int32)
    kind = CacheType(cache_type)
    cache = KVCache(transformer.spec, transformer.ops, len(tokens), kind, kind)
    workspace = Workspace(transformer.spec, transformer.ops, len(tokens))
    rows = []
    for start, stop in zip((0, *splits), (*splits, len(tokens)), strict=True):
        segment = Segment(cache, start, stop - start)
        result = transformer.step(tokens[start:stop], (segment,), workspace, Outputs.ALL)
        rows.append(transformer.ops.to_host(result.logits).copy())
    return np.concatenate(rows)


def expected_logits(model: Any, tokens: list[int] | np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)[None].astype(np.int64))).logits[0].numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@dataclass(frozen=True)
class Tiny:
    """What tests of models need, as one fixture, for test folders share no modules."""

    hugging_face: Callable[..., Any] = hugging_face
    source_of: Callable[..., DictSource] = source_of
    logits_of: Callable[..., np.ndarray] = logits_of
    expected_logits: Callable[..., np.ndarray] = expected_logits
    relative_error: Callable[..., float] = relative_error
    source: type[DictSource] = DictSource

    def load(self, model: Any, ops: Ops | None = None, **config: Any) -> Transformer:
        """A Hugging Face model run by `ops`, ReferenceOps unless given."""
        return load_transformer(source_of(model, **config), ops or ReferenceOps())[0]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def prompt() -> np.ndarray:
    """Forty tokens, more than any sliding window of the tests."""
    return np.random.default_rng(3).integers(0, SIZES["vocab_size"], 40).astype(np.int32)


@pytest.fixture(scope="session", params=["reference", *LEVELS])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Every implementation of the arithmetic that this machine has."""
    if request.param == "reference":
        return ReferenceOps()
    try:
        return CpuOps(1, request.param)
    except HardwareError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["reference", "cpu"])
def usual_ops(request: pytest.FixtureRequest) -> Ops:
    """Both implementations, the native one as it is used."""
    return ReferenceOps() if request.param == "reference" else CpuOps(2)
