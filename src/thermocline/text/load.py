"""The tokenizer of an opened model, whatever kind of file it came from."""

from __future__ import annotations

from thermocline.files.source import ModelSource
from thermocline.text.from_gguf import tokenizer_from_gguf
from thermocline.text.from_hf import tokenizer_from_folder
from thermocline.text.tokenizer import Tokenizer


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer of `source`; its `warnings` tell what had to be assumed.

    Raises:
        TokenizerError: there is none, or it is unusable.
        ModelFormatError: a file is not what it claims to be.
        UnsupportedModelError: a kind of tokenizer that is not implemented.
    """
    if source.kind == "hf":
        return tokenizer_from_folder(source.path)
    return tokenizer_from_gguf(source.metadata, source.path)
