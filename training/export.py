"""Turn a checkpoint into a Hugging Face folder, and that folder into a Q8_0 GGUF file.

    python -m training.export --run build/epilimnion --hf build/epilimnion/hf --gguf epilimnion.q8_0.gguf

The GGUF file follows llama.cpp's conventions: its tensor names, its metadata keys, and the rows of q
and k reordered from Hugging Face's half-split rotary pairing to neighbouring pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from training.data import END_OF_TEXT, end_of_text
from training.evaluate import load

NAME = "epilimnion"
Floats = npt.NDArray[np.float32]

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def export_hf(run: Path, folder: Path) -> None:
    """The checkpoint as transformers' `ArceeForCausalLM` reads it, in float32."""
    network, _ = load(run / "checkpoint.pt")
    shape = network.shape
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.numpy() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    end = end_of_text(tokenizer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, end)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.neurons,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "relu2",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def metadata(folder: Path) -> dict[str, Any]:
    """GGUF's description of the folder's model and tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    normal, control = 1, 3
    return {
        "general.architecture": "arcee",
        "general.type": "model",
        "general.name": NAME,
        "general.description": "Predicts Python; trained from scratch on Python's standard library",
        "general.license": "psf-2.0",
        "general.quantization_version": 2,
        "general.file_type": 7,  # mostly Q8_0
        "arcee.vocab_size": config["vocab_size"],
        "arcee.context_length": config["max_position_embeddings"],
        "arcee.embedding_length": config["hidden_size"],
        "arcee.block_count": config["num_hidden_layers"],
        "arcee.feed_forward_length": config["intermediate_size"],
        "arcee.attention.head_count": config["num_attention_heads"],
        "arcee.attention.head_count_kv": config["num_key_value_heads"],
        "arcee.attention.key_length": config["head_dim"],
        "arcee.attention.value_length": config["head_dim"],
        "arcee.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "arcee.rope.dimension_count": config["head_dim"],
        "arcee.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [control if token == END_OF_TEXT else normal for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": True,
    }


def pair_neighbours(weight: Floats, heads: int) -> Floats:
    """Rows (i, i + half) of each head become rows (2i, 2i + 1)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(folder: Path) -> Iterator[tuple[str, Floats]]:
    """The folder's tensors under their GGUF names, in llama.cpp's order."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = load_file(folder / "model.safetensors")
    yield "token_embd.weight", found.pop("model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in GGUF_NAMES.items():
            weight = found.pop(f"model.layers.{layer}.{theirs}.weight")
            if ours in heads:
                weight = pair_neighbours(weight, heads[ours])
            yield f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight)
    yield "output_norm.weight", found.pop("model.norm.weight")
    if found:
        raise SystemExit(f"tensors without a GGUF name: {', '.join(found)}")
