"""Conversions that were stopped: what a second start need not make again, and when it is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from thermocline import convert, quantize
from thermocline.errors import ModelFormatError, NumericalError, OutputError, UsageError
from thermocline.files import resumable
from thermocline.files.gguf import GgufFile
from thermocline.files.pace import Pace

FOLDER = "out.gguf.work"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is noted when it is complete."""
    monkeypatch.setattr(resumable, "SAVE_SECONDS", 0.0)


def whole(model: Path) -> bytes:
    convert(model, model.with_name("whole.gguf"), outtype="f16")
    return model.with_name("whole.gguf").read_bytes()


def stopping(after: int, seen: list[str], error: BaseException | None = None) -> Callable[..., None]:
    """A listener that stops a run when the turn of tensor `after` comes."""

    def tell(done: int, total: int, name: str) -> None:
        if len(seen) == after:
            raise error or KeyboardInterrupt
        seen.append(name)

    return tell


@pytest.mark.parametrize("after", [1, 2, 9, 17])
def test_a_second_start_makes_only_what_is_missing(model: Path, at_once: None, after: int) -> None:
    wanted, out = whole(model), model.with_name("out.gguf")
    first: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, outtype="f16", progress=stopping(after, first))
    assert not out.exists()
    second: list[tuple[int, str]] = []
    done = convert(model, out, outtype="f16", progress=lambda done, total, name: second.append((done, name)))
    tensors = list(GgufFile.open(out).tensors.values())
    assert [*first, *(name for _, name in second)] == [t.name for t in tensors]
    assert second[0][0] == sum(len(t.data) for t in tensors[:after])
    assert out.read_bytes() == wanted
    assert not out.with_name(FOLDER).exists()
    # What the tensors lost is told of those of the first start too.
    assert done.rounded == convert(model, out, outtype="f16", force=True).rounded


def test_a_run_that_is_killed_early_was_noted_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 1, 3, 7 and 15 seconds, and so on."""
    now, noted, state = 0.0, [], model.with_name(FOLDER) / "parts.json"
    monkeypatch.setattr(resumable, "Pace", lambda most, **more: Pace(most, lambda: now, **more))

    def tell(done: int, total: int, name: str) -> None:
        nonlocal now
        noted.append(json.loads(state.read_text())["parts"] if state.exists() else 0)
        now += 1

    convert(model, model.with_name("out.gguf"), outtype="f16", progress=tell)
    assert noted[:18] == [0, 2, 2, *[4] * 4, *[8] * 8, *[16] * 3]  # the header is a part too


def test_an_old_file_stays_until_the_new_one_is_whole(model: Path, at_once: None) -> None:
    out = model.with_name("out.gguf")
    out.write_text("old")
    out.chmod(0o640)
    for after in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            convert(model, out, outtype="q8_0", force=True, progress=stopping(after, []))
        assert out.read_text() == "old"
    convert(model, out, outtype="q8_0", force=True)
    assert GgufFile.open(out).tensors
    assert out.stat().st_mode & 0o777 == 0o640


KILLED = """
import sys, time
from thermocline import convert
from thermocline.files import resumable
resumable.SAVE_SECONDS = 0.0
def tell(done, total, name):
    print(name, flush=True)
    time.sleep(0.02)
