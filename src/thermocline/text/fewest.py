"""How few tokens a text can have, told from its bytes, so that one that is far too long need not be encoded."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

SPACE_MARK = "▁"
WORDS = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"})
"""Steps that cut a text into words, or write its bytes in other characters, and drop nothing of it."""


class Lossless:
    """Whether the tokens of a text spell all of its bytes, so that it has at least as many as its bytes need.

    That is shown of BPE without an unknown token that could stand for several characters, where what comes before only
    cuts the text, puts something before it or marks its spaces. Of all else it is taken not to be so: of Unigram,
    normalisers that shorten, words that are dropped, and special tokens that take in the spaces beside them.

    Args:
        complete: every byte has a token, or a text with one that has none is refused.
        alphabet: bytes are written as characters of an alphabet of their own.
    """

    def __init__(self, backend: Backend, *, complete: bool, alphabet: bool) -> None:
        normalizers, cuts = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
        self._composes = any(step["type"] == "NFC" for step in normalizers)
        self._ever = (
            complete
            and isinstance(backend.model, models.BPE)
            and all(_keeps(step) for step in normalizers)
            and all(step["type"] in WORDS and step.get("behavior") != "Removed" for step in cuts)
            and alphabet == any(step["type"] == "ByteLevel" for step in cuts)
            and not any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
        )

    def of(self, text: str) -> bool:
        """Whether it holds for this text."""
        return self._ever and (not self._composes or unicodedata.is_normalized("NFC", text))


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a normaliser makes no text shorter, or none whose characters are composed."""
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"] == SPACE_MARK)
    return step["type"] in ("Prepend", "NFC")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """What a part of the library's pipeline does, step by step, as its file says it."""
    left = [] if part is None else [json.loads(part.__getstate__())]
    while left:
        step = left.pop()
        if step["type"] == "Sequence":
            left += step.get("normalizers", []) + step.get("pretokenizers", [])
        else:
            yield step
