"""Logits held to transformers through files: folders as transformers saves them, and our GGUF files of them.

For formats coarser than float32, transformers runs the weights that the file holds, dequantised, so that
only the arithmetic is compared and not the loss of quantising.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.config import Mode
from thermocline.files.open import open_model
from thermocline.files.quantize import to_float
from thermocline.memory.convert import convert, write_records
from thermocline.memory.layout import neighbours
from thermocline.memory.loader import load_transformer
from thermocline.model.families import family_of
from thermocline.ops.reference import ReferenceOps

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "reglu": ("Llama", {"hidden_act": "relu", "tie_word_embeddings": True}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "arcee": (
        "Arcee",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
            }
        },
    ),
}
FLOAT_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers and the folder that it was saved to."""
    family, changes = MODELS[request.param]
    model = tiny.hugging_face(family, **changes)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def restored(model: Any, source: Any) -> None:
    """Give `model` the weights that the GGUF file `source` holds, as floats in transformers' order."""
    family = family_of(source)
    spec = family.spec(source)
    state = model.state_dict()
    layout = {f"model.layers.{i}.{hf}": f"blk.{i}.{ours}" for i in range(spec.n_layer)
              for hf, ours in type(family).hf_layer_names.items()}  # fmt: skip
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        canonical = type(family).hf_names.get(name) or f"{layout[stem]}.{kind}"
        if canonical == "output.weight" and spec.tied_embeddings:
            canonical = "token_embd.weight"
        if canonical in source.weights:
            values = to_float(source.weights[canonical])
        else:
            values = to_float(source.weights[canonical.replace("ffn_down", "ffn_down_t")]).T
        heads = {"attn_q": spec.n_head, "attn_k": spec.n_head_kv}.get(canonical.split(".")[-2], 0)
        if heads and family.interleaved:
            values = values.reshape(tensor.shape)[np.argsort(neighbours(heads, tensor.shape[0]))]
        state[name] = torch.from_numpy(np.array(values)).reshape(tensor.shape)
    model.load_state_dict(state)


def test_a_folder_runs_as_it_is(tiny: Any, saved: tuple[Any, Path], prompt: np.ndarray) -> None:
    model, folder = saved
    transformer, report = load_transformer(open_model(folder), ReferenceOps())
    error = tiny.relative_error(tiny.logits_of(transformer, prompt), tiny.expected_logits(model, prompt))
    assert error <= FLOAT_TOLERANCE
    assert all(r.max_abs_error == 0 for r in report.reblocked)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("records", [False, True], ids=["standard", "records"])
def test_a_file_computes_with_the_weights_it_holds(
    tiny: Any, saved: tuple[Any, Path], prompt: np.ndarray, tmp_path: Path, outtype: str, records: bool
) -> None:
    """ReferenceOps quantises no activations, so every format is held to the bound of float32."""
    model, folder = saved
    path = tmp_path / "model.gguf"
    convert(open_model(folder), path, outtype, records=records)
    source = open_model(path)
    transformer, report = load_transformer(source, ReferenceOps(), mode=Mode.DENSE)
    if report.reblocked:  # loading quantises down anew; compare what is run with itself, stored
        path = tmp_path / "records.gguf"
        write_records(source, path)
        source = open_model(path)
    before = model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    try:
        restored(model, source)
        error = tiny.relative_error(tiny.logits_of(transformer, prompt), tiny.expected_logits(model, prompt))
    finally:
        model.load_state_dict(before)
    assert error <= FLOAT_TOLERANCE
