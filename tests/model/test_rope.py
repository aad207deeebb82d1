"""Rotations held to transformers, near and far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from thermocline.files.metadata import Metadata
from thermocline.model.families.scaling import rope_from_hf
from thermocline.model.header import rope_factors
from thermocline.model.rope import Llama3Scaling, RopeSpec, rope_table, rope_table_bytes

HEAD = 64
LENGTH = 512
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn whole range": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 8, "beta_slow": 0.01},
    "yarn attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7},
    "yarn mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 20, "beta_slow": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    parameters = {"rope_theta": 10000.0} | KINDS[kind]
    config = transformers.LlamaConfig(
        hidden_size=HEAD, num_attention_heads=1, max_position_embeddings=LENGTH, rope_parameters=dict(parameters)
    )
    theirs, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    ours = rope_from_hf(Metadata("tiny", {"max_position_embeddings": LENGTH, "rope_parameters": parameters}), HEAD)
    # theirs is a chain of a few float32 operations on powers, each good to 2^-24
    np.testing.assert_allclose(ours.angles(), theirs.double().numpy(), rtol=16 * 2**-24)
    assert ours.scaling is not None
    assert ours.scaling.attention_factor == pytest.approx(attention, rel=1e-12)


def test_the_old_spelling_means_the_same() -> None:
    new = Metadata("tiny", {"max_position_embeddings": LENGTH, "rope_parameters": KINDS["llama3"]})
    scaling = {key: value for key, value in KINDS["llama3"].items() if key not in {"rope_theta", "rope_type"}}
    old = Metadata(
        "tiny",
        {"max_position_embeddings": LENGTH, "rope_theta": 500000.0, "rope_scaling": {**scaling, "type": "llama3"}},
    )
    assert rope_from_hf(old, HEAD) == rope_from_hf(new, HEAD)


def test_far_positions_round_as_in_transformers() -> None:
    """At position 100,000 a float32 angle is good to 0.004 only; parity needs the same rounding, not a better one."""
    rope = RopeSpec(HEAD, 500000.0, interleaved=False)
    config = transformers.LlamaConfig(
        hidden_size=HEAD, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    position = 100_000
    cosines, sines = module(torch.zeros(1, 1, 1), torch.tensor([[position]]))
    table = rope_table(rope, position + 1)[position]
    half = HEAD // 2
    # frequencies may differ in their last bit, which moves an angle by one of its own last bits
    assert np.abs(table[0] - cosines[0, 0, :half].numpy()).max() <= 2 * position * 2**-24
    assert np.abs(table[1] - sines[0, 0, :half].numpy()).max() <= 2 * position * 2**-24
    assert np.mean(table[0] == cosines[0, 0, :half].numpy()) > 0.5


def test_llama3_scaling_is_the_same_as_its_factors() -> None:
    scaled = RopeSpec(HEAD, 500000.0, interleaved=True, scaling=Llama3Scaling(8.0, 1.0, 4.0, 128))
    factors = rope_factors(scaled)
    assert factors is not None
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(8.0)
    stored = RopeSpec(HEAD, 500000.0, interleaved=True, factors=tuple(factors.tolist()))
    np.testing.assert_allclose(stored.angles(), scaled.angles(), rtol=2**-23)


def test_table_shape_and_size() -> None:
    rope = RopeSpec(24, 10000.0, interleaved=True)
    table = rope_table(rope, 10)
    assert table.shape == (10, 2, 12)
    assert table.nbytes == rope_table_bytes(rope, 10)
    np.testing.assert_allclose(table[:, 0] ** 2 + table[:, 1] ** 2, 1, rtol=1e-6)
    np.testing.assert_array_equal(table[0], [[1] * 12, [0] * 12])
