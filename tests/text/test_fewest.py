"""How few tokens a text has at least: never more than it has, and told where that can be shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from thermocline.errors import UsageError
from thermocline.text import tokenizer as module
from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.from_json import tokenizer_from_backend
from thermocline.text.tokenizer import Tokenizer as Ours

Build = Callable[[str], dict[str, Any]]
SPACES = (" " * 3000, "▁" * 3000, " ▁" * 1500, "\n" * 3000, "the lake\n" * 300)


@pytest.fixture(autouse=True)
def _short_texts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_TEXT", 0)


@pytest.fixture(params=["gpt2", "llama"])
def tokenizer(request: pytest.FixtureRequest, spm_metadata: dict[str, Any], bpe_metadata: Build) -> Ours:
    return tokenizer_from_gguf(spm_metadata if request.param == "llama" else bpe_metadata("qwen2"))


def test_there_are_never_fewer(tokenizer: Ours, awkward: str) -> None:
    for text in (awkward, awkward * 50, *SPACES):
        for special in (False, True):
            tokens = tokenizer.encode(text, add_special=False, parse_special=special)
            assert bool(text) <= tokenizer.fewest_tokens(text) <= len(tokens)


def test_a_short_text_is_not_looked_at(tokenizer: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_TEXT", 1000)
    assert tokenizer.fewest_tokens("lake" * 249) == 0
    assert tokenizer.fewest_tokens("lake" * 250) > 0


def test_a_text_that_cannot_be_encoded_is_refused(tokenizer: Ours) -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        tokenizer.fewest_tokens("a\ud800")


def changed(change: Callable[[Tokenizer], None]) -> Ours:
    """A byte-level tokenizer, one byte a token, to which something is done."""
    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(pieces, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    change(backend)
    return tokenizer_from_backend(backend, bos_id=None, eos_ids=())


def split(behavior: str) -> Callable[[Tokenizer], None]:
    def change(backend: Tokenizer) -> None:
        cut = pre_tokenizers.Split(Regex(r"\s+"), behavior=behavior)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, backend.pre_tokenizer])

    return change


def normalised(step: normalizers.Normalizer) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, "normalizer", normalizers.Sequence([step]))


def taking_spaces(backend: Tokenizer) -> None:
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])


COMPOSED, APART = "\u00e9t\u00e9 " * 100, "e\u0301te\u0301 " * 100


@pytest.mark.parametrize(
    ("change", "text", "told"),
    [
        (split("isolated"), "a b " * 100, True),
        (split("removed"), "a b " * 100, False),
        (normalised(normalizers.NFC()), COMPOSED, True),
        (normalised(normalizers.NFC()), APART, False),
        (normalised(normalizers.NFKC()), COMPOSED, False),
        (normalised(normalizers.Strip()), " " * 100, False),
        (normalised(normalizers.Replace(" ", "▁")), "a b " * 100, True),
        (normalised(normalizers.Replace("  ", "▁")), " " * 100, False),
        (taking_spaces, " " * 100 + "<mask>", False),
    ],
)
def test_what_is_shortened_is_left_out(change: Callable[[Tokenizer], None], text: str, told: bool) -> None:
    tokenizer = changed(change)
    assert (tokenizer.fewest_tokens(text) > 0) is told
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, parse_special=True))


def test_an_unknown_token_may_stand_for_many_characters() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = tokenizer_from_backend(backend, bos_id=None, eos_ids=())
    assert len(tokenizer.encode("b" * 500)) == 1
    assert tokenizer.fewest_tokens("b" * 500) == 0


def test_unigram_is_left_out() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    backend.decoder = decoders.Metaspace()
    assert tokenizer_from_backend(backend, bos_id=None, eos_ids=()).fewest_tokens("a" * 500) == 0
