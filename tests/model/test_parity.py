"""Logits held to transformers in float32, for every family, activation and rotary scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from thermocline.config import Mode
from thermocline.ops.contract import Ops

# Both sides accumulate in float32 at best: about 20 sums of 100 products in a row, each good to about
# 100 * 2^-24 = 6e-6 in the worst case. The demand is the project's own, and leaves no room for a wrong formula.
TOLERANCE = 1e-4

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biased": ("Llama", {"attention_bias": True}),
    "llama head size": ("Llama", {"head_dim": 24}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama no grouping": ("Llama", {"num_key_value_heads": 4}),
    "reglu": ("Llama", {"hidden_act": "relu"}),
    "relu2 gated": ("Llama", {"hidden_act": "relu2"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2 upper window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "arcee": ("Arcee", {}),
    "arcee yarn": ("Arcee", {"rope_parameters": YARN}),
    "opt": ("OPT", {}),
    "opt untied": ("OPT", {"tie_word_embeddings": False}),
    "falcon 7b": ("Falcon", {}),
    "falcon 40b": ("Falcon", GROUPED),
    "falcon 11b": ("Falcon", GROUPED | {"num_ln_in_parallel_attn": 1}),
    "falcon one head each": ("Falcon", {"multi_query": False, "bias": True}),
    "falcon biased": ("Falcon", GROUPED | {"bias": True, "activation": "relu"}),
    "falcon untied": ("Falcon", {"tie_word_embeddings": False, "bias": True, "activation": "relu"}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn stated": ("Qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}}),
    "yarn mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}}),
    "yarn untruncated": ("Llama", {"rope_parameters": YARN | {"truncate": False}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tiny: Any, ops: Ops, prompt: np.ndarray, name: str) -> None:
    family, changes = MODELS[name]
    model = tiny.hugging_face(family, **changes)
    ours = tiny.logits_of(tiny.load(model, ops), prompt)
    assert tiny.relative_error(ours, tiny.expected_logits(model, prompt)) <= TOLERANCE


class PatchedMlp(torch.nn.Module):
    """The FFN of models whose code is not part of transformers."""

    def __init__(self, mlp: Any, gate: Any, up: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.on_gate, self.on_up = gate, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.on_gate(self.gate_proj(x)) * self.on_up(self.up_proj(x)))


def patched(tiny: Any, gate: Any, up: Any) -> Any:
    model = tiny.hugging_face("Llama", hidden_act="relu")
    for layer in model.model.layers:
        layer.mlp = PatchedMlp(layer.mlp, gate, up)
    return model


def test_prosparse_keeps_gates_above_the_threshold(tiny: Any, ops: Ops, prompt: np.ndarray) -> None:
    model = patched(tiny, torch.nn.Threshold(0.4, 0.0), torch.nn.Identity())
    ours = tiny.load(model, ops, hidden_act="fatrelu", hidden_act_param=0.4, model_type="sparsellama")
    assert ours.spec.ffn.threshold == 0.4
    assert tiny.relative_error(tiny.logits_of(ours, prompt), tiny.expected_logits(model, prompt)) <= TOLERANCE


@pytest.mark.parametrize("config", [{"model_type": "bamboo"}, {"hidden_act": "drelu"}], ids=["bamboo", "llama"])
def test_drelu_is_relu_on_both_sides(tiny: Any, ops: Ops, prompt: np.ndarray, config: dict[str, Any]) -> None:
    model = patched(tiny, torch.nn.ReLU(), torch.nn.ReLU())
    ours = tiny.load(model, ops, sliding_window=None, **config)
    assert tiny.relative_error(tiny.logits_of(ours, prompt), tiny.expected_logits(model, prompt)) <= TOLERANCE


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Arcee", "OPT", "Falcon"])
def test_prompt_split_at_every_position(tiny: Any, usual_ops: Ops, prompt: np.ndarray, family: str) -> None:
    transformer = tiny.load(tiny.hugging_face(family), usual_ops)
    tokens = prompt[:12]
    whole = tiny.logits_of(transformer, tokens)
    for split in range(1, len(tokens)):
        assert tiny.relative_error(tiny.logits_of(transformer, tokens, (split,)), whole) <= 1e-6
    one_by_one = tiny.logits_of(transformer, tokens, tuple(range(1, len(tokens))))
    assert tiny.relative_error(one_by_one, whole) <= 1e-6


def test_half_precision_cache_costs_little(tiny: Any, usual_ops: Ops, prompt: np.ndarray) -> None:
    """Keys and values rounded to 11 bits move each attention output by 2^-11 of its size, a few times over."""
    model = tiny.hugging_face("Llama")
    error = tiny.relative_error(
        tiny.logits_of(tiny.load(model, usual_ops), prompt, cache_type="f16"), tiny.expected_logits(model, prompt)
    )
    assert 1e-6 < error < 2 * model.config.num_hidden_layers * 2**-11 * 10


RELU = {"Llama": {"hidden_act": "relu"}, "Arcee": {}, "OPT": {}, "Falcon": GROUPED | {"activation": "relu"}}


@pytest.mark.parametrize("family", RELU)
def test_exact_and_dense_agree_to_the_bit(tiny: Any, ops: Ops, prompt: np.ndarray, family: str) -> None:
    changes = RELU[family]
    exact = tiny.load(tiny.hugging_face(family, **changes), ops)
    assert exact.mode is Mode.EXACT
    dense = exact.with_mode(Mode.DENSE)
    np.testing.assert_array_equal(tiny.logits_of(exact, prompt), tiny.logits_of(dense, prompt))
