"""Streams of tokens against decoding the whole, and stop strings against any cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from thermocline.errors import UsageError
from thermocline.text.detokenize import Detokenizer, StopMatcher
from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.tokenizer import CHARACTER_OF_BYTE, SPACE, Spelling
from thermocline.text.tokenizer import Tokenizer as Ours

SPECIAL = 256


def byte_level() -> Ours:
    """Token b is the byte b; then a special token and two longer ones."""
    pieces = [CHARACTER_OF_BYTE[b] for b in range(256)]
    pieces += ["<|end|>", "Ġthe", CHARACTER_OF_BYTE[0xE2] + CHARACTER_OF_BYTE[0x82]]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Ours(backend, pieces, spelling=Spelling.BYTE_LEVEL)


def sentencepiece() -> Ours:
    """As `byte_level`, with byte fallback and a leading space to strip."""
    pieces = [f"<0x{b:02X}>" for b in range(256)] + ["</s>", f"{SPACE}the", SPACE, SPACE * 2, "é"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return Ours(backend, pieces, spelling=Spelling.SENTENCEPIECE, strips_space=True)


TOKENIZERS = [byte_level(), sentencepiece()]


@pytest.fixture(params=TOKENIZERS, ids=lambda tokenizer: tokenizer.spelling.name)
def tokenizer(request: pytest.FixtureRequest) -> Ours:
    made: Ours = request.param
    return made


def stream(tokenizer: Ours, ids: list[int], **options: bool) -> str:
    detokenizer = Detokenizer(tokenizer, **options)
    text = ""
    for token in ids:
        part = detokenizer.push(token)
        part.encode()  # a lone surrogate, half a character of another kind, would raise
        assert len(detokenizer.held) <= 3
        text += part
    return text + detokenizer.finish()


def test_all_pairs_of_bytes(tokenizer: Ours) -> None:
    for pair in itertools.product(range(256), repeat=2):
        assert stream(tokenizer, list(pair)) == tokenizer.decode(pair) == decoded(tokenizer, bytes(pair))


def decoded(tokenizer: Ours, data: bytes) -> str:
    return (data.removeprefix(b" ") if tokenizer.strips_space else data).decode("utf-8", "replace")


BORDERS = [0x00, 0x20, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF,
           0xF0, 0xF3, 0xF4, 0xF5, 0xFF]  # fmt: skip


@pytest.mark.parametrize("length", [3, 4])
def test_all_borders_of_well_formed_utf8(length: int) -> None:
    """Every byte at which a rule of Unicode's table 3-7 changes: overlong forms, surrogates, beyond U+10FFFF."""
    tokenizer = TOKENIZERS[0]
    step = 1 if length == 3 else 7
    for data in itertools.islice(itertools.product(BORDERS, repeat=length), 0, None, step):
        assert stream(tokenizer, list(data)) == bytes(data).decode("utf-8", "replace"), bytes(data)


@pytest.mark.parametrize("character", ["a", "é", "€", "😀", "\uffff", "\U0010ffff", "\ufffd"])
def test_nothing_before_the_last_byte(tokenizer: Ours, character: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(byte) for byte in character.encode()]
    assert parts == [""] * (len(parts) - 1) + [character]
    assert detokenizer.finish() == ""


def test_end_inside_a_character(tokenizer: Ours) -> None:
    for cut in (1, 2, 3):
        ids = [*b"ok", *"😀".encode()[:cut]]
        assert stream(tokenizer, ids) == tokenizer.decode(ids) == "ok\ufffd"


def test_special_token_inside_a_character(tokenizer: Ours) -> None:
    first, second = "é".encode()
    ids = [first, SPECIAL, second]
    assert stream(tokenizer, ids) == tokenizer.decode(ids) == "é"
    shown = tokenizer.piece(SPECIAL)
    assert stream(tokenizer, ids, skip_special=False) == f"\ufffd{shown}\ufffd"


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 258) | st.sampled_from([0x20, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80]), max_size=30))
def test_any_tokens(ids: list[int]) -> None:
    for tokenizer, skip in itertools.product(TOKENIZERS, (True, False)):
        assert stream(tokenizer, ids, skip_special=skip) == tokenizer.decode(ids, skip_special=skip)


def test_leading_space() -> None:
    tokenizer = TOKENIZERS[1]
    the, space, spaces = 257, 258, 259
    assert stream(tokenizer, [the, the]) == tokenizer.decode([the, the]) == "the the"
    assert stream(tokenizer, [SPECIAL, the]) == tokenizer.decode([SPECIAL, the]) == "the"
    assert stream(tokenizer, [space, the]) == tokenizer.decode([space, the]) == " the"
    assert stream(tokenizer, [spaces]) == tokenizer.decode([spaces]) == " "
    assert stream(tokenizer, [0x20, 0x20]) == " "
    assert stream(tokenizer, [the], continuing=True) == " the"


def test_bad_id_leaves_the_state(tokenizer: Ours) -> None:
    detokenizer = Detokenizer(tokenizer)
    first, second = "é".encode()
    detokenizer.push(first)
    with pytest.raises(UsageError, match="999"):
        detokenizer.push(999)
    assert detokenizer.push(second) == "é"


def test_finish_starts_anew(tokenizer: Ours) -> None:
    detokenizer = Detokenizer(tokenizer)
    detokenizer.push(0xE2)
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.push(ord("a")) == "a"


def test_real_text(spm_metadata: dict[str, Any], bpe_metadata: Callable[[str], Any], awkward: str) -> None:
    for metadata in (spm_metadata, bpe_metadata("llama-bpe")):
        tokenizer = tokenizer_from_gguf(metadata)
        assert stream(tokenizer, tokenizer.encode(awkward)) == awkward


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest prefix of `text` that ends with a stop string, without the longest such one."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(matcher: StopMatcher, chunks: list[str]) -> str:
    return "".join(matcher.push(chunk) for chunk in chunks) + matcher.finish()


@settings(deadline=None, max_examples=500)
@given(st.text("ab<", max_size=20), st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4), st.randoms())
def test_stop_does_not_depend_on_the_cut(text: str, stops: list[str], draw: random.Random) -> None:
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, matched = cut_at_stop(text, stops)
    matcher = StopMatcher(stops)
    assert (run(matcher, chunks), matcher.matched) == (shown, matched)


def test_stop_holds_back_only_what_may_match() -> None:
    matcher = StopMatcher(["</answer>", "\n\n"])
    assert matcher.push("one </") == "one "
    assert matcher.push("b> </ans") == "</b> "
    assert matcher.push("wer> two") == ""
    assert matcher.matched == "</answer>"
    assert matcher.push("three") == ""
    assert matcher.finish() == ""


def test_stop_releases_the_rest() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("xab") == "x"
    assert matcher.finish() == "ab"
    assert matcher.push("c") == "c"
    assert matcher.matched is None


def test_stop_without_strings() -> None:
    assert StopMatcher([]).push("all of it") == "all of it"


def test_empty_stop() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopMatcher(["a", ""])


def test_long_stop_is_quick() -> None:
    matcher = StopMatcher(["a" * 10_000 + "b"] * 16)
    text = run(matcher, ["a" * 100] * 50)
    assert text == "a" * 5000