convert(sys.argv[1], sys.argv[2], outtype="f16", progress=tell)
"""


def test_kill_minus_nine_in_a_loop(model: Path) -> None:
    """Killed at any moment, again and again: no file until it is whole, and every start begins later than the last."""
    wanted, out = whole(model), model.with_name("out.gguf")
    names, begun = [t.name for t in GgufFile.open(model.with_name("whole.gguf")).tensors.values()], []
    for _ in range(60):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(model), str(out)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        told = [child.stdout.readline().decode().strip() for _ in range(4)]
        child.kill()
        child.communicate()
        if told[0]:
            begun.append(names.index(told[0]))
        if child.returncode == 0 or out.exists():
            break
    assert out.read_bytes() == wanted
    assert len(begun) >= 4
    assert begun[0] == 0
    assert all(before < after for before, after in pairwise(begun))
    convert(model, out, outtype="f16", force=True)
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.gguf", "out.gguf", "whole.gguf"]


def test_a_full_disk_is_gone_on_from(model: Path, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out, real, writes = whole(model), model.with_name("out.gguf"), os.write, []

    def full(descriptor: int, data: Any) -> int:
        writes.append(1)
        if len(writes) == 30:
            return real(descriptor, data[: len(data) // 2])  # a part of it still fits
        if len(writes) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr("thermocline.files.atomic.os.write", full)
        with pytest.raises(OutputError, match=r"No space left on device; what was done is kept in .*out\.gguf\.work"):
            convert(model, out, outtype="f16")
    assert not out.exists()
    seen: list[str] = []
    convert(model, out, outtype="f16", progress=lambda done, total, name: seen.append(name))
    assert 0 < len(seen) < len(GgufFile.open(out).tensors)
    assert out.read_bytes() == wanted


def test_space_is_asked_for_what_is_missing_only(model: Path, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model.with_name("out.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, outtype="f32", progress=stopping(15, []))
    convert(model, model.with_name("whole.gguf"), outtype="f32")
    made, size = (out.with_name(FOLDER) / "file").stat().st_size, model.with_name("whole.gguf").stat().st_size
    disk = os.statvfs(model.parent)
    free = (size - made) // disk.f_frsize + 8
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*disk[:3], free, free, *disk[5:])))
    convert(model, out, outtype="f32")
    with pytest.raises(OutputError, match="are free on its disk"):
        convert(model, model.with_name("other.gguf"), outtype="f32")


def test_an_unfinished_run_of_another_kind_is_refused_and_can_be_forgotten(model: Path, at_once: None) -> None:
    out = model.with_name("out.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, outtype="f16", progress=stopping(5, []))
    with pytest.raises(UsageError, match=r"unfinished run with other inputs or settings .* --restart"):
        convert(model, out, outtype="f32")
    with pytest.raises(UsageError, match="--restart"):
        quantize(model, out, "Q4_0")
    quantize(model, out, "Q4_0", restart=True)
    assert out.exists()
    assert not out.with_name(FOLDER).exists()


def test_another_model_under_the_same_name_is_not_gone_on_with(model: Path, at_once: None) -> None:
    """Equal headers, other weights: the second start would mix two models."""
    out = model.with_name("out.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, outtype="f16", progress=stopping(5, []))
    content = bytearray(model.read_bytes())
    content[-20] ^= 1  # the last bytes fill the file up
    model.write_bytes(content)
    with pytest.raises(UsageError, match="--restart"):
        convert(model, out, outtype="f16")


def test_what_would_fail_alike_is_not_kept(model: Path, at_once: None) -> None:
    with pytest.raises(NumericalError):
        convert(model, model.with_name("out.gguf"), outtype="f16", progress=stopping(5, [], NumericalError("NaN")))
    assert [p.name for p in model.parent.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    "state", ["{", '{"parts": 5}', '{"parts": -1, "bytes": 0, "told": []}', '{"parts": 2, "bytes": 1e18, "told": []}',
              '{"parts": 2, "bytes": 64, "told": [{"x": 1}]}']
)  # fmt: skip
def test_a_damaged_note_is_refused_and_can_be_forgotten(model: Path, at_once: None, state: str) -> None:
    out = model.with_name("out.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, outtype="f16", progress=stopping(5, []))
    (out.with_name(FOLDER) / "parts.json").write_text(state)
    with pytest.raises(ModelFormatError):
        convert(model, out, outtype="f16")
    convert(model, out, outtype="f16", restart=True)
    assert out.read_bytes() == whole(model)


def test_two_runs_at_once_are_refused(model: Path, at_once: None) -> None:
    out, refused = model.with_name("out.gguf"), []

    def again(done: int, total: int, name: str) -> None:
        if not refused:
            with pytest.raises(UsageError, match="another run is at work"):
                convert(model, out, outtype="f16")
            refused.append(name)

    convert(model, out, outtype="f16", progress=again)
    assert refused
    assert out.read_bytes() == whole(model)
