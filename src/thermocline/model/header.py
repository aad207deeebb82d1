"""A network described in GGUF metadata: what the families read back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thermocline.errors import UnsupportedModelError
from thermocline.model.families import BY_ARCHITECTURE
from thermocline.model.families.activation import activation_name
from thermocline.model.rope import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling, yarn_magnitude
from thermocline.model.spec import ModelSpec


def gguf_header(spec: ModelSpec) -> dict[str, object]:
    """Key values that describe `spec`, as numpy scalars of the types that GGUF readers expect.

    Raises:
        UnsupportedModelError: GGUF has no key for one of its settings.
    """
    epsilon = "layer_norm_epsilon" if spec.layer_norm else "layer_norm_rms_epsilon"
    own: dict[str, object] = {
        "context_length": np.uint32(spec.n_positions or spec.n_ctx_train),
        "embedding_length": np.uint32(spec.n_embd),
        "block_count": np.uint32(spec.n_layer),
        "feed_forward_length": np.uint32(spec.n_ff),
        "vocab_size": np.uint32(spec.n_vocab),
        "attention.head_count": np.uint32(spec.n_head),
        "attention.head_count_kv": np.uint32(spec.n_head_kv),
        "attention.key_length": np.uint32(spec.head_dim),
        "attention.value_length": np.uint32(spec.head_dim),
        f"attention.{epsilon}": np.float32(spec.norm_eps),
        **_rotation(spec.rope),
        "hidden_activation": activation_name(spec.ffn),
        **_windows(spec.windows),
        **BY_ARCHITECTURE[spec.family].gguf_keys,
    }
    if spec.ffn.threshold:
        own["hidden_activation_threshold"] = np.float32(spec.ffn.threshold)
    return {
        "general.architecture": spec.family,
        "general.name": spec.name,
        **{f"{spec.family}.{key}": value for key, value in own.items()},
    }


def rope_factors(rope: RopeSpec | None) -> npt.NDArray[np.float32] | None:
    """What `rope_freqs.weight` must hold: divisors of the unscaled frequencies, None if there are none.

    Llama 3's scaling has no keys of its own in GGUF; it is stored as its factors.
    """
    if rope is not None and isinstance(rope.scaling, Llama3Scaling):
        plain = RopeSpec(rope.rotary_dim, rope.base, rope.interleaved, None, rope.factors)
        inherited = np.ones(rope.rotary_dim // 2) if rope.factors is None else np.asarray(rope.factors)
        divided: npt.NDArray[np.float64] = plain.angles() / rope.angles() * inherited
        return divided.astype(np.float32)
    return None if rope is None or rope.factors is None else np.asarray(rope.factors, dtype=np.float32)


def _rotation(rope: RopeSpec | None) -> dict[str, object]:
    if rope is None:
        return {}
    return {
        "rope.dimension_count": np.uint32(rope.rotary_dim),
        "rope.freq_base": np.float32(rope.base),
        **_scaling(rope),
    }


def _scaling(rope: RopeSpec) -> dict[str, object]:
    match rope.scaling:
        case LinearScaling(factor=factor):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": np.float32(factor)}
        case YarnScaling(truncate=False):
            raise UnsupportedModelError("GGUF has no key for YaRN with truncate: false; run the folder itself")
        case YarnScaling() as yarn:
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": np.float32(yarn.factor),
                "rope.scaling.original_context_length": np.uint32(yarn.original_ctx),
                "rope.scaling.yarn_attn_factor": np.float32(yarn.attention_factor / yarn_magnitude(yarn.factor)),
                "rope.scaling.yarn_beta_fast": np.float32(yarn.beta_fast),
                "rope.scaling.yarn_beta_slow": np.float32(yarn.beta_slow),
            }
        case _:
            return {}


def _windows(windows: tuple[int, ...]) -> dict[str, object]:
    if not any(windows):
        return {}
    keys: dict[str, object] = {"attention.sliding_window": np.uint32(max(windows))}
    if not all(windows):
        keys["attention.sliding_window_pattern"] = np.array([window > 0 for window in windows])
    return keys
