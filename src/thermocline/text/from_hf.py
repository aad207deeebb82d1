"""A tokenizer from a Hugging Face model folder. No code of the folder is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from thermocline.errors import ModelFormatError, TokenizerError, printable
from thermocline.files.mapped import read_small
from thermocline.files.strict_json import parse_object
from thermocline.text.from_json import read_json, tokenizer_from_backend
from thermocline.text.tokenizer import Tokenizer

_MAX_TOKENIZER = 1 << 28
_MAX_CONFIG = 1 << 24
_MAX_TEMPLATE = 1 << 20
_TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Build the tokenizer of `folder` from its tokenizer.json and, where they are there, tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja, generation_config.json and config.json.

    The pipeline of tokenizer.json is used as it stands. `add_bos_token` and `add_eos_token` of the configuration
    decide what frames a text; without them, tokenizer.json's post-processor does, as in transformers.

    Raises:
        TokenizerError: no tokenizer.json, one that is unusable, or a special token that it lacks.
        ModelFormatError: a file that is not what it should be.
        UnsupportedModelError: a kind of tokenizer that is not implemented.
    """
    source = folder / "tokenizer.json"
    if not source.exists():
        raise TokenizerError(_missing(folder))
    backend = read_json(_text(source, _MAX_TOKENIZER))
    config = {**_object(folder / "special_tokens_map.json"), **_object(folder / "tokenizer_config.json")}
    warnings = _add_tokens(backend, config)
    bos_id = _named(backend, config, "bos_token")
    eos_id = _named(backend, config, "eos_token")
    ends = [] if eos_id is None else [eos_id]
    for file in ("generation_config.json", "config.json"):
        ends += _end_ids(folder / file)
    return tokenizer_from_backend(
        backend,
        bos_id=bos_id,
        eos_ids=dict.fromkeys(ends),
        adds_bos=_flag(folder, config, "add_bos_token", bos_id),
        adds_eos=_flag(folder, config, "add_eos_token", eos_id),
        chat_template=_chat_template(folder, config),
        warnings=warnings,
    )


def _missing(folder: Path) -> str:
    where = printable(str(folder))
    if (folder / "tokenizer.model").exists():
        return (
            f"{where} has tokenizer.model but no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{where} has no tokenizer.json; download it with the model's other files"


def _add_tokens(backend: Backend, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Add what the configuration names and tokenizer.json lacks, at the ids it gives."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder must map ids to tokens")
    for number, entry in sorted(listed.items(), key=lambda item: (len(item[0]), item[0])):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not number.isdecimal():
            raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder[{printable(number, 20)}] is not a token")
        if entry["content"] not in known:
            flags = {flag: bool(entry.get(flag)) for flag in _TOKEN_FLAGS}
            token = AddedToken(entry["content"], **flags)
            (backend.add_special_tokens if flags["special"] else backend.add_tokens)([token])
            if backend.token_to_id(entry["content"]) != int(number):
                raise TokenizerError(
                    f"tokenizer_config.json gives {printable(entry['content'], 40)!r} the id {number}, tokenizer.json "
                    f"the id {backend.token_to_id(entry['content'])}; they are not of the same model"
                )
    named = config.get("additional_special_tokens")
    extra = [_content(token) for token in named] if isinstance(named, list) else []
    present = [token for token in extra if token is not None and backend.token_to_id(token) is not None]
    backend.add_special_tokens([token for token in present if token not in known])
    if len(present) < len(extra):
        return (f"{len(extra) - len(present)} additional_special_tokens are not in the vocabulary and are left out",)
    return ()


def _content(token: object) -> str | None:
    """The spelling in a special-token entry: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named(backend: Backend, config: Mapping[str, Any], key: str) -> int | None:
    piece = _content(config.get(key))
    if not piece:
        return None
    found: int | None = backend.token_to_id(piece)
    if found is None:
        raise TokenizerError(f"the {key} {printable(piece, 40)!r} is not in the vocabulary of tokenizer.json")
    if found not in backend.get_added_tokens_decoder():
        backend.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
    return found


def _end_ids(path: Path) -> list[int]:
    """`eos_token_id` of a configuration file, a number or a list of them."""
    value = _object(path).get("eos_token_id")
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ModelFormatError(path, "eos_token_id", f"is {printable(repr(value), 60)}; allowed: ids of the vocabulary")
    return ids


def _flag(folder: Path, config: Mapping[str, Any], key: str, token: int | None) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelFormatError(
            folder / "tokenizer_config.json", key, f"is {printable(repr(value), 60)}; allowed: true or false"
        )
    return value if token is not None or not value else False


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the configuration's `chat_template`: a string, or a list with one named "default"."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return _text(file, _MAX_TEMPLATE)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelFormatError(folder / "tokenizer_config.json", "chat_template", "is neither a text nor a list")
    return value


def _object(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`, empty if there is no such file."""
    return parse_object(read_small(path, _MAX_CONFIG), path, "JSON") if path.exists() else {}


def _text(path: Path, limit: int) -> str:
    try:
        return read_small(path, limit).decode()
    except UnicodeDecodeError as error:
        raise ModelFormatError(path, "text", "is not UTF-8", offset=error.start) from error
