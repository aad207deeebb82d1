"""The texts that a model reads while it is watched: files and folders, document by document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from thermocline.errors import UsageError, printable

PIECE: Final = 1 << 20
"""Characters of a document that are made tokens at once; a longer one is cut after a line."""

Tokenize = Callable[[str], Sequence[int]]


class RefusedTextError(Exception):
    """A text that the tokenizer cannot spell. It is skipped, so whoever reads a corpus catches this."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that may be a text; `stamp` tells whether it is still the same."""

    path: Path
    size: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files in the order in which they are read."""

    files: tuple[TextFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """32 hex digits that change when a file is added, removed, replaced or touched."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path}\0{file.size}\0{file.stamp}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    def shuffled(self) -> Corpus:
        """The same files in an order of chance that depends on names and sizes alone: a part is like the whole."""

        def chance(file: TextFile) -> bytes:
            return hashlib.sha256(f"{file.size} {file.path.name}".encode("utf-8", "surrogateescape")).digest()

        return Corpus(tuple(sorted(self.files, key=chance)))


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to be run as one sequence; `nbytes` is how many bytes of text are done after it, roughly."""

    tokens: tuple[int, ...]
    nbytes: int


def find_texts(paths: Iterable[Path | str]) -> Corpus:
    """Files as they are named, and of folders all files below, by name; what begins with a dot is left out.

    Raises:
        UsageError: nothing was named, or a name is not there, or no file was found.
    """
    found: dict[Path, TextFile] = {}
    named = [Path(path) for path in paths]
    for path in named:
        try:
            inside = sorted(_below(path)) if path.is_dir() else [path]
            for file in inside:
                status = file.stat()
                if file.is_file():
                    found.setdefault(file.resolve(), TextFile(file, status.st_size, status.st_mtime_ns))
                elif file is path:
                    raise UsageError(f"the text {printable(str(path))} is neither a file nor a folder")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"the text {printable(str(path))} cannot be read: {reason}") from error
    if not found:
        raise UsageError("there is no text to read; name files or folders with --text")
    return Corpus(tuple(found.values()))


def is_text(file: TextFile) -> bool:
    """Whether the file is UTF-8 without NUL, read to its end.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return all("\0" not in piece for piece in _pieces(file))
    except UnicodeDecodeError:
        return False


def read_text(file: TextFile) -> str:
    """The whole text of a file of which `is_text` is true.

    Raises:
        UsageError: it cannot be read.
    """
    return "".join(_pieces(file))


def spelled(text: str, tokenize: Tokenize) -> Sequence[int]:
    """The tokens of a text.

    Raises:
        RefusedTextError: the tokenizer refuses it.
    """
    try:
        return tokenize(text)
    except UsageError as error:
        raise RefusedTextError(str(error)) from error


def windows(file: TextFile, tokenize: Tokenize, prefix: Sequence[int], length: int) -> Iterator[Window]:
    """The document's tokens cut to sequences of at most `length`, each with `prefix` (bos) before it.

    Raises:
        UsageError: the file cannot be read, or `length` leaves no room beside the prefix.
        RefusedTextError: the tokenizer refuses a piece of it.
    """
    room = length - len(prefix)
    if room < 1:
        raise UsageError(f"a context of {length} tokens holds nothing beside {len(prefix)} that start a text")
    done = 0
    for piece in _pieces(file):
        tokens = spelled(piece, tokenize)
        size = len(piece.encode("utf-8", "surrogatepass"))
        for start in range(0, len(tokens), room):
            part = tokens[start : start + room]
            nbytes = done + size * min(start + room, len(tokens)) // len(tokens)
            yield Window((*prefix, *part), min(nbytes, file.size))
        done += size


class Reading:
    """The windows of all texts of a corpus, in order, up to a limit of tokens (0: none).

    While it is iterated over, `share` tells how much of it is done (0 to 1), `files` and `nbytes` how many texts and
    bytes of them were read, and `skipped` which files are no text, or one that the tokenizer refuses.
    """

    def __init__(self, corpus: Corpus, tokenize: Tokenize, prefix: Sequence[int], length: int, limit: int = 0) -> None:
        self._corpus, self._limit = corpus, limit
        self._tokenize, self._prefix, self._length = tokenize, prefix, length
        self.skipped: list[Path] = []
        self.files = self.nbytes = 0
        self.share = 0.0

    def __iter__(self) -> Iterator[Window]:
        tokens = before = texts = 0
        whole = max(self._corpus.nbytes, 1)
        for file in self._corpus.files:
            if not is_text(file):
                self.skipped.append(file.path)
            else:
                self.files += 1
                for window in self._windows(file):
                    if self._limit and tokens + len(window.tokens) >= self._limit:
                        window = Window(window.tokens[: self._limit - tokens], window.nbytes)
                    tokens += len(window.tokens)
                    self.nbytes = texts + window.nbytes
                    share = (before + window.nbytes) / whole
                    self.share = max(share, tokens / self._limit) if self._limit else share
                    yield window
                    if tokens == self._limit:
                        return
                texts += file.size
            before += file.size

    def _windows(self, file: TextFile) -> Iterator[Window]:
        """The file's windows, up to where the tokenizer refuses to go on."""
        try:
            yield from windows(file, self._tokenize, self._prefix, self._length)
        except RefusedTextError:
            self.files -= 1
            self.skipped.append(file.path)


def _below(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():  # a link may lead back up
                yield from _below(entry)
        elif entry.is_file():
            yield entry


def _pieces(file: TextFile) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters, cut after a line where there is one."""
    try:
        with file.path.open(encoding="utf-8-sig", newline="") as opened:
            while piece := opened.read(PIECE):
                if len(piece) == PIECE:
                    piece += opened.readline(PIECE)
                yield piece
    except OSError as error:
        raise UsageError(f"the text {printable(str(file.path))} cannot be read: {error.strerror}") from error
