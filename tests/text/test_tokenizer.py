"""What every tokenizer promises, whatever it was built from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from thermocline.errors import TokenizerError, UsageError
from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.tokenizer import Spelling, check_vocabulary
from thermocline.text.tokenizer import Tokenizer as Ours

Build = Callable[[str], dict[str, Any]]


@pytest.fixture(params=["gpt2", "llama"])
def tokenizer(request: pytest.FixtureRequest, spm_metadata: dict[str, Any], bpe_metadata: Build) -> Ours:
    return tokenizer_from_gguf(spm_metadata if request.param == "llama" else bpe_metadata("qwen2"))


def test_round_trip(tokenizer: Ours, awkward: str) -> None:
    assert tokenizer.decode(tokenizer.encode(awkward)) == awkward


def test_special_spellings_are_text_unless_asked_for(tokenizer: Ours) -> None:
    for token in tokenizer.special_ids:
        text = f"a{tokenizer.piece(token)}b"
        assert not tokenizer.special_ids.intersection(tokenizer.encode(text, add_special=False))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert token in tokenizer.encode(text, parse_special=True)


def test_special_tokens_show_when_asked_for(tokenizer: Ours) -> None:
    end = tokenizer.eos_id
    assert end is not None
    assert tokenizer.decode([end]) == ""
    assert tokenizer.decode([end], skip_special=False) == tokenizer.piece(end)
    assert tokenizer.token_bytes(end) == tokenizer.piece(end).encode()


def test_bytes_of_tokens_join_to_the_text(tokenizer: Ours, awkward: str) -> None:
    ids = tokenizer.encode(awkward, add_special=False)
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert data == (b" " if tokenizer.strips_space and awkward else b"") + awkward.encode()


@pytest.mark.parametrize("token", [-1, -(2**70), 10**6, 2**32, 2**70, 1.5, "1", None])
def test_ids_outside_the_vocabulary(tokenizer: Ours, token: Any) -> None:
    for call in (tokenizer.token_bytes, tokenizer.piece, lambda i: tokenizer.decode([0, i])):
        with pytest.raises(UsageError, match="token id"):
            call(token)


def test_first_and_last_id(tokenizer: Ours) -> None:
    assert tokenizer.piece(0)
    assert tokenizer.piece(np.int32(tokenizer.size - 1))
    with pytest.raises(UsageError, match=f"0 to {tokenizer.size - 1}"):
        tokenizer.piece(tokenizer.size)


@pytest.mark.parametrize("text", ["\ud800", "ok\udfff", "\ud83d \ude00"])
def test_lone_surrogates(tokenizer: Ours, text: str) -> None:
    with pytest.raises(UsageError, match=r"lone surrogate U\+D"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["list"]])
def test_text_must_be_text(tokenizer: Ours, text: Any) -> None:
    with pytest.raises(UsageError, match="must be a string"):
        tokenizer.encode(text)


def test_nul_is_a_character(tokenizer: Ours) -> None:
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


def test_pieces_and_ids_are_inverse(tokenizer: Ours) -> None:
    assert [tokenizer.token_id(tokenizer.piece(i)) for i in range(tokenizer.size)] == list(range(tokenizer.size))
    assert tokenizer.token_id("not a token") is None


def test_kind_is_one_line(tokenizer: Ours) -> None:
    assert str(tokenizer.size) in tokenizer.kind
    assert "\n" not in tokenizer.kind


def test_threads_do_not_disturb_each_other(tokenizer: Ours) -> None:
    """Whether specials are parsed is a mutable flag of the library; here it must not leak between calls."""
    end = tokenizer.eos_id
    assert end is not None
    text = f"the lake {tokenizer.piece(end)}"
    wrong: list[bool] = []

    def work(parse: bool) -> None:
        wrong.extend((end in tokenizer.encode(text, parse_special=parse)) != parse for _ in range(300))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 1200
    assert not any(wrong)


def test_long_text_is_quick_enough(tokenizer: Ours) -> None:
    for text in ("a" * 300_000, " " * 300_000, "\n" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_panic_of_the_library_is_an_error_of_ours(bpe_metadata: Build) -> None:
    """Its regular expressions give up on a match of more than ten million steps, and panic."""
    with pytest.raises(UsageError, match=r"this text cannot be encoded: .*retry-limit"):
        tokenizer_from_gguf(bpe_metadata("qwen2")).encode(" " * 11_000_000)


def byte_tokenizer(missing: str = "", **options: Any) -> Ours:
    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in missing]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Ours(backend, letters, spelling=Spelling.BYTE_LEVEL, **options)


def test_a_byte_without_token_is_refused_not_dropped() -> None:
    tokenizer = byte_tokenizer(missing="z")
    assert tokenizer.decode(tokenizer.encode("lake")) == "lake"
    with pytest.raises(UsageError, match="byte 0x7A"):
        tokenizer.encode("zone")


def test_holes_between_ids() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "c": 2}, [], unk_token="a"))
    backend.add_special_tokens([AddedToken("a", special=True)])
    tokenizer = Ours(backend, ["a", None, "c"], spelling=Spelling.SENTENCEPIECE)
    assert (tokenizer.size, tokenizer.piece(1), tokenizer.token_bytes(1)) == (3, "", b"")
    assert tokenizer.decode([2, 1, 2]) == "cc"


@pytest.mark.parametrize("options", [{"bos_id": 256}, {"eos_ids": [300]}, {"prefix": (-1,)}, {"suffix": (999,)}])
def test_special_ids_outside_the_vocabulary(options: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        byte_tokenizer(**options)


def test_empty_vocabulary() -> None:
    with pytest.raises(TokenizerError, match="empty"):
        Ours(Tokenizer(models.BPE()), [], spelling=Spelling.BYTE_LEVEL)


def test_vocabulary_against_embedding(tokenizer: Ours) -> None:
    check_vocabulary(tokenizer, tokenizer.size)
    check_vocabulary(tokenizer, tokenizer.size + 64)
    with pytest.raises(TokenizerError, match=f"{tokenizer.size} tokens.*{tokenizer.size - 1} rows"):
        check_vocabulary(tokenizer, tokenizer.size - 1)
