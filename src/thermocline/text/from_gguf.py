"""A tokenizer from the metadata of a GGUF file.

The keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); what they
mean where it is silent, and the defaults of absent ones, are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from thermocline.errors import TokenizerError, UnsupportedModelError, printable
from thermocline.files.metadata import Metadata
from thermocline.text.from_json import read_json, tokenizer_from_backend
from thermocline.text.splits import split_rule
from thermocline.text.tokenizer import SPACE, Spelling, Tokenizer, build_backend
from thermocline.text.vocabulary import TokenKind, Vocabulary, read_vocabulary, special_id

_MAX_JSON = 1 << 28
_SPECIAL = (TokenKind.CONTROL, TokenKind.UNKNOWN)
_JOINED = (TokenKind.NORMAL, TokenKind.UNDEFINED)


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path | str = "GGUF metadata") -> Tokenizer:
    """Build the tokenizer that `metadata` (key to value) describes.

    `tokenizer.huggingface.json` is used as it stands where the file carries it. Otherwise `tokenizer.ggml.model`
    must be `llama` (SentencePiece BPE by score, with byte fallback) or `gpt2` (byte-level BPE by merges, words cut
    as `tokenizer.ggml.pre` says). The tokenizer's `warnings` tell what had to be assumed.

    Raises:
        ModelFormatError: a key has the wrong type, length or range, or is missing.
        TokenizerError: the vocabulary or the merges are unusable.
        UnsupportedModelError: another tokenizer model, or an unknown `tokenizer.ggml.pre`.
    """
    fields = metadata if isinstance(metadata, Metadata) else Metadata(path, metadata)
    model = fields.text("tokenizer.ggml.model", "", limit=64)
    json = fields.text("tokenizer.huggingface.json", None, limit=_MAX_JSON)
    if json is not None:
        tokenizer = _from_embedded_json(fields, json)
    elif model == "llama":
        tokenizer = _from_scores(fields)
    elif model == "gpt2":
        tokenizer = _from_merges(fields)
    elif model:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {printable(model)!r}; "
            "implemented: llama (SentencePiece BPE), gpt2 (byte-level BPE)"
        )
    else:
        raise TokenizerError("the file has no tokenizer: tokenizer.ggml.model is missing")
    return tokenizer


def _from_embedded_json(fields: Metadata, json: str) -> Tokenizer:
    backend = read_json(json)
    limit = backend.get_vocab_size()
    return tokenizer_from_backend(
        backend,
        bos_id=special_id(fields, "bos", limit),
        eos_ids=_end_ids(fields, limit, special_id(fields, "eos", limit)),
        adds_bos=fields.boolean("tokenizer.ggml.add_bos_token", None),
        adds_eos=fields.boolean("tokenizer.ggml.add_eos_token", None),
        chat_template=fields.text("tokenizer.chat_template", None),
        name="tokenizer.huggingface.json",
    )


def _from_scores(fields: Metadata) -> Tokenizer:
    vocabulary = read_vocabulary(fields)
    ids = vocabulary.ids()
    size = len(vocabulary.pieces)
    warnings = list(vocabulary.warnings)
    warnings += [
        f"tokenizer.ggml.{key} is not applied, as in other engines for this tokenizer model"
        for key in ("remove_extra_whitespaces", "precompiled_charsmap")
        if fields.get(f"tokenizer.ggml.{key}", False) is not False
    ]
    has_merges = "tokenizer.ggml.merges" in fields
    merges = read_merges(fields, ids) if has_merges else merges_by_score(vocabulary, ids, warnings)
    unknown = _special_or(fields, "unknown", 0, vocabulary, TokenKind.UNKNOWN)
    unknown_piece = None if unknown is None else vocabulary.pieces[unknown]

    def make() -> Backend:
        return Backend(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown_piece))

    backend = build_backend(make, "the vocabulary")
    spaced = fields.boolean("tokenizer.ggml.add_space_prefix", True)
    # Every stretch of text between special tokens gets the space, as in llama.cpp and Llama 2's tokenizer.json.
    before = [normalizers.Prepend(SPACE)] if spaced else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    _add_tokens(backend, vocabulary)
    bos_id = _special_or(fields, "bos", 1, vocabulary, TokenKind.CONTROL)
    eos_id = _special_or(fields, "eos", 2, vocabulary, TokenKind.CONTROL)
    return Tokenizer(
        backend,
        vocabulary.pieces,
        spelling=Spelling.SENTENCEPIECE,
        strips_space=spaced,
        bos_id=bos_id,
        eos_ids=_end_ids(fields, size, eos_id),
        prefix=_frame(fields, "bos", bos_id, default=bos_id is not None),
        suffix=_frame(fields, "eos", eos_id, default=False),
        chat_template=fields.text("tokenizer.chat_template", None),
        name="llama",
        warnings=tuple(warnings),
    )


def _from_merges(fields: Metadata) -> Tokenizer:
    vocabulary = read_vocabulary(fields)
    ids = vocabulary.ids()
    size = len(vocabulary.pieces)
    warnings = list(vocabulary.warnings)
    pre = fields.text("tokenizer.ggml.pre", "", limit=256)
    if pre in ("", "default"):
        named = "is missing" if not pre else "is 'default'"
        warnings.append(
            f"tokenizer.ggml.pre {named}, so it is not known how this model cuts text into words; llama.cpp's "
            "default is used, and answers may be worse than the model's"
        )
    rule = split_rule(pre or "default")
    merges = read_merges(fields, ids)

    def make() -> Backend:
        return Backend(models.BPE(ids, merges, ignore_merges=rule.ignore_merges))

    backend = build_backend(make, "the vocabulary")
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, vocabulary)
    bos_id = special_id(fields, "bos", size)
    eos_id = special_id(fields, "eos", size)
    return Tokenizer(
        backend,
        vocabulary.pieces,
        spelling=Spelling.BYTE_LEVEL,
        bos_id=bos_id,
        eos_ids=_end_ids(fields, size, eos_id),
        prefix=_frame(fields, "bos", bos_id, default=rule.adds_bos and bos_id is not None),
        suffix=_frame(fields, "eos", eos_id, default=False),
        chat_template=fields.text("tokenizer.chat_template", None),
        name=f"gpt2, words cut as {pre or 'default'}",
        warnings=tuple(warnings),
    )


def read_merges(fields: Metadata, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """`tokenizer.ggml.merges`, best first; each entry is two spellings with a space between.

    Raises:
        ModelFormatError: the key is missing or not an array of strings.
        TokenizerError: an entry is not two spellings, or it or its result is not in the vocabulary.
    """
    entries: Sequence[str] = fields.strings("tokenizer.ggml.merges")
    merges: dict[tuple[str, str], None] = {}
    for i, entry in enumerate(entries):
        left, _, right = entry.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise TokenizerError(
                f"merge {i} of {len(entries)}, {printable(entry, 60)!r}, does not join two tokens into a third"
            )
        merges[left, right] = None
    return list(merges)


def merges_by_score(vocabulary: Vocabulary, ids: Mapping[str, int], warnings: list[str]) -> list[tuple[str, str]]:
    """The merges that do what SentencePiece does with scores: of all neighbours that form a token, join those whose
    token scores highest.

    Only normal tokens take part; control, user-defined, unused and byte tokens are no result of merging.

    Raises:
        TokenizerError: the vocabulary has no scores.
    """
    if vocabulary.scores is None:
        raise TokenizerError("tokenizer.ggml.scores and .merges are both missing; one is needed to encode text")
    usable = {
        piece: score
        for i, (piece, kind, score) in enumerate(
            zip(vocabulary.pieces, vocabulary.kinds, vocabulary.scores, strict=True)
        )
        if kind in _JOINED and ids.get(piece) == i
    }
    ranked = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in usable.items()
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in usable and piece[cut:] in usable
    ]
    ranked.sort(key=itemgetter(0))  # stable: equal scores stay in the order of ids, the longest left part first
    joined = {left + right for _, left, right in ranked}
    if len({usable[piece] for piece in joined}) < len(joined):
        warnings.append(
            "tokens with equal scores are joined in the order of their ids; SentencePiece goes from the left"
        )
    return [(left, right) for _, left, right in ranked]


def _add_tokens(backend: Backend, vocabulary: Vocabulary) -> None:
    """Make control tokens special, and user-defined ones matched whole wherever they stand in a text."""
    special = vocabulary.of_kind(*_SPECIAL).values()
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    defined = vocabulary.of_kind(TokenKind.USER_DEFINED).values()
    backend.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in defined])


def _special_or(fields: Metadata, name: str, usual: int, vocabulary: Vocabulary, kind: TokenKind) -> int | None:
    """The id the file names, or the `usual` one of SentencePiece if that token is of the right kind."""
    found = special_id(fields, name, len(vocabulary.pieces))
    if found is None and usual < len(vocabulary.pieces) and vocabulary.kinds[usual] == kind:
        return usual
    return found


def _end_ids(fields: Metadata, size: int, eos_id: int | None) -> list[int]:
    """The tokens that end a text, a turn and a message, in this order."""
    named = (eos_id, special_id(fields, "eot", size), special_id(fields, "eom", size))
    return list(dict.fromkeys(token for token in named if token is not None))


def _frame(fields: Metadata, name: str, token: int | None, *, default: bool) -> tuple[int, ...]:
    wanted = fields.boolean(f"tokenizer.ggml.add_{name}_token", default)
    if wanted and token is None:
        raise TokenizerError(f"tokenizer.ggml.add_{name}_token is true, but tokenizer.ggml.{name}_token_id is missing")
    return (token,) if wanted and token is not None else ()
