"""Collect the standard library's sources, split them by file, train the tokenizer, write token arrays.

    python -m training.data --run build/epilimnion

The split depends on the relative path alone, so it is the same wherever the same Python is installed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
HELD_OUT_PERCENT = 3
SHORTEST = 200  # bytes; package markers and one-line shims teach nothing


@dataclass(frozen=True)
class Source:
    path: str  # relative to the standard library, with forward slashes
    text: str


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def is_python(text: str) -> bool:
    """Whether today's Python parses it; the library also carries Python 2 and broken samples."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def collect(root: Path) -> list[Source]:
    """Every distinct, parsable source below root, sorted by path."""
    sources: list[Source] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # The codecs are some hundred generated tables that differ in little but their numbers.
        if name.startswith(("site-packages/", "encodings/")):
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(raw).hexdigest()
        if len(raw) < SHORTEST or digest in seen or END_OF_TEXT in text or not is_python(text):
            continue
        seen.add(digest)
        sources.append(Source(name, text))
    return sources


def is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer, which GGUF calls model `gpt2`, pre `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} entries, expected {VOCABULARY}")
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Number of the token that opens a document and ends it."""
    return int(tokenizer.get_vocab()[END_OF_TEXT])


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one array, each opened by the end-of-text token."""
    end = end_of_text(tokenizer)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(end)
        ids.extend(encoding.ids)
    ids.append(end)
    return np.array(ids, dtype=np.uint16)


def list_digest(sources: list[Source]) -> str:
    """Digest of a file list: paths and contents, in order."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.path.encode() + b"\0" + hashlib.sha256(source.text.encode()).digest())
    return digest.hexdigest()


def prepare(root: Path, run: Path) -> dict[str, object]:
    sources = collect(root)
    parts = {
        "train": [source for source in sources if not is_held_out(source.path)],
        "held_out": [source for source in sources if is_held_out(source.path)],
    }
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([source.text for source in parts["train"]])
    tokenizer.save(str(run / "tokenizer.json"))
    report: dict[str, object] = {"python": platform.python_version(), "vocabulary": VOCABULARY}
    for name, part in parts.items():
        texts = [source.text for source in part]
        ids = tokenise(tokenizer, texts)
        np.save(run / f"{name}.npy", ids)
        (run / f"{name}.txt").write_text("".join(source.path + "\n" for source in part))
        report[name] = {
            "files": len(part),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(ids),
            "digest": list_digest(part),
        }
    (run / "data.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--root", type=Path, default=standard_library())
    arguments = parser.parse_args()
    print(json.dumps(prepare(arguments.root, arguments.run), indent=2))


if __name__ == "__main__":
    main()
