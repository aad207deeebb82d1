"""Rotary embedding settings as files spell them."""

from __future__ import annotations

from thermocline.errors import UnsupportedModelError, printable
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import to_float
from thermocline.model.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
    yarn_magnitude,
)
from thermocline.model.source import NetworkSource, require_neutral
from thermocline.model.spec import BASE_BOUNDS, BOUNDS

FACTOR = (1e-6, 1e6)
CONTEXT = BOUNDS["n_ctx_train"]


def rope_from_gguf(source: NetworkSource, prefix: str, head_dim: int, *, interleaved: bool) -> RopeSpec:
    """From the keys `{arch}.rope.*` and the frequency factors in `rope_freqs.weight`."""
    metadata, prefix = source.metadata, prefix + "rope."
    factors = source.weights.get("rope_freqs.weight")
    return RopeSpec(
        rotary_dim=metadata.integer(prefix + "dimension_count", 2, head_dim, head_dim),
        base=metadata.number(prefix + "freq_base", *BASE_BOUNDS, 10000.0),
        interleaved=interleaved,
        scaling=_gguf_scaling(metadata, prefix),
        factors=None if factors is None else tuple(to_float(factors)[0].tolist()),
    )


def rope_from_hf(config: Metadata, head_dim: int) -> RopeSpec:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = config.section("rope_parameters") or config.section("rope_scaling")
    require_neutral(rope, {"partial_rotary_factor": 1.0})
    return RopeSpec(
        rotary_dim=head_dim,
        base=rope.number("rope_theta", *BASE_BOUNDS, config.number("rope_theta", *BASE_BOUNDS, 10000.0)),
        interleaved=False,
        scaling=_hf_scaling(rope, config),
    )


def _gguf_scaling(metadata: Metadata, prefix: str) -> RopeScaling | None:
    old = metadata.number(prefix + "scale_linear", *FACTOR, 1.0)
    kind = metadata.text(prefix + "scaling.type", "none" if old == 1 else "linear", limit=100)
    if kind == "none":
        return None
    factor = metadata.number(prefix + "scaling.factor", *FACTOR, old)
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "yarn":
        # llama.cpp multiplies YaRN's own magnitude by this factor
        louder = metadata.number(prefix + "scaling.attn_factor", *FACTOR, 1.0)
        louder = metadata.number(prefix + "scaling.yarn_attn_factor", *FACTOR, louder)
        return YarnScaling(
            factor=factor,
            original_ctx=metadata.integer(prefix + "scaling.original_context_length", *CONTEXT),
            attention_factor=louder * yarn_magnitude(factor),
            beta_fast=metadata.number(prefix + "scaling.yarn_beta_fast", *FACTOR, 32.0),
            beta_slow=metadata.number(prefix + "scaling.yarn_beta_slow", *FACTOR, 1.0),
        )
    raise _unknown(metadata, kind)


def _hf_scaling(rope: Metadata, config: Metadata) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default", limit=100), limit=100)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(rope.number("factor", *FACTOR))
    trained = config.integer("max_position_embeddings", *CONTEXT)
    original = rope.integer("original_max_position_embeddings", *CONTEXT, trained)
    original = config.integer("original_max_position_embeddings", *CONTEXT, original)
    if kind == "llama3":
        return Llama3Scaling(
            factor=rope.number("factor", *FACTOR),
            low_freq_factor=rope.number("low_freq_factor", *FACTOR),
            high_freq_factor=rope.number("high_freq_factor", *FACTOR),
            original_ctx=original,
        )
    if kind == "yarn":
        factor = rope.number("factor", *FACTOR, trained / original)
        return YarnScaling(
            factor=factor,
            original_ctx=original,
            attention_factor=rope.number("attention_factor", *FACTOR, _hf_magnitude(rope, factor)),
            beta_fast=rope.number("beta_fast", *FACTOR, 32.0),
            beta_slow=rope.number("beta_slow", *FACTOR, 1.0),
            truncate=rope.boolean("truncate", True),
        )
    raise _unknown(rope, kind)


def _hf_magnitude(rope: Metadata, factor: float) -> float:
    weight, over_all = rope.number("mscale", 0, 1e6, 0.0), rope.number("mscale_all_dim", 0, 1e6, 0.0)
    if weight and over_all:
        return yarn_magnitude(factor, weight) / yarn_magnitude(factor, over_all)
    return yarn_magnitude(factor)


def _unknown(metadata: Metadata, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{printable(str(metadata.path))}: rope scaling {printable(kind)} is not implemented; "
        "known are none, linear, llama3, yarn"
    )
