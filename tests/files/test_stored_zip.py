"""The archives that tensor files are: what is not stored as it is, or not where it is said to be."""

from __future__ import annotations

import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from thermocline.errors import ModelFormatError
from thermocline.files.torch_pickle import read_tensor_pt, write_tensor_pt

TENSOR = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    b"K\x04tQK\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR."
)

RUNAWAY = 30.0  # seconds of CPU: far above what a bounded reader takes on any machine
DATA = np.arange(4, dtype=np.float32).tobytes()


def archive(path: Path, *more: tuple[str, bytes]) -> bytes:
    """A sound archive of four floats, and further entries."""
    entries(("x/data.pkl", TENSOR), ("x/data/0", DATA), *more)(path)
    return path.read_bytes()


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("x/data.pkl", TENSOR)
        out.writestr("x/data/0", bytes(100 << 20))


def entries(*named: tuple[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as out:
            for name, content in named:
                out.writestr(name, content)

    return write


def patched(old: bytes, new: bytes, *, last: bool = True) -> Callable[[Path], None]:
    """A sound archive with one place changed, of that many the last (which is in the table) or the first."""

    def write(path: Path) -> None:
        content = archive(path)
        at = content.rfind(old) if last else content.find(old)
        assert at >= 0
        path.write_bytes(content[:at] + new + content[at + len(new) :])

    return write


def end_record(**fields: int) -> Callable[[Path], None]:
    names = ["disk", "disk_start", "here", "count", "size", "start", "comment"]

    def write(path: Path) -> None:
        content = archive(path)
        values = dict(zip(names, struct.unpack("<4H2IH", content[-18:]), strict=True)) | fields
        path.write_bytes(content[:-18] + struct.pack("<4H2IH", *(values[name] for name in names)))

    return write


def overlapping(path: Path) -> None:
    """A second entry that has the first one's bytes, as in bombs of overlapping files."""
    content = archive(path, ("x/more", bytes(16)))
    first, last = content.find(b"x/data/0") - 30, content.find(b"x/more") - 30
    path.write_bytes(content.replace(struct.pack("<I", last) + b"x/more", struct.pack("<I", first) + b"x/more"))


def twice(path: Path) -> None:
    path.write_bytes(archive(path, ("x/more/0", DATA)).replace(b"x/more/0", b"x/data/0"))


def legacy(path: Path) -> None:
    torch.save(torch.arange(3), path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    entries(("x/data.pkl", TENSOR), ("x/constants.pkl", b""), ("x/code/__torch__.py", b"import os"))(path)


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "legacy-pickle": (legacy, "PyTorch's legacy pickle format of before 1.6, which is never opened"),
    "legacy-tar": (lambda p: p.write_bytes(bytes(257) + b"ustar" + bytes(200)), "legacy tar format of before 0.1.10"),
    "plain-pickle": (lambda p: p.write_bytes(TENSOR), "it looks like a pickle, which is never opened"),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "it looks like a GGUF file"),
    "text": (lambda p: p.write_bytes(b"1, 2, 3\n"), "it looks like a text file"),
    "nothing": (lambda p: p.write_bytes(b""), "0 bytes; at least 4 needed"),
    "folder": (lambda p: p.mkdir(), "is a folder; a regular file is needed"),
    "missing": (lambda p: None, "does not exist"),
    "torch-script": (script, "is a TorchScript program, not tensors"),
    "big-endian": (
        entries(("x/data.pkl", TENSOR), ("x/data/0", DATA), ("x/byteorder", b"big")),
        "allowed: little",
    ),
    "no-entries": (lambda p: p.write_bytes(b"PK\3\4" + b"PK\5\6" + bytes(18)), "needs data.pkl in its one folder"),
    "no-pickle": (entries(("x/data/0", DATA)), "needs data.pkl in its one folder; it has x"),
    "no-folder": (entries(("data.pkl", TENSOR), ("data/0", DATA)), "needs data.pkl in its one folder"),
    "two-folders": (entries(("x/data.pkl", TENSOR), ("y/data/0", DATA)), "it has x, y"),
    "storage-missing": (entries(("x/data.pkl", TENSOR)), "there is no entry data/0"),
    "compressed": (compressed, "is compressed; entries must be stored as they are"),
    "encrypted": (patched(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "is encrypted"),
    "parent": (entries(("x/../../data.pkl", TENSOR)), "is not a plain name inside the archive"),
    "absolute": (entries(("/x/data.pkl", TENSOR)), "is not a plain name inside the archive"),
    "backslash": (patched(b"x/data/0", b"x\\data\\0"), "is not a plain name inside the archive"),
    "control-character": (patched(b"x/data/0", b"x/da\x1ba/0"), "is not a plain name inside the archive"),
    "name-not-utf-8": (patched(b"x/data/0", b"x/da\xffa/0"), "a name is not UTF-8"),
    "name-differs": (patched(b"x/data/0", b"x/data/1"), "has another name in its header"),
    "name-of-600-bytes": (entries(("x/" + "n" * 600, b"")), "a name of 602 bytes; allowed: 1 to 512"),
    "twice": (twice, "is given twice"),
    "overlapping": (overlapping, "has another name in its header"),
    "appended": (
        lambda p: p.write_bytes(archive(p) + b"#!/bin/sh"),
        "bytes follow its end record",
    ),
    "count-too-large": (end_record(here=3, count=3), "3 entries in 110 bytes at"),
    "table-elsewhere": (end_record(start=1), "has no entry here"),
    "count-too-small": (end_record(here=1, count=1), "1 entries end at"),
    "count-huge": (end_record(here=65535, count=65535), "65535 entries; allowed: at most 16384"),
    "split": (end_record(disk=1), "is a part of a split archive"),
    "table-outside": (end_record(start=1 << 31), "do not fit before"),
    "table-too-large": (end_record(size=1 << 31), "do not fit before"),
    "comment-longer": (end_record(comment=9), "bytes follow its end record"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_refused(name: str, tmp_path: Path) -> None:
    make, decisive = ARCHIVES[name]
    make(tmp_path / "a.pt")
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        read_tensor_pt(tmp_path / "a.pt")
    assert time.process_time() - start < RUNAWAY
    assert decisive in str(caught.value)
    assert str(caught.value).isprintable()


def test_entries_that_overlap_under_one_name_each(tmp_path: Path) -> None:
    """Two rows of the table for the same bytes, each with a header of its own name."""
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 24, 24, 3, 0) + b"x/a"
    inner = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 3, 0) + b"x/b"
    body = header + inner + bytes(24)
    rows = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, size, size, 3, 0, 0, 0, 0, 0, at) + name
        for name, size, at in ((b"x/a", len(inner) + 24, 0), (b"x/b", 24, len(header)))
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(rows), len(body), 0)
    (tmp_path / "a.pt").write_bytes(body + rows + end)
    with pytest.raises(ModelFormatError, match="overlaps the entry before it"):
        read_tensor_pt(tmp_path / "a.pt")


