"""Logits held to transformers through files: folders as transformers saves them, and our GGUF files of them.

For formats coarser than float32, transformers runs the weights that the file holds, dequantised, so that
only the arithmetic is compared and not the loss of quantising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.files.open import open_model
from thermocline.files.quantize import to_float
from thermocline.memory.convert import convert, write_records
from thermocline.memory.layout import neighbours
from thermocline.memory.loader import load_transformer
from thermocline.model.families import family_of
from thermocline.model.network import Transformer
from thermocline.ops.contract import Ops
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
    "opt": ("OPT", {}),
    "falcon": ("Falcon", {"bias": True, "tie_word_embeddings": False}),
    "reluFalcon": ("Falcon", {"activation": "relu", "new_decoder_architecture": True, "num_kv_heads": 2}),
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
LAYOUTS = pytest.mark.parametrize("records", [False, True], ids=["standard", "records"])
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
    state, weights = model.state_dict(), family.weights(source, spec)
    for name, tensor in state.items():
        canonical = family.canonical(name)
        assert canonical is not None
        if canonical == "output.weight" and spec.tied_embeddings:
            canonical = "token_embd.weight"
        if "attn_qkv" in canonical:
            values = fused(spec, [to_float(weights[canonical.replace("_qkv", f"_{part}")]) for part in "qkv"])
        elif canonical in weights:
            values = to_float(weights[canonical])
        else:
            stored = to_float(weights[canonical.replace("ffn_down", "ffn_down_t")])
            values = stored if canonical.endswith("bias") else stored.T
        heads = {"attn_q": spec.n_head, "attn_k": spec.n_head_kv}.get(canonical.split(".")[-2], 0)
        if heads and family.interleaved:
            values = values.reshape(tensor.shape)[np.argsort(neighbours(heads, tensor.shape[0]))]
        state[name] = torch.from_numpy(np.array(values)).reshape(tensor.shape)
    model.load_state_dict(state)


def fused(spec: Any, parts: list[np.ndarray]) -> np.ndarray:
    """Falcon's q, k and v (or their biases) in one, by groups of query heads with their key and value head."""
    shape = spec.n_head_kv, -1, spec.head_dim, parts[0].shape[1] if parts[0].shape[0] > 1 else 1
    return np.concatenate([part.reshape(shape) for part in parts], axis=1).reshape(-1, shape[-1])


def rounded(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What CpuOps makes of activations that meet Q8_0 or Q4_0: 8 bits and a scale for each block of 32."""
    blocks = inputs[0].unflatten(-1, (-1, 32))
    peak = blocks.abs().amax(-1, keepdim=True)
    steps = torch.round(blocks * (127 / peak).nan_to_num(0, 0, 0))
    return ((steps * (peak / 127)).flatten(-2),)


def rounded_to_bf16(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What a CPU that multiplies BF16 makes of the activations of a batch."""
    return (inputs[0].bfloat16().float(),)


def rounded_logits(
    tiny: Any, model: Any, transformer: Any, prompt: np.ndarray, rounded: Callable[..., Any] = rounded
) -> np.ndarray:
    """Logits of transformers with activations, and to BF16 weights too, rounded wherever CpuOps does."""
    floats = rounded is not rounded_to_bf16 or not transformer.ops.name.startswith("cpu/amx")
    records = transformer.layers[0].ffn.parts[0].block.records
    exempt = ("down_proj", "fc2", "4h_to_h") if records and floats else ()
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(exempt)
    ]
    hooks = [module.register_forward_pre_hook(rounded) for module in modules]
    weights = [module.weight.data for module in modules]
    try:
        if rounded is rounded_to_bf16:
            for module in modules:
                module.weight.data = module.weight.data.bfloat16().float()
        return tiny.expected_logits(model, prompt)
    finally:
        for module, hook, weight in zip(modules, hooks, weights, strict=True):
            hook.remove()
            module.weight.data = weight


@pytest.fixture
def converted(
    saved: tuple[Any, Path], usual_ops: Ops, tmp_path: Path, outtype: str, records: bool
) -> Iterator[tuple[Transformer, Any]]:
    """The model's GGUF file loaded, and transformers with the weights that are run."""
    model, folder = saved
    path = tmp_path / "model.gguf"
    convert(open_model(folder), path, outtype, records=records)
    source = open_model(path)
    transformer, report = load_transformer(source, usual_ops)
    if report.reblocked:  # loading quantised down anew, as the writer of records does
        write_records(source, tmp_path / "records.gguf")
        source = open_model(tmp_path / "records.gguf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        restored(model, source)
        yield transformer, model
    finally:
        model.load_state_dict(before)


def test_a_folder_runs_as_it_is(tiny: Any, saved: tuple[Any, Path], usual_ops: Ops, prompt: np.ndarray) -> None:
    model, folder = saved
    transformer, report = load_transformer(open_model(folder), usual_ops)
    error = tiny.relative_error(tiny.logits_of(transformer, prompt), tiny.expected_logits(model, prompt))
    assert error <= FLOAT_TOLERANCE
    assert all(r.max_abs_error == 0 for r in report.reblocked)


@LAYOUTS
def test_a_file_of_floats_is_the_model(
    tiny: Any, saved: tuple[Any, Path], usual_ops: Ops, prompt: np.ndarray, tmp_path: Path, records: bool
) -> None:
    model, folder = saved
    convert(open_model(folder), tmp_path / "model.gguf", "f32", records=records)
    transformer, _ = load_transformer(open_model(tmp_path / "model.gguf"), usual_ops)
    error = tiny.relative_error(tiny.logits_of(transformer, prompt), tiny.expected_logits(model, prompt))
    assert error <= FLOAT_TOLERANCE


@LAYOUTS
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_a_file_computes_with_the_weights_it_holds(
    tiny: Any, converted: tuple[Transformer, Any], prompt: np.ndarray, outtype: str
) -> None:
    """Without rounded activations, every format is held to the bound of float32.

    With them, to twice what the same rounding does to transformers: the same errors, but values that lie within
    float32's error of the border between two steps fall to either side, here and there.
    """
    transformer, model = converted
    exact = tiny.expected_logits(model, prompt)
    error = tiny.relative_error(tiny.logits_of(transformer, prompt), exact)
    levels = {"bf16": {"cpu/avx512bf16", "cpu/amx"}, "f16": set()}.get(outtype, {"cpu/amx"})
    multiplies_bf16 = transformer.ops.name in levels
    if isinstance(transformer.ops, ReferenceOps) or (outtype in {"f16", "bf16"} and not multiplies_bf16):
        assert error <= FLOAT_TOLERANCE
    else:
        how = rounded_to_bf16 if multiplies_bf16 else rounded
        rounding = tiny.relative_error(rounded_logits(tiny, model, transformer, prompt, how), exact)
        assert error <= 2 * rounding < 0.2


@LAYOUTS
@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("usual_ops", ["cpu"], indirect=True)
def test_rounded_activations_are_the_only_difference(
    tiny: Any, converted: tuple[Transformer, Any], prompt: np.ndarray
) -> None:
    """Of many short prompts, most meet no value at a border, and there the agreement is that of floats."""
    transformer, model = converted
    errors = [
        tiny.relative_error(tiny.logits_of(transformer, part), rounded_logits(tiny, model, transformer, part))
        for part in prompt.reshape(-1, 4)
    ]
    assert np.median(errors) <= 1e-5
