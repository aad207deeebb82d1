"""A small random GGUF model in memory, without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from thermocline.files.formats import F32, BlockFormat
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.model.header import gguf_header
from thermocline.model.rope import RopeSpec
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import expected_tensors
from thermocline.ops.contract import Activation, FfnKind

RELU = FfnKind(Activation.RELU, gated=True)


@dataclass(frozen=True)
class DictSource:
    metadata: Metadata
    weights: Mapping[str, Weight]
    kind: str = "gguf"
    path: Path = field(default=Path("tiny"))
    fingerprint: str = "0" * 64


def random_source(
    fmt: BlockFormat = F32, ffn: FfnKind = RELU, *, records: bool = False, n_embd: int = 64, n_ff: int = 96
) -> DictSource:
    """Two layers of `n_embd` by `n_ff` neurons with matrices in `fmt`, the same numbers every time."""
    spec = ModelSpec(
        family="llama" if ffn.gated else "arcee",
        name="tiny",
        n_layer=2,
        n_embd=n_embd,
        n_head=2,
        n_head_kv=1,
        head_dim=n_embd // 2,
        n_ff=n_ff,
        n_vocab=50,
        n_ctx_train=32,
        norm_eps=1e-5,
        rope=RopeSpec(n_embd // 2, 10000.0, interleaved=True),
        ffn=ffn,
        windows=(0, 0),
        tied_embeddings=True,
    )
    rng = np.random.default_rng(11)
    weights = {}
    for name, shape in expected_tensors(spec, records=records).items():
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2) + (1 if shape[0] == 1 else 0)
        weights[name] = from_float(name, values, F32 if shape[0] == 1 or shape[1] % fmt.block else fmt)
    header = {k: v.item() if isinstance(v, np.generic) else v for k, v in gguf_header(spec).items()}
    return DictSource(Metadata("tiny", header), weights)


@pytest.fixture
def make_source() -> Callable[..., DictSource]:
    return random_source
