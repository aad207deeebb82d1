"""A spec holds only possible networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from thermocline.errors import ModelFormatError
from thermocline.model.rope import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling
from thermocline.model.spec import BOUNDS, ModelSpec
from thermocline.model.tensors import expected_tensors
from thermocline.ops.contract import Activation, FfnKind

SPEC = ModelSpec(
    family="llama",
    name="tiny",
    n_layer=2,
    n_embd=64,
    n_head=4,
    n_head_kv=2,
    head_dim=16,
    n_ff=96,
    n_vocab=160,
    n_ctx_train=64,
    norm_eps=1e-5,
    rope=RopeSpec(16, 10000.0, interleaved=True),
    ffn=FfnKind(Activation.SILU, gated=True),
    windows=(0, 7),
    tied_embeddings=False,
)


@pytest.mark.parametrize("field", BOUNDS)
@pytest.mark.parametrize("beyond", ["low", "high"])
def test_sizes_out_of_bounds_are_refused_with_the_number(field: str, beyond: str) -> None:
    low, high = BOUNDS[field]
    value = low - 1 if beyond == "low" else high + 1
    with pytest.raises(ModelFormatError, match=rf"tiny: {field}: is {value}; allowed: {low} to {high}"):
        replace(SPEC, **{field: value})


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "kv heads do not divide": ({"n_head_kv": 3}, "n_head_kv.*divisor of n_head"),
    "eps zero": ({"norm_eps": 0.0}, "norm_eps"),
    "eps nan": ({"norm_eps": float("nan")}, "norm_eps"),
    "eps one": ({"norm_eps": 1.0}, "norm_eps"),
    "windows missing": ({"windows": (0,)}, "windows"),
    "window negative": ({"windows": (0, -1)}, "sliding window"),
    "rope odd": ({"rope": RopeSpec(15, 10000.0, interleaved=True)}, "rope dimensions"),
    "rope none": ({"rope": RopeSpec(0, 10000.0, interleaved=True)}, "rope dimensions"),
    "rope beyond head": ({"rope": RopeSpec(18, 10000.0, interleaved=True)}, "rope dimensions"),
    "rope base zero": ({"rope": RopeSpec(16, 0.0, interleaved=True)}, "rope base"),
    "rope base nan": ({"rope": RopeSpec(16, float("nan"), interleaved=True)}, "rope base"),
    "factors short": ({"rope": RopeSpec(16, 1e4, interleaved=True, factors=(1.0,))}, "rope factors"),
    "factors zero": ({"rope": RopeSpec(16, 1e4, interleaved=True, factors=(0.0,) * 8)}, "rope factors"),
    "factors nan": ({"rope": RopeSpec(16, 1e4, interleaved=True, factors=(float("nan"),) * 8)}, "rope factors"),
    "linear by zero": ({"rope": RopeSpec(16, 1e4, True, LinearScaling(0.0))}, "rope scaling: factor is 0"),
    "llama3 upside down": (
        {"rope": RopeSpec(16, 1e4, True, Llama3Scaling(8.0, 4.0, 4.0, 32))},
        "high_freq_factor 4.0 is not above",
    ),
    "yarn without context": ({"rope": RopeSpec(16, 1e4, True, YarnScaling(4.0, 0, 1.0))}, "original_context is 0"),
    "threshold": ({"ffn": FfnKind(Activation.RELU, gated=True, threshold=-1.0)}, "threshold"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_values_are_refused(case: str) -> None:
    changes, message = IMPOSSIBLE[case]
    with pytest.raises(ModelFormatError, match=message):
        replace(SPEC, **changes)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "flags", [{}, {"tied_embeddings": True}, {"qkv_bias": True, "out_bias": True, "qk_norm": True}]
)
def test_parameters_are_the_elements_of_the_tensors(gated: bool, flags: dict[str, bool]) -> None:
    spec = replace(SPEC, ffn=FfnKind(Activation.RELU, gated=gated), **flags)
    for records in (False, True):
        tensors = expected_tensors(spec, records=records)
        assert spec.parameters == sum(rows * columns for rows, columns in tensors.values())
