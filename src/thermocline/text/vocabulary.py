"""The token list of a GGUF file, read through checks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from thermocline.errors import ModelFormatError, TokenizerError, printable
from thermocline.files.metadata import Metadata
from thermocline.text.tokenizer import BYTE_PIECE

MAX_PIECE = 2048
"""Most characters in one token: deriving merges costs the square of it. The longest known is 512 spaces."""


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`, as the GGUF specification numbers it."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Spelling, kind and score of every token; all lists have the same length.

    `scores` is None where the file has none. `warnings` tells what was odd but bearable.
    """

    pieces: list[str]
    kinds: list[int]
    scores: list[float] | None
    warnings: tuple[str, ...] = ()

    def ids(self) -> dict[str, int]:
        """Spelling to id. The later of two equal spellings, and an empty one, get a stand-in that no text has."""
        found = dict(zip(self.pieces, range(len(self.pieces)), strict=True))
        if len(found) == len(self.pieces) and "" not in found:
            return found
        found = {}
        for i, piece in enumerate(self.pieces):
            found[piece if piece and piece not in found else f"\0\0unreachable {i}"] = i
        if len(found) != len(self.pieces):
            raise TokenizerError("tokens are spelled like this reader's stand-ins for unusable ones; not a real file")
        return found

    def of_kind(self, *kinds: TokenKind) -> dict[int, str]:
        """Id to spelling of the tokens of these kinds, empty spellings left out."""
        return {i: self.pieces[i] for i, kind in enumerate(self.kinds) if kind in kinds and self.pieces[i]}


def read_vocabulary(fields: Metadata) -> Vocabulary:
    """Read `tokenizer.ggml.tokens`, `.token_type` and `.scores`.

    Empty and repeated tokens are kept as ids that decode but are never encoded, and noted. A file without token
    types has only normal tokens, except the unknown, bos and eos ones that it names.

    Raises:
        ModelFormatError: arrays of other lengths or element types, a type outside 0 to 6, a score that is not a number.
        TokenizerError: no tokens, a token that is too long, or a byte token not spelled <0x00> to <0xFF>.
    """
    pieces = list(fields.strings("tokenizer.ggml.tokens"))
    if not pieces:
        raise TokenizerError("tokenizer.ggml.tokens is empty")
    longest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
    if len(pieces[longest]) > MAX_PIECE:
        raise TokenizerError(f"token {longest} has {len(pieces[longest])} characters; at most {MAX_PIECE} are allowed")
    kinds = _read_kinds(fields, pieces)
    for i, kind in enumerate(kinds):
        if kind == TokenKind.BYTE and not BYTE_PIECE.fullmatch(pieces[i]):
            raise TokenizerError(f"byte token {i} is spelled {printable(pieces[i], 40)!r}; allowed: <0x00> to <0xFF>")
    return Vocabulary(pieces, kinds, _read_scores(fields, len(pieces)), _odd_tokens(pieces))


def special_id(fields: Metadata, name: str, size: int) -> int | None:
    """The token id under `tokenizer.ggml.{name}_token_id`, None if the file names none.

    Raises:
        ModelFormatError: it is outside the vocabulary of `size` tokens.
    """
    return fields.integer(f"tokenizer.ggml.{name}_token_id", 0, size - 1, None)


def _read_kinds(fields: Metadata, pieces: list[str]) -> list[int]:
    key = "tokenizer.ggml.token_type"
    array = fields.array(key, "integer", length=len(pieces), default=None)
    if array is None:
        kinds = [int(TokenKind.NORMAL)] * len(pieces)
        for name, kind in (("unknown", TokenKind.UNKNOWN), ("bos", TokenKind.CONTROL), ("eos", TokenKind.CONTROL)):
            token = special_id(fields, name, len(pieces))
            if token is not None:
                kinds[token] = int(kind)
        return kinds
    wrong = np.flatnonzero((array < 0) | (array > max(TokenKind)))
    if len(wrong):
        raise ModelFormatError(fields.path, f"{key}[{wrong[0]}]", f"is {array[wrong[0]]}; allowed: 0 to 6")
    return [int(kind) for kind in array]


def _read_scores(fields: Metadata, size: int) -> list[float] | None:
    key = "tokenizer.ggml.scores"
    array = fields.array(key, "float", length=size, default=None)
    if array is None:
        return None
    wrong = np.flatnonzero(np.isnan(array))
    if len(wrong):
        raise ModelFormatError(fields.path, f"{key}[{wrong[0]}]", "is not a number")
    return [float(score) for score in array]


def _odd_tokens(pieces: list[str]) -> tuple[str, ...]:
    warnings = []
    if empty := pieces.count(""):
        warnings.append(f"{empty} tokens have no spelling; they decode to nothing")
    if len(set(pieces)) != len(pieces):
        repeated = [piece for piece, count in Counter(pieces).items() if count > 1 and piece]
        if repeated:
            first = printable(repeated[0], 40)
            warnings.append(f"{len(repeated)} tokens are spelled twice, {first!r} among them; the first id is used")
    return tuple(warnings)
