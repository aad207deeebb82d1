"""A tokenizer from the tokenizers library's own format, `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from thermocline.errors import TokenizerError, UnsupportedModelError, printable
from thermocline.text.tokenizer import SPACE, Spelling, Tokenizer, build_backend

_PROBE = "a"


def read_json(text: str) -> Backend:
    """The library's tokenizer of `text`, with padding, truncation and BPE dropout off.

    Raises:
        TokenizerError: the library refuses the text.
        UnsupportedModelError: a model other than BPE and Unigram, or BPE with word affixes.
    """
    backend = build_backend(lambda: Backend.from_str(text), "tokenizer.json")
    backend.no_padding()
    backend.no_truncation()
    model = backend.model
    if not isinstance(model, models.BPE | models.Unigram):
        raise UnsupportedModelError(f"tokenizer.json has a {type(model).__name__} model; implemented: BPE, Unigram")
    if isinstance(model, models.BPE):
        model.dropout = None
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            if getattr(model, affix):
                raise UnsupportedModelError(
                    f"tokenizer.json sets {affix} to {getattr(model, affix)!r}; only none is known"
                )
    return backend


def tokenizer_from_backend(
    backend: Backend,
    *,
    bos_id: int | None,
    eos_ids: Iterable[int],
    adds_bos: bool | None = None,
    adds_eos: bool | None = None,
    chat_template: str | None = None,
    name: str = "tokenizer.json",
    warnings: tuple[str, ...] = (),
) -> Tokenizer:
    """Wrap the library's tokenizer.

    `eos_ids`: the first is the one that `adds_eos` puts at the end. With `adds_bos` and `adds_eos` both None, the
    tokenizer's own post-processor decides what frames a text.

    Raises:
        TokenizerError: ids far apart, or a token to be added that is not named.
        UnsupportedModelError: a decoder whose effect on single tokens is not known.
    """
    ends = tuple(eos_ids)
    prefix, suffix = _measured_frame(backend)
    if adds_bos is not None or adds_eos is not None or backend.post_processor is None:
        prefix = _frame("bos", (bos_id,) if bos_id is not None else (), wanted=bool(adds_bos))
        suffix = _frame("eos", ends[:1], wanted=bool(adds_eos))
    spelling, strips_space = _read_decoder(backend)
    return Tokenizer(
        backend,
        _pieces(backend),
        spelling=spelling,
        strips_space=strips_space,
        prefix=prefix,
        suffix=suffix,
        bos_id=bos_id,
        eos_ids=ends,
        chat_template=chat_template,
        name=name,
        warnings=warnings,
    )


def _pieces(backend: Backend) -> list[str | None]:
    vocabulary: dict[str, int] = backend.get_vocab()
    if not vocabulary:
        return []
    size = max(vocabulary.values()) + 1
    if size > 2 * len(vocabulary) + (1 << 16):
        raise TokenizerError(f"{len(vocabulary)} tokens have ids up to {size - 1}; that is not one vocabulary")
    pieces: list[str | None] = [None] * size
    for piece, i in vocabulary.items():
        pieces[i] = piece
    return pieces


def _frame(name: str, ids: tuple[int, ...], *, wanted: bool) -> tuple[int, ...]:
    if wanted and not ids:
        raise TokenizerError(f"a {name} token is to be added to every text, but no {name} token is named")
    return ids if wanted else ()


def _measured_frame(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    bare: list[int] = backend.encode(_PROBE, add_special_tokens=False).ids
    framed: list[int] = backend.encode(_PROBE, add_special_tokens=True).ids
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise UnsupportedModelError("tokenizer.json has a post-processor that changes the text's own tokens")


def _read_decoder(backend: Backend) -> tuple[Spelling, bool]:
    """How tokens are spelled, and whether decoding drops a leading space."""
    steps = _flatten(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    known = {_step_name(step) for step in steps}
    strips = any(
        step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    if known and known <= {"ByteLevel", "Fuse"}:
        return Spelling.BYTE_LEVEL, False
    if known & {"space", "Metaspace"} and known <= {"space", "Metaspace", "ByteFallback", "Fuse", "leading space"}:
        return Spelling.SENTENCEPIECE, strips
    found = ", ".join(sorted(printable(name, 40) for name in known)) or "none"
    raise UnsupportedModelError(
        f"tokenizer.json has these decoder steps: {found}; implemented: ByteLevel, or SentencePiece's "
        "(Replace, ByteFallback, Fuse, Strip, Metaspace)"
    )


def _flatten(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if step["type"] == "Sequence":
        return [inner for part in step["decoders"] for inner in _flatten(part)]
    return [step]


def _step_name(step: Mapping[str, Any]) -> str:
    """The step's type, or what it does where only that one use of it is known."""
    kind: str = step["type"]
    if kind == "Replace" and step["pattern"] == {"String": SPACE} and step["content"] == " ":
        return "space"
    if kind == "Strip" and step["content"] == " " and step["start"] == 1 and step["stop"] == 0:
        return "leading space"
    return kind
