"""The tokenizer of an opened model, whatever kind of file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.from_hf import tokenizer_from_folder
from thermocline.text.tokenizer import Tokenizer


class TextSource(Protocol):
    """What is needed of an opened model: `kind` "gguf" with a header as `metadata`, or "hf" with a folder as `path`."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


def load_tokenizer(source: TextSource) -> Tokenizer:
    """The tokenizer of `source`.

    Raises:
        TokenizerError: there is none, or it is unusable.
        ModelFormatError: the file is not what it claims to be.
        UnsupportedModelError: a kind of tokenizer that is not implemented.
    """
    if source.kind == "hf":
        return tokenizer_from_folder(source.path)
    return tokenizer_from_gguf(source.metadata, source.path)
