"""Tokenizers through opened models, as everything else in the package gets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from thermocline.errors import ModelFormatError, UnsupportedModelError
from thermocline.files.gguf import GgufFile
from thermocline.files.source import ModelSource
from thermocline.text.load import load_tokenizer
from thermocline.text.tokenizer import CHARACTER_OF_BYTE


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A file as llama.cpp's converter writes it, with one small tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    if "tokenizer.ggml.scores" in metadata:
        writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    if "tokenizer.ggml.merges" in metadata:
        writer.add_token_merges(metadata["tokenizer.ggml.merges"])
        writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tensor("x", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gguf(
    tmp_path: Path, spm_metadata: dict[str, Any], bpe_metadata: Callable[[str], Any], model: str, awkward: str
) -> None:
    metadata = spm_metadata if model == "llama" else bpe_metadata("llama-bpe")
    with GgufFile.open(write_gguf(tmp_path / "m.gguf", metadata)) as source:
        tokenizer = load_tokenizer(source)
    assert tokenizer.size == len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer.decode(tokenizer.encode(awkward)) == awkward
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_gguf_token_that_is_not_utf8(tmp_path: Path, spm_metadata: dict[str, Any]) -> None:
    spm_metadata["tokenizer.ggml.tokens"][300] = b"\xff\xfe"
    with (
        GgufFile.open(write_gguf(tmp_path / "m.gguf", spm_metadata)) as source,
        pytest.raises(ModelFormatError, match=r"tokens\[300\].*not UTF-8"),
    ):
        load_tokenizer(source)


def test_unknown_words_in_a_file(tmp_path: Path, bpe_metadata: Callable[[str], Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", bpe_metadata("qwen2") | {"tokenizer.ggml.pre": "kimi-k2"})
    with GgufFile.open(path) as source, pytest.raises(UnsupportedModelError, match="kimi-k2"):
        load_tokenizer(source)


class Folder:
    """Of an opened folder only what `load_tokenizer` looks at."""

    kind = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path


def test_folder(tmp_path: Path, trained: Callable[[str], Tokenizer], awkward: str) -> None:
    trained("qwen2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    source: ModelSource = Folder(tmp_path)  # type: ignore[assignment]
    tokenizer = load_tokenizer(source)
    assert tokenizer.eos_id == 2
    assert tokenizer.decode(tokenizer.encode(awkward)) == awkward


def test_a_llama_3_sized_file_opens_quickly(tmp_path: Path) -> None:
    letters = list(CHARACTER_OF_BYTE.values())
    tokens = list(letters)
    merges = []
    for left in letters:
        for right in letters:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    pairs = tokens[256:]
    for i, pair in enumerate(pairs[:62_000]):
        tokens.append(pair + letters[i % 256])
        merges.append(f"{pair} {letters[i % 256]}")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    }
    path = write_gguf(tmp_path / "m.gguf", metadata)
    with GgufFile.open(path) as source:
        tokenizer = load_tokenizer(source)
    assert tokenizer.size == len(tokens) > 127_000
