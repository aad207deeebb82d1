"""A folder's tokenizer as the metadata of a GGUF file.

The file carries tokenizer.json itself (`tokenizer.huggingface.json`), which Thermocline reads, and the keys
of the GGUF specification (`tokenizer.ggml.*`), which other engines read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thermocline.errors import ModelFormatError, UnsupportedModelError
from thermocline.text.from_hf import tokenizer_from_folder
from thermocline.text.splits import SPLIT_RULES
from thermocline.text.tokenizer import BYTE_PIECE, END_NAMES, Spelling, Tokenizer
from thermocline.text.vocabulary import TokenKind

GPT2_WORDS = SPLIT_RULES["gpt-2"].patterns[0]
END_KEYS = ("eos", "eot", "eom")


def gguf_tokenizer(folder: Path, rows: int, eos_id: int | None) -> tuple[dict[str, object], tuple[str, ...]]:
    """Metadata of the tokenizer in `folder` for an embedding of `rows` rows, and notes on what other engines lose.

    Ids beyond the tokenizer's become unused tokens. `eos_id` is the first end token that config.json names, if any.

    Raises:
        TokenizerError: there is no tokenizer, or it is unusable.
        ModelFormatError: it has more tokens than the embedding has rows.
        UnsupportedModelError: GGUF has no keys for its kind.
    """
    tokenizer = tokenizer_from_folder(folder)
    if tokenizer.size > rows:
        raise ModelFormatError(folder, "tokenizer.json", f"{tokenizer.size} tokens, but the embedding has {rows} rows")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    data = json.loads(text)
    if data["model"]["type"] != "BPE":
        raise UnsupportedModelError(f"{folder}: a tokenizer of type {data['model']['type']} has no keys in GGUF")
    missing = _missing_tokens(data, tokenizer)
    if missing:
        data["added_tokens"] += missing
        text = json.dumps(data, ensure_ascii=False)
    pieces, kinds = _pieces(data, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]]
    keys: dict[str, object] = {"tokens": pieces, "token_type": np.array(kinds, dtype=np.int32)}
    notes: tuple[str, ...] = ()
    if tokenizer.spelling is Spelling.BYTE_LEVEL:
        pre = split_name(data.get("pre_tokenizer"))
        keys |= {"model": "gpt2", "pre": pre or "default"} | ({"merges": merges} if merges else {})
        if pre is None:
            notes = ("the way words are cut has no name in GGUF; other engines will cut them in their default way",)
    else:
        scores = np.array(_scores(pieces, merges), dtype=np.float32)
        keys |= {"model": "llama", "scores": scores, "add_space_prefix": tokenizer.strips_space}
    keys |= _special(data, tokenizer, eos_id)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    metadata["tokenizer.huggingface.json"] = text
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata, notes


def split_name(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """What GGUF calls a tokenizer.json's way to cut words, None if it has no name for it."""
    patterns: list[str] = []
    for step in _steps(pre_tokenizer):
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [GPT2_WORDS] if step.get("use_regex", True) else []
            case _:
                return None
    return next((name for name, rule in SPLIT_RULES.items() if rule.patterns == tuple(patterns)), None)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return ()
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else (pre_tokenizer,)


def _missing_tokens(data: Mapping[str, Any], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokens that only the folder's other files add or make special, as tokenizer.json lists added tokens."""
    listed = {token["id"] for token in data["added_tokens"]}
    spelled = listed | set(data["model"]["vocab"].values())
    wanted = {i for i in range(tokenizer.size) if i not in spelled and tokenizer.piece(i)} | tokenizer.special_ids
    return [
        {
            "id": i,
            "content": tokenizer.piece(i),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": i in tokenizer.special_ids,
        }
        for i in sorted(wanted - listed)
    ]


def _pieces(data: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Spelling and kind of every row of the embedding."""
    pieces = [f"[PAD{i}]" for i in range(rows)]
    kinds = [int(TokenKind.UNUSED)] * rows
    for piece, i in data["model"]["vocab"].items():
        pieces[i] = piece
        is_byte = data["model"].get("byte_fallback") and BYTE_PIECE.fullmatch(piece)
        kinds[i] = int(TokenKind.BYTE if is_byte else TokenKind.NORMAL)
    for token in data["added_tokens"]:
        pieces[token["id"]] = token["content"]
        kinds[token["id"]] = int(TokenKind.CONTROL if token["special"] else TokenKind.USER_DEFINED)
    unknown = data["model"].get("unk_token")
    if unknown is not None and unknown in data["model"]["vocab"]:
        kinds[data["model"]["vocab"][unknown]] = int(TokenKind.UNKNOWN)
    return pieces, kinds


def _scores(pieces: Iterable[str], merges: Sequence[str]) -> list[float]:
    """Scores that make SentencePiece's rule, join the pair of the best score, follow the order of the merges."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    return [-float(rank.get(piece, len(rank))) for piece in pieces]


def _special(data: Mapping[str, Any], tokenizer: Tokenizer, eos_id: int | None) -> dict[str, object]:
    keys: dict[str, object] = {"add_bos_token": tokenizer.adds_bos, "add_eos_token": tokenizer.adds_eos}
    if tokenizer.bos_id is not None:
        keys["bos_token_id"] = np.uint32(tokenizer.bos_id)
    # ends with well-known spellings are found again by name, so the others come first where places are few
    ends = sorted(tokenizer.eos_ids, key=lambda i: (i != eos_id, tokenizer.piece(i) in END_NAMES, i))
    keys |= {f"{name}_token_id": np.uint32(end) for name, end in zip(END_KEYS, ends, strict=False)}
    unknown = data["model"]["vocab"].get(data["model"].get("unk_token"))
    if unknown is not None:
        keys["unknown_token_id"] = np.uint32(unknown)
    return keys
