"""Text to token ids and back, exact to the byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from operator import index
from typing import Any, TypeVar

from tokenizers import Tokenizer as Backend

from thermocline.errors import TokenizerError, UsageError, printable
from thermocline.text.fewest import Lossless

T = TypeVar("T")


class Spelling(StrEnum):
    """How a vocabulary writes bytes as characters."""

    BYTE_LEVEL = "byte-level BPE"
    SENTENCEPIECE = "SentencePiece"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the rest follow from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"
"""U+2581, SentencePiece's space."""
LONG_TEXT = 1 << 16
"""Characters; a shorter text is encoded in less time than a person notices."""

END_NAMES = frozenset(
    {
        *("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>"),
        *("<end_of_turn>", "<|end_of_turn|>", "<turn|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
        *("<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>"),
    }
)
"""Spellings of special tokens that end an answer even where a file names only one of them as its eos."""


class Tokenizer:
    """A vocabulary with the rules to use it.

    `decode` is the bytes of the tokens, joined, as UTF-8; what is not UTF-8 becomes U+FFFD by Unicode's rule of
    maximal subparts, as Python and llama.cpp's server do (the tokenizers library differs here for SentencePiece
    byte runs: it replaces a whole run if any of it is wrong). Spaces before punctuation are not cleaned up.

    Safe to share between threads.
    """

    def __init__(
        self,
        backend: Backend,
        pieces: Sequence[str | None],
        *,
        spelling: Spelling,
        strips_space: bool = False,
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        name: str = "",
        warnings: tuple[str, ...] = (),
    ) -> None:
        """Wrap `backend`, whose token i is spelled `pieces[i]` (None where the ids have a hole).

        `strips_space`: decoding drops one leading space, because encoding puts one there.
        `prefix`, `suffix`: ids put around a text by `add_special`.
        `eos_ids`: ids that end an answer, the one called eos first; special tokens with known names join them.
        `warnings`: what had to be assumed when the tokenizer was built.

        Raises:
            TokenizerError: no pieces, or some text could not be encoded and would vanish.
        """
        if not pieces:
            raise TokenizerError("the vocabulary is empty")
        self._backend = backend
        self._plain = _without_special(backend)
        self._pieces = pieces
        self._bytes: list[bytes | None] = [None] * len(pieces)
        added = backend.get_added_tokens_decoder()
        self._literal: Mapping[int, str] = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Ids that are not text: `decode` skips them, `encode` makes them only with `parse_special`."""
        self.spelling = spelling
        self.strips_space = strips_space
        self.prefix = prefix
        self.suffix = suffix
        self.bos_id = bos_id
        ends = tuple(eos_ids)
        self.eos_id = ends[0] if ends else None
        """The id that the file calls eos."""
        self.eos_ids = frozenset(ends) | {i for i in self.special_ids if self._literal[i] in END_NAMES}
        """Ids that end an answer."""
        self.chat_template = chat_template
        self.name = name
        self.warnings = warnings
        named = {"bos": () if bos_id is None else (bos_id,), "eos": self.eos_ids, "added": prefix + suffix}
        for what, ids in named.items():
            for token in ids:
                self._checked(token, TokenizerError, f"{what} ")
        self._unspelled = self._unspelled_bytes()

    @property
    def size(self) -> int:
        """Number of ids: one more than the largest."""
        return len(self._pieces)

    @property
    def adds_bos(self) -> bool:
        """Whether `add_special` starts a text with the bos token."""
        return self.bos_id is not None and self.bos_id in self.prefix

    @property
    def adds_eos(self) -> bool:
        """Whether `add_special` ends a text with an eos token."""
        return any(i in self.eos_ids for i in self.suffix)

    @property
    def kind(self) -> str:
        """One line for people: spelling, name, size."""
        return f"{self.spelling} {printable(self.name, 60)}, {self.size} tokens"

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        `add_special` puts the model's bos and eos tokens around it. `parse_special` turns the spelling of a special
        token into that token; without it, such a spelling is plain text, which is what a user's words must be.

        Raises:
            UsageError: `text` is not a string, has a lone surrogate or a byte the vocabulary cannot spell, or is
                more than the word expression can search, such as ten million spaces in a row.
        """
        backend = self._backend if parse_special else self._plain
        self._utf8(text)
        ids: list[int] = _guarded(
            lambda: backend.encode(text, add_special_tokens=False).ids, UsageError, "this text cannot be encoded: "
        )
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, told from its bytes; 0 where it is short or that cannot be told.

        Raises:
            UsageError: as `encode`.
        """
        size = len(self._utf8(text))
        return -(-size // self._longest) if len(text) >= LONG_TEXT and self._lossless.of(text) else 0

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, as a text of its own: one leading space goes where `strips_space` says so.

        Raises:
            UsageError: an id is outside the vocabulary.
        """
        data = b"".join(self.text_bytes(i, skip_special=skip_special) for i in ids)
        if self.strips_space and data[:1] == b" ":
            data = data[1:]
        return data.decode("utf-8", "replace")

    def checked_ids(self, ids: Iterable[Any]) -> list[int]:
        """`ids` as they are, if each is one of the vocabulary.

        Raises:
            UsageError: one is not a whole number, or outside the vocabulary.
        """
        return [self._checked(token) for token in ids]

    def text_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """What `token` adds to a text: `token_bytes`, or nothing for a special token that is to be skipped."""
        return b"" if skip_special and token in self.special_ids else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that `token` stands for; a special token's are its spelling, an unused id's are none.

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        token = self._checked(token)
        found = self._bytes[token]
        if found is None:
            found = self._bytes[token] = self._spell(token)
        return found

    def piece(self, token: int) -> str:
        """`token` as the vocabulary spells it ("▁Hello", "Ġhello", "<0x0A>"); empty for an unused id.

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        return self._pieces[self._checked(token)] or ""

    def token_id(self, piece: str) -> int | None:
        """The id spelled `piece` in the vocabulary, None if there is none."""
        found: int | None = self._backend.token_to_id(piece)
        return found

    def _spell(self, token: int) -> bytes:
        piece = self._pieces[token] or ""
        if token in self._literal:
            return piece.encode()
        if self.spelling is Spelling.BYTE_LEVEL:
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in piece])
            except KeyError:
                return piece.encode()
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    def _checked(self, token: int, kind: type[UsageError | TokenizerError] = UsageError, what: str = "") -> int:
        try:
            if isinstance(token, bool):
                raise TypeError
            number = index(token)
        except TypeError:
            raise kind(f"{what}token id {printable(repr(token), 40)} is not a whole number") from None
        if not 0 <= number < len(self._pieces):
            raise kind(f"{what}token id {number} is outside the vocabulary; allowed: 0 to {len(self._pieces) - 1}")
        return number

    def _unspelled_bytes(self) -> frozenset[int]:
        """Bytes that no token spells; the backend would drop them from a text without a word."""
        known = self._backend.token_to_id
        has_unknown = getattr(self._backend.model, "unk_token", None) is not None
        if has_unknown or not hasattr(self._backend.model, "byte_fallback"):
            return frozenset()
        if self.spelling is Spelling.BYTE_LEVEL:
            return frozenset(b for b, character in CHARACTER_OF_BYTE.items() if known(character) is None)
        missing = sum(known(f"<0x{b:02X}>") is None for b in range(256))
        if missing or not self._backend.model.byte_fallback:
            raise TokenizerError(
                f"the vocabulary has no unknown token and {missing} of the 256 byte tokens are missing or unused, "
                "so characters outside it could not be encoded"
            )
        return frozenset()

    @cached_property
    def _lossless(self) -> Lossless:
        model, alphabet = self._backend.model, self.spelling is Spelling.BYTE_LEVEL
        spelled = CHARACTER_OF_BYTE.values() if alphabet else [f"<0x{byte:02X}>" for byte in range(256)]
        complete = all(model.token_to_id(piece) is not None for piece in spelled)
        if alphabet:
            complete = complete or getattr(model, "unk_token", None) is None  # then `_utf8` refuses what is lost
        else:
            complete = complete and getattr(model, "byte_fallback", False)
        return Lossless(self._backend, complete=complete, alphabet=alphabet)

    @cached_property
    def _longest(self) -> int:
        """Most bytes of a text that become one token. A text may have SentencePiece's space itself, of three bytes."""
        alphabet = self.spelling is Spelling.BYTE_LEVEL
        return max(
            len(piece) if alphabet and token not in self._literal else len(piece.encode())
            for token, piece in enumerate(self._pieces)
            if piece
        )

    def _utf8(self, text: object) -> bytes:
        """`text` as UTF-8, if all of it can be spelled."""
        if not isinstance(text, str):
            raise UsageError(f"text must be a string, not {type(text).__name__}")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise UsageError(
                f"the text has a lone surrogate U+{code:04X} at character {error.start}; it must be valid Unicode"
            ) from None
        if self._unspelled and (lost := self._unspelled.intersection(data)):
            raise UsageError(f"the text has the byte 0x{min(lost):02X}, which this vocabulary cannot spell")
        return data


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Check that every token has a row in an embedding of `rows` rows (more rows than tokens are padding).

    Raises:
        TokenizerError: there are tokens without a row.
    """
    if tokenizer.size > rows:
        raise TokenizerError(
            f"the vocabulary has {tokenizer.size} tokens, but the embedding has {rows} rows; "
            "tokenizer and weights are not of the same model"
        )


def build_backend(make: Callable[[], Backend], what: str) -> Backend:
    """`make()` of the tokenizers library, its errors told as ours.

    Raises:
        TokenizerError: the library refuses `what`.
    """
    return _guarded(make, TokenizerError, f"{what} is not usable: ")


def _guarded(make: Callable[[], T], kind: type[UsageError | TokenizerError], words: str = "") -> T:
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library's Rust code does not derive from Exception
        raise kind(f"{words}{printable(str(error))}") from error


def _without_special(backend: Backend) -> Backend:
    """A twin that shares the model but reads the spelling of special tokens as plain text.

    The library holds this choice as a mutable flag of a tokenizer; two tokenizers need no lock.
    """
    twin = Backend(backend.model)
    twin.normalizer, twin.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    placed = {i: token.content for i, token in twin.get_added_tokens_decoder().items()}
    if placed != {i: token.content for i, token in added.items()}:
        twin = Backend.from_str(backend.to_str())
    twin.encode_special_tokens = True
    return twin
