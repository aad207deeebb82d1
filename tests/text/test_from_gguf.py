"""GGUF vocabularies against the tokenizers they were made from, and against broken files."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import LlamaTokenizer

from thermocline.errors import ModelFormatError, ThermoclineError, TokenizerError, UnsupportedModelError
from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.splits import SPLIT_RULES
from thermocline.text.tokenizer import BYTE_OF_CHARACTER

DISTINCT = [
    "default", "gpt-2", "llama-bpe", "dbrx", "minicpm5", "qwen2", "qwen35", "starcoder", "falcon", "deepseek-llm",
    "deepseek-coder", "deepseek-v3", "tekken", "gpt-4o", "bailingmoe", "seed-coder", "bloom", "viking",
]  # fmt: skip
Build = Callable[[str], dict[str, Any]]


def test_every_rule_is_tested() -> None:
    assert {id(SPLIT_RULES[name]) for name in DISTINCT} == {id(rule) for rule in SPLIT_RULES.values()}


@pytest.mark.parametrize("pre", DISTINCT)
def test_byte_level_equals_its_original(pre: str, trained: Any, bpe_metadata: Build, awkward: str) -> None:
    original = trained(pre)
    tokenizer = tokenizer_from_gguf(bpe_metadata(pre))
    ids = tokenizer.encode(awkward, add_special=False, parse_special=True)
    assert ids == original.encode(awkward).ids
    assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special_tokens=False) == awkward
    assert b"".join(map(tokenizer.token_bytes, ids)) == awkward.encode()


def test_scores_equal_sentencepiece(spm: Any, spm_metadata: dict[str, Any], awkward: str) -> None:
    tokenizer = tokenizer_from_gguf(spm_metadata)
    assert tokenizer.encode(awkward) == [1, *spm.encode(awkward)]
    ids = tokenizer.encode(awkward, add_special=False)
    assert tokenizer.decode(ids) == spm.decode(ids) == awkward


def test_scores_equal_sentencepiece_on_random_text(spm: Any, spm_metadata: dict[str, Any], corpus: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(spm_metadata)
    draw = random.Random(1)
    letters = "".join(corpus) + " aaaeeett\n\t=-0"
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randrange(40)))
        assert tokenizer.encode(text, add_special=False) == spm.encode(text), text


def test_scores_equal_transformers(spm_metadata: dict[str, Any], awkward: str) -> None:
    """transformers adds no space before one that is already there; SentencePiece and this do."""
    pieces = spm_metadata["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_from_gguf(spm_metadata)
    merges = [tuple(entry) for entry in tokenizer_merges(spm_metadata)]
    oracle = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, add_bos_token=True)
    text = awkward.lstrip(" ")
    assert tokenizer.encode(text, parse_special=False) == oracle.encode(text, split_special_tokens=True)


def tokenizer_merges(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """All ways to join two tokens, best score first: by brute force over pairs of neighbours in every token."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    normal = [token for token in scores if kinds[token] == 1]
    pairs = [(a, token[len(a) :]) for token in normal for a in normal if token != a and token.startswith(a)]
    return sorted((p for p in pairs if p[1] in normal), key=lambda p: -scores[p[0] + p[1]])


