"""Model files made byte by byte from the format's description, sharing no code with the package."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, kind: int, value: object) -> bytes:
    """A key-value; `value` as raw bytes is taken as it is."""
    if isinstance(value, bytes):
        content = value
    elif isinstance(value, str):
        content = string(value)
    else:
        content = struct.pack("<" + CODES[kind], value)
    return string(key) + struct.pack("<I", kind) + content


def array(key: str, kind: int, values: Sequence[object], *, count: int | None = None) -> bytes:
    if kind == STRING:
        content = b"".join(string(v) for v in values)
    else:
        content = struct.pack(f"<{len(values)}{CODES[kind]}", *values)
    return kv(key, ARRAY, struct.pack("<IQ", kind, len(values) if count is None else count) + content)


@dataclass
class Row:
    """A row of the tensor table; `dims` fastest first, as the file has them."""

    name: str | bytes
    dims: Sequence[int]
    kind: int = 0
    offset: int | None = None
    size: int = 0
    n_dims: int | None = None


@dataclass
class Gguf:
    values: Sequence[bytes] = (kv("general.architecture", STRING, "llama"),)
    rows: Sequence[Row] = field(default_factory=lambda: [Row("a", [8, 4], size=128), Row("b", [32], 8, size=34)])
    magic: bytes = b"GGUF"
    version: int = 3
    n_rows: int | None = None
    n_values: int | None = None
    alignment: int = 32
    tail: bytes = b""

    def header(self) -> bytes:
        n_rows = len(self.rows) if self.n_rows is None else self.n_rows
        n_values = len(self.values) if self.n_values is None else self.n_values
        head = self.magic + struct.pack("<IQQ", self.version, n_rows, n_values) + b"".join(self.values)
        offset = 0
        for row in self.rows:
            at = offset if row.offset is None else row.offset
            n_dims = len(row.dims) if row.n_dims is None else row.n_dims
            head += string(row.name) + struct.pack(f"<I{len(row.dims)}Q", n_dims, *row.dims)
            head += struct.pack("<IQ", row.kind, at)
            offset += row.size + -row.size % self.alignment
        return head

    def bytes(self) -> bytes:
        head = self.header()
        content = head + bytes(-len(head) % self.alignment)
        for i, row in enumerate(self.rows):
            content += bytes((i * 37 + j * 11) % 251 for j in range(row.size)) + bytes(-row.size % self.alignment)
        return content + self.tail


def safetensors(header: object, data: bytes = b"", *, length: int | None = None, raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(
    dtype: str = "F32", shape: Sequence[object] = (2, 2), offsets: Sequence[object] = (0, 16)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def folder(root: Path, files: dict[str, bytes | str | object]) -> Path:
    """A folder of files; values that are neither bytes nor text are written as JSON."""
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(**{k: v for k, v in globals().items() if not k.startswith("_")})
