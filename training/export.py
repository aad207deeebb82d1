"""Turn a checkpoint into a Hugging Face folder, and that folder into a Q8_0 GGUF file.

    python -m training.export --run build/epilimnion --gguf src/thermocline/shipped/epilimnion.q8_0.gguf

The GGUF file has the layout that other engines expect of an `arcee` model.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.open import open_model
from thermocline.memory.convert import convert
from training.data import END_OF_TEXT, end_of_text
from training.evaluate import load

PROVENANCE = {
    "general.type": "model",
    "general.name": "epilimnion",
    "general.description": "Writes Python; trained from scratch on Python's standard library",
    "general.license": "psf-2.0",
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


def export_gguf(folder: Path, path: Path) -> int:
    """The folder as a Q8_0 GGUF file that says where it comes from; returns its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as temporary:
        plain = Path(temporary) / path.name
        convert(open_model(folder), plain, "q8_0")
        with GgufFile.open(plain) as file:
            tensors = [NewTensor(t.name, t.format, t.shape, partial(getattr, t, "data")) for t in file.tensors.values()]
            return write_gguf(path, file.typed_metadata() | PROVENANCE, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--hf", type=Path, help="Hugging Face folder to write (default: hf in the run's)")
    parser.add_argument("--gguf", type=Path, required=True, help="GGUF file to write")
    arguments = parser.parse_args()
    folder = arguments.hf or arguments.run / "hf"
    export_hf(arguments.run, folder)
    print(f"{arguments.gguf}: {export_gguf(folder, arguments.gguf):,} bytes")


if __name__ == "__main__":
    main()