def test_every_byte_falls_back(spm_metadata: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf(spm_metadata)
    first = spm_metadata["tokenizer.ggml.tokens"].index("<0x00>")
    assert [tokenizer.token_bytes(first + i) for i in range(256)] == [bytes([i]) for i in range(256)]
    ids = tokenizer.encode("\U0010fffe", add_special=False)
    assert [tokenizer.piece(i) for i in ids] == ["▁", "<0xF4>", "<0x8F>", "<0xBF>", "<0xBE>"]


def test_without_space_prefix(spm_metadata: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf({**spm_metadata, "tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode("the lake", add_special=False)
    assert not tokenizer.piece(ids[0]).startswith("▁")
    assert tokenizer.decode(ids) == "the lake"
    assert tokenizer.decode(tokenizer.encode(" the lake", add_special=False)) == " the lake"


def test_space_follows_a_special_token(spm_metadata: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf(spm_metadata)
    inside = tokenizer.encode("</s>the", add_special=False, parse_special=True)
    assert inside == [2, *tokenizer.encode("the", add_special=False)]


def test_defaults_of_a_sentencepiece_file(spm_metadata: dict[str, Any]) -> None:
    for name in ("bos", "eos", "unknown"):
        del spm_metadata[f"tokenizer.ggml.{name}_token_id"]
    tokenizer = tokenizer_from_gguf(spm_metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos, tokenizer.adds_eos) == (1, 2, True, False)


def test_types_are_guessed_from_the_named_ids(spm_metadata: dict[str, Any]) -> None:
    del spm_metadata["tokenizer.ggml.token_type"]
    tokenizer = tokenizer_from_gguf(spm_metadata)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode([1, *tokenizer.encode("é\u0300", add_special=False), 2]) == "é\u0300"


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_frame(bpe_metadata: Build, bos: bool, eos: bool) -> None:
    metadata = bpe_metadata("qwen2") | {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": bos,
        "tokenizer.ggml.add_eos_token": eos,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    body = tokenizer.encode("lake", add_special=False)
    assert tokenizer.encode("lake") == [1] * bos + body + [0] * eos
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (bos, eos)


def test_llama3_adds_bos_unless_told_otherwise(bpe_metadata: Build) -> None:
    metadata = bpe_metadata("llama-bpe") | {"tokenizer.ggml.bos_token_id": 1}
    assert tokenizer_from_gguf(metadata).adds_bos
    assert not tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False}).adds_bos
    assert not tokenizer_from_gguf(bpe_metadata("llama-bpe")).adds_bos


def test_ends(bpe_metadata: Build) -> None:
    tokenizer = tokenizer_from_gguf(bpe_metadata("qwen2") | {"tokenizer.ggml.eot_token_id": 5})
    assert tokenizer.eos_id == 0
    assert tokenizer.eos_ids == {0, 2, 5}  # eos, <|im_end|> by its name, eot


def test_user_defined_tokens_are_matched_whole(bpe_metadata: Build) -> None:
    metadata = bpe_metadata("qwen2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = tokenizer_from_gguf(metadata)
    last = tokenizer.size - 1
    assert last in tokenizer.encode("a<think>b")
    assert last not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"


def test_embedded_json_is_preferred(trained: Any, bpe_metadata: Build) -> None:
    metadata = bpe_metadata("qwen2") | {
        "tokenizer.huggingface.json": trained("qwen2").to_str(),
        "tokenizer.ggml.pre": "nobody knows",
        "tokenizer.chat_template": "{{ messages }}",
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("The lake") == trained("qwen2").encode("The lake").ids
    assert (tokenizer.eos_id, tokenizer.chat_template) == (0, "{{ messages }}")


@pytest.mark.parametrize("pre", [None, "default"])
def test_unnamed_words_are_announced(bpe_metadata: Build, pre: str | None) -> None:
    metadata = bpe_metadata("default")
    if pre is None:
        del metadata["tokenizer.ggml.pre"]
    assert "tokenizer.ggml.pre" in tokenizer_from_gguf(metadata).warnings[0]
    assert tokenizer_from_gguf(bpe_metadata("qwen2")).warnings == ()


def test_unknown_words_are_refused_by_name(bpe_metadata: Build) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'qwen9'.*known: .*llama-bpe.*qwen2"):
        tokenizer_from_gguf(bpe_metadata("qwen2") | {"tokenizer.ggml.pre": "qwen9"})


def test_repeated_and_empty_tokens_decode_but_are_not_encoded(bpe_metadata: Build) -> None:
    metadata = bpe_metadata("qwen2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "Ġthe", "", ""]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1, 1, 3]
    tokenizer = tokenizer_from_gguf(metadata)
    assert "spelled twice" in " ".join(tokenizer.warnings)
    assert "no spelling" in " ".join(tokenizer.warnings)
    assert [tokenizer.token_bytes(size + i) for i in range(3)] == [b" the", b"", b""]
    assert max(tokenizer.encode(" the unreachable the")) < size


def test_equal_scores_are_announced(spm_metadata: dict[str, Any]) -> None:
    spm_metadata["tokenizer.ggml.scores"] = [0.0] * len(spm_metadata["tokenizer.ggml.scores"])
    assert "equal scores" in tokenizer_from_gguf(spm_metadata).warnings[0]


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.__setitem__(f"tokenizer.ggml.{key}", value)


def edit(key: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        array = list(metadata[f"tokenizer.ggml.{key}"])
        array[index] = value
        metadata[f"tokenizer.ggml.{key}"] = array

    return change


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.__delitem__(f"tokenizer.ggml.{key}")


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], None], type[ThermoclineError], str]] = {
    "no tokens": ("llama", put("tokens", []), TokenizerError, "empty"),
    "tokens missing": ("llama", drop("tokens"), ModelFormatError, "tokens.*missing"),
    "tokens are numbers": ("llama", put("tokens", [1, 2, 3]), ModelFormatError, "tokens"),
    "one token is bytes": ("llama", edit("tokens", 300, b"\xff\xfe"), ModelFormatError, "tokens"),
    "scores too short": ("llama", put("scores", [0.0] * 10), ModelFormatError, "scores"),
    "scores are int8": ("llama", put("scores", np.zeros(700, np.int8)), ModelFormatError, "scores"),
    "a score is NaN": ("llama", edit("scores", 400, math.nan), ModelFormatError, r"scores\[400\]"),
    "no scores, no merges": ("llama", drop("scores"), TokenizerError, "scores and .merges"),
    "types too long": ("llama", put("token_type", [1] * 701), ModelFormatError, "token_type"),
    "types are floats": ("llama", put("token_type", np.ones(700, np.float32)), ModelFormatError, "token_type"),
    "type 7": ("llama", edit("token_type", 300, 7), ModelFormatError, r"token_type\[300\].*7.*0 to 6"),
    "type -1": ("llama", edit("token_type", 300, -1), ModelFormatError, r"token_type\[300\]"),
    "byte token <0x-1>": ("llama", edit("tokens", 10, "<0x-1>"), TokenizerError, "byte token 10.*<0x-1>"),
    "byte token <0xZZ>": ("llama", edit("tokens", 10, "<0xZZ>"), TokenizerError, "byte token 10.*<0xZZ>"),
    "byte token <0x100>": ("llama", edit("tokens", 10, "<0x100>"), TokenizerError, "byte token 10"),
    "token of 1 MB": ("llama", edit("tokens", 300, "a" * (1 << 20)), TokenizerError, "token 300 has 1048576"),
    "bos is the size": ("llama", put("bos_token_id", 700), ModelFormatError, "bos_token_id.*700"),
    "eos is 2^32-1": ("llama", put("eos_token_id", 2**32 - 1), ModelFormatError, "eos_token_id"),
    "eos is -1": ("gpt2", put("eos_token_id", -1), ModelFormatError, "eos_token_id.*-1"),
    "eot is a string": ("gpt2", put("eot_token_id", "2"), ModelFormatError, "eot_token_id"),
    "unknown outside": ("llama", put("unknown_token_id", 9999), ModelFormatError, "unknown_token_id"),
    "add_bos without bos": ("gpt2", put("add_bos_token", True), TokenizerError, "bos_token_id is missing"),
    "add_bos is 1": ("gpt2", put("add_bos_token", 1), ModelFormatError, "add_bos_token"),
    "merges missing": ("gpt2", drop("merges"), ModelFormatError, "merges.*missing"),
    "merges are numbers": ("gpt2", put("merges", [1]), ModelFormatError, "merges"),
    "merge of nothing": ("gpt2", edit("merges", 7, "qq zz"), TokenizerError, "merge 7 of .*'qq zz'"),
    "merge without space": ("gpt2", edit("merges", 7, "the"), TokenizerError, "merge 7"),
    "merge of three": ("gpt2", edit("merges", 7, "a b c"), TokenizerError, "merge 7"),
    "merge without result": ("gpt2", edit("merges", 7, "q q"), TokenizerError, "merge 7"),
    "empty merge": ("gpt2", edit("merges", 0, ""), TokenizerError, "merge 0"),
    "model missing": ("gpt2", drop("model"), TokenizerError, "no tokenizer"),
    "model unknown": ("gpt2", put("model", "bert"), UnsupportedModelError, "'bert'.*llama.*gpt2"),
    "model is a number": ("gpt2", put("model", 3), ModelFormatError, "model"),
    "embedded json is broken": (
        "gpt2", lambda m: m.update({"tokenizer.huggingface.json": "{"}), TokenizerError, "json",
    ),
    "embedded json is deep": (
        "gpt2", lambda m: m.update({"tokenizer.huggingface.json": "[" * 100_000}), TokenizerError, "json",
    ),
    "template is a number": ("gpt2", lambda m: m.update({"tokenizer.chat_template": 1}), ModelFormatError, "template"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(case: Any, spm_metadata: dict[str, Any], bpe_metadata: Build) -> None:
    model, change, error, words = case
    metadata = spm_metadata if model == "llama" else bpe_metadata("qwen2")
    change(metadata)
    with pytest.raises(error, match=words):
        tokenizer_from_gguf(metadata)


def test_no_unknown_and_a_byte_missing(spm_metadata: dict[str, Any]) -> None:
    """Text that cannot be encoded would vanish without a word."""
    del spm_metadata["tokenizer.ggml.unknown_token_id"]
    edit("token_type", 0, 1)(spm_metadata)
    edit("tokens", 10, "byte no more")(spm_metadata)
    edit("token_type", 10, 1)(spm_metadata)
    with pytest.raises(TokenizerError, match="1 of the 256 byte tokens"):
        tokenizer_from_gguf(spm_metadata)


def grow(alphabet: list[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """`size` tokens of at most 12 letters, each but the letters joined from two others; and the joins."""
    draw = random.Random(0)
    tokens, short, seen, joins = list(alphabet), list(alphabet), set(alphabet), []
    while len(tokens) < size:
        left, right = draw.choice(short), draw.choice(short)
        if left + right not in seen:
            seen.add(left + right)
            tokens.append(left + right)
            joins.append((left, right))
            if len(left + right) <= 6:
                short.append(left + right)
    return tokens, joins


def test_large_sentencepiece_vocabulary() -> None:
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens = fixed + grow([*map(chr, range(97, 123)), "▁"], 32_000 - len(fixed))[0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.arange(0, -len(tokens), -1, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), np.int32),
    }
    assert tokenizer_from_gguf(metadata).size == 32_000


def test_large_byte_level_vocabulary() -> None:
    tokens, joins = grow(sorted(BYTE_OF_CHARACTER), 128_000)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*tokens, *(f"<|reserved {i}|>" for i in range(256))],
        "tokenizer.ggml.token_type": np.array([1] * len(tokens) + [3] * 256, np.int32),
        "tokenizer.ggml.merges": [" ".join(join) for join in joins],
    }
    assert tokenizer_from_gguf(metadata).size == 128_256
