"""Hugging Face folders against transformers, and against missing and contradicting files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from thermocline.errors import ModelFormatError, TokenizerError, UnsupportedModelError
from thermocline.text.from_hf import tokenizer_from_folder

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, trained: Callable[[str], Tokenizer]) -> Make:
    """A folder with a tokenizer.json and, as keyword `name=content`, any of the JSON files beside it."""

    def build(backend: Tokenizer | None = None, template: str | None = None, **files: Any) -> Path:
        (backend or trained("qwen2")).save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return build


def spm_backend(metadata: dict[str, Any]) -> Tokenizer:
    """A tokenizer.json like Llama 2's: normaliser, byte fallback, template for bos."""
    ids = {piece: i for i, piece in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    normal = {p for p, k in zip(ids, metadata["tokenizer.ggml.token_type"], strict=True) if k == 1}
    pairs = [(p[:i], p[i:]) for p in normal for i in range(1, len(p)) if p[:i] in normal and p[i:] in normal]
    merges = sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def test_byte_level_equals_transformers(make: Make, awkward: str) -> None:
    folder = make(tokenizer_config={"eos_token": "<|endoftext|>"})
    ours = tokenizer_from_folder(folder)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    ids = ours.encode(awkward, parse_special=True)
    assert ids == oracle.encode(awkward)
    assert ours.encode(awkward) == oracle.encode(awkward, split_special_tokens=True)
    for skip in (True, False):
        expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=skip) == expected


def test_sentencepiece_equals_transformers(make: Make, spm_metadata: dict[str, Any], awkward: str) -> None:
    folder = make(spm_backend(spm_metadata), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    ours = tokenizer_from_folder(folder)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    ids = ours.encode(awkward, parse_special=True)
    assert ids == oracle.encode(awkward)
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (ours.adds_bos, ours.adds_eos, ours.bos_id, ours.eos_ids) == (True, False, 1, {2})


def test_invalid_bytes_as_in_the_library(make: Make) -> None:
    ours = tokenizer_from_folder(make())
    backend = Tokenizer.from_file(str(make() / "tokenizer.json"))
    for token in range(ours.size):
        for pair in ([token], [token, 200], [200, token]):
            assert ours.decode(pair) == backend.decode(pair)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False), (None, None)])
def test_flags_decide_over_the_post_processor(
    make: Make, spm_metadata: dict[str, Any], bos: bool | None, eos: bool | None
) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos}
    given = {key: value for key, value in config.items() if value is not None}
    tokenizer = tokenizer_from_folder(make(spm_backend(spm_metadata), tokenizer_config=given))
    wanted = (True, False) if bos is None else (bos, eos)
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == wanted


def test_padding_and_truncation_are_off(make: Make, trained: Callable[[str], Tokenizer]) -> None:
    backend = Tokenizer.from_str(trained("gpt-2").to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert len(tokenizer_from_folder(make(backend)).encode("x" * 20 + " y" * 20)) > 3
    assert len(tokenizer_from_folder(make(backend)).encode("x")) == 1


def test_ends_of_all_files(make: Make) -> None:
    folder = make(
        tokenizer_config={"eos_token": "<|endoftext|>"},
        generation_config={"eos_token_id": [7, 9]},
        config={"eos_token_id": 8},
    )
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.eos_id == 0
    assert tokenizer.eos_ids == {0, 2, 7, 8, 9}


def test_special_tokens_map_names_what_the_config_does_not(make: Make) -> None:
    folder = make(special_tokens_map={"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
                  tokenizer_config={"eos_token": "<|endoftext|>"})  # fmt: skip
    tokenizer = tokenizer_from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)


def test_added_tokens_of_the_config(make: Make, trained: Callable[[str], Tokenizer]) -> None:
    size = trained("qwen2").get_vocab_size()
    entry = {"content": "<|tool|>", "special": True, "normalized": False}
    tokenizer = tokenizer_from_folder(make(tokenizer_config={"added_tokens_decoder": {str(size): entry}}))
    assert tokenizer.encode("a<|tool|>", parse_special=True)[-1] == size
    assert size in tokenizer.special_ids
    with pytest.raises(TokenizerError, match="not of the same model"):
        tokenizer_from_folder(make(tokenizer_config={"added_tokens_decoder": {str(size + 5): entry}}))


def test_template_from_either_place(make: Make) -> None:
    assert tokenizer_from_folder(make()).chat_template is None
    assert tokenizer_from_folder(make(tokenizer_config={"chat_template": "a"})).chat_template == "a"
    listed = [{"name": "rag", "template": "x"}, {"name": "default", "template": "b"}]
    assert tokenizer_from_folder(make(tokenizer_config={"chat_template": listed})).chat_template == "b"
    assert tokenizer_from_folder(make(template="file", tokenizer_config={"chat_template": "a"})).chat_template == "file"


def test_absent_extra_tokens_are_announced(make: Make) -> None:
    folder = make(tokenizer_config={"additional_special_tokens": ["<|im_end|>", "<|nowhere|>"]})
    assert "1 additional_special_tokens" in tokenizer_from_folder(folder).warnings[0]


def test_metaspace(make: Make) -> None:
    """Unigram with the Metaspace steps, as T5-like conversions write it."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("lake", -1.0)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = tokenizer_from_folder(make(backend))
    ids = tokenizer.encode("the lake")
    assert ids == backend.encode("the lake").ids
    assert tokenizer.decode(ids) == "the lake"


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer.json; download"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(TokenizerError, match="save_pretrained"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {}}', b"[" * 100_000, b"null"])
def test_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises((TokenizerError, ModelFormatError)):
        tokenizer_from_folder(tmp_path)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not an object": ({"tokenizer_config": [1]}, ModelFormatError, "an object is needed"),
    "eos not there": ({"tokenizer_config": {"eos_token": "</nowhere>"}}, TokenizerError, "eos_token '</nowhere>'"),
    "eos id outside": ({"generation_config": {"eos_token_id": 70_000}}, TokenizerError, "eos token id 70000"),
    "eos id is a word": ({"config": {"eos_token_id": "2"}}, ModelFormatError, "eos_token_id"),
    "flag is a word": ({"tokenizer_config": {"add_bos_token": "yes"}}, ModelFormatError, "add_bos_token"),
    "added is a list": ({"tokenizer_config": {"added_tokens_decoder": [1]}}, TokenizerError, "map ids"),
    "added has no content": ({"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, TokenizerError, "not a token"),
    "template is a number": ({"tokenizer_config": {"chat_template": 5}}, ModelFormatError, "chat_template"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_configuration(make: Make, case: Any) -> None:
    files, error, words = case
    with pytest.raises(error, match=words):
        tokenizer_from_folder(make(**files))


def test_word_piece_is_refused(make: Make) -> None:
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        tokenizer_from_folder(make(Tokenizer(models.WordPiece({"[UNK]": 0}))))


def test_unknown_decoder_is_refused(make: Make) -> None:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(UnsupportedModelError, match="decoder steps: none"):
        tokenizer_from_folder(make(backend))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.CTC()])
    with pytest.raises(UnsupportedModelError, match="CTC"):
        tokenizer_from_folder(make(backend))


def test_word_suffix_is_refused(make: Make) -> None:
    backend = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(UnsupportedModelError, match="end_of_word_suffix"):
        tokenizer_from_folder(make(backend))


def test_scattered_ids_are_refused(make: Make) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, [], unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    file = make(backend) / "tokenizer.json"
    file.write_text(file.read_text().replace('"b": 1', '"b": 4000000000'))
    with pytest.raises(TokenizerError, match="4000000000"):
        tokenizer_from_folder(file.parent)
