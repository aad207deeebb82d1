"""A converted tokenizer encodes as the folder's does, by either of its two descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from thermocline.errors import ModelFormatError, UnsupportedModelError
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import write_gguf
from thermocline.memory.tokenizer_metadata import gguf_tokenizer, split_name
from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.from_hf import tokenizer_from_folder
from thermocline.text.splits import SPLIT_RULES

TEXTS = [
    "def main(argument):\n    return argument + 1\n",
    "  spaces   and\ttabs\r\n\n\nlines ",
    "Straße, naïve, 你好世界, 🙂🏽‍♀️",
    "don't WON'T 1234567 3.14",
    "<|end|> as words",
    "",
]
CORPUS = [*TEXTS, "the cat sat on the mat and the dog sat on the log " * 20] * 3


def byte_level(*steps: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As transformers writes Llama's: pieces with U+2581 for spaces, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "<|end|>", *(f"<0x{b:02X}>" for b in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    data = json.loads(trained.to_str())
    merges = [tuple(merge) for merge in data["model"]["merges"]]
    learnt = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *learnt])}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "<|end|>"])
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
TOKENIZERS = {
    "gpt-2": lambda: byte_level(GPT2),
    "qwen2": lambda: byte_level(split(SPLIT_RULES["qwen2"].patterns[0]), BYTES),
    "starcoder": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), GPT2),
    "llama": sentencepiece,
}


def folder_of(tokenizer: Tokenizer, path: Path, **config: Any) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "bos_token": "<|end|>", "add_bos_token": True} | config
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def read_back(metadata: dict[str, object], path: Path, *, embedded: bool) -> Any:
    kept = {key: value for key, value in metadata.items() if embedded or key != "tokenizer.huggingface.json"}
    write_gguf(path, {"general.architecture": "llama", **kept}, [])
    return tokenizer_from_gguf(GgufFile.open(path).metadata)


@pytest.mark.parametrize("embedded", [True, False], ids=["tokenizer.json", "ggml keys"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_file_encodes_as_the_folder_does(tmp_path: Path, name: str, embedded: bool) -> None:
    folder = folder_of(TOKENIZERS[name](), tmp_path, chat_template="{{ messages }}")
    theirs = tokenizer_from_folder(folder)
    metadata, notes = gguf_tokenizer(folder, theirs.size + 3, None)
    assert notes == ()
    assert metadata.get("tokenizer.ggml.pre", "llama") == name
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == theirs.size + 3
    assert tokens[-1] == f"[PAD{theirs.size + 2}]"
    ours = read_back(metadata, tmp_path / "t.gguf", embedded=embedded)
    assert ours.eos_ids == theirs.eos_ids
    assert ours.bos_id == theirs.bos_id
    assert ours.chat_template == "{{ messages }}"
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, parse_special=special) == theirs.encode(text, parse_special=special), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_the_end_that_the_model_names_comes_first(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.add_special_tokens(["<|eot_id|>", "<stop>"])
    folder = folder_of(tokenizer, tmp_path)
    stop, eot = tokenizer.token_to_id("<stop>"), tokenizer.token_to_id("<|eot_id|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [stop, eot]}))
    metadata, _ = gguf_tokenizer(folder, 500, stop)
    assert metadata["tokenizer.ggml.eos_token_id"] == stop
    read = read_back(metadata, tmp_path / "t.gguf", embedded=False)
    assert read.eos_ids == tokenizer_from_folder(folder).eos_ids >= {stop, eot}


def test_tokens_that_only_the_configuration_adds_are_kept(tmp_path: Path) -> None:
    """Old folders name special tokens in tokenizer_config.json alone."""
    tokenizer = byte_level(GPT2)
    size = tokenizer.get_vocab_size()
    added = {str(size): {"content": "<late>", "special": True}, str(size + 1): {"content": "<word>", "special": False}}
    folder = folder_of(tokenizer, tmp_path, added_tokens_decoder=added)
    theirs = tokenizer_from_folder(folder)
    metadata, _ = gguf_tokenizer(folder, size + 2, None)
    for embedded in (True, False):
        ours = read_back(metadata, tmp_path / "t.gguf", embedded=embedded)
        text = "the <late> <word> cat"
        ids = theirs.encode(text, parse_special=True)
        assert {size, size + 1} <= set(ids)
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_words_cut_in_a_way_without_a_name_are_noted(tmp_path: Path) -> None:
    folder = folder_of(byte_level(split(r"\p{L}{1,7}"), BYTES), tmp_path)
    metadata, notes = gguf_tokenizer(folder, 500, None)
    assert metadata["tokenizer.ggml.pre"] == "default"
    assert "other engines" in notes[0]
    ours = read_back(metadata, tmp_path / "t.gguf", embedded=True)
    assert ours.encode(TEXTS[0]) == tokenizer_from_folder(folder).encode(TEXTS[0])


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken", "deepseek-v3", "falcon"])
def test_rules_are_found_by_what_they_do(name: str) -> None:
    data = json.loads(Tokenizer(models.BPE()).to_str())
    assert data["pre_tokenizer"] is None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLIT_RULES[name].pre_tokenizer()
    found = split_name(json.loads(tokenizer.to_str())["pre_tokenizer"])
    assert found is not None
    assert SPLIT_RULES[found].patterns == SPLIT_RULES[name].patterns
    assert split_name({"type": "Whitespace"}) is None


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    folder = folder_of(byte_level(GPT2), tmp_path)
    size = tokenizer_from_folder(folder).size
    gguf_tokenizer(folder, size, None)
    with pytest.raises(ModelFormatError, match=f"{size} tokens, but the embedding has {size - 1} rows"):
        gguf_tokenizer(folder, size - 1, None)


def test_unigram_has_no_keys(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<|end|>", 0.0), ("▁a", -1.0)], 0, True))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(UnsupportedModelError, match="Unigram has no keys in GGUF"):
        gguf_tokenizer(folder_of(tokenizer, tmp_path, add_bos_token=False), 10, None)