@pytest.mark.parametrize("writer", ["torch", "own"])
def test_truncated_at_every_byte(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    if writer == "torch":
        torch.save(torch.arange(3), path)
    else:
        write_tensor_pt(path, np.arange(3))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError):
            read_tensor_pt(path)


def test_sizes_of_zip64(tmp_path: Path) -> None:
    """Entries whose sizes are in the extra field, as archives beyond 4 GiB have them."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as out:
        for name, content in (("x/data.pkl", TENSOR), ("x/data/0", DATA)):
            with out.open(name, "w", force_zip64=True) as entry:
                entry.write(content)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as found:
        info = found.getinfo("x/data/0")
    row = content.rfind(b"PK\1\2")
    wide = struct.pack("<2H3Q", 1, 24, info.file_size, info.compress_size, info.header_offset)
    fields = list(struct.unpack_from("<4s6H3I5H2I", content, row))
    fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
    fields[11] = len(wide)
    table = content[:row] + struct.pack("<4s6H3I5H2I", *fields) + b"x/data/0" + wide
    end = list(struct.unpack("<4s4H2IH", content[-22:]))
    end[5] += len(wide)
    path.write_bytes(table + struct.pack("<4s4H2IH", *end))
    assert read_tensor_pt(path).tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    path.write_bytes(table.replace(wide, bytes(len(wide))) + struct.pack("<4s4H2IH", *end))
    with pytest.raises(ModelFormatError, match="has no ZIP64 sizes"):
        read_tensor_pt(path)


def test_archives_of_any_file_name_of_torchs(tmp_path: Path) -> None:
    """PyTorch names the folder inside after the file."""
    for name in ("a b.pt", "ü.pt", "a:b.pt", "x" * 200 + ".pt"):
        torch.save(torch.arange(3), tmp_path / name)
        assert read_tensor_pt(tmp_path / name).tolist() == [0, 1, 2]  # type: ignore[union-attr]
