"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from thermocline.errors import OutputError, UsageError
from thermocline.files.atomic import atomic_folder, atomic_write, begins, require_kind


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_nothing_is_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_write(path) as file:
        assert file.write(b"abc") == 3
        assert file.write(np.arange(3, dtype=np.uint8)) == 3
        assert file.write(np.zeros(0, np.uint8)) == 0
        assert file.write(memoryview(b"xy")) == 2
        assert file.tell() == 8
        file.flush()
        assert not path.exists()
        assert len(names(tmp_path)) == 1
    assert path.read_bytes() == b"abc\0\1\2xy"
    assert names(tmp_path) == ["out"]


def test_a_new_file_has_the_permissions_that_the_mask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "out") as file:
            file.write(b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_replaced_and_what_it_names_is_untouched(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "real").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()


def test_only_its_own_kind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page"

    def require() -> None:
        require_kind(path, "page", lambda file: begins(file, b"<!doctype html>"), "--page")

    require()  # there is none yet
    for content in (b"", b"<!DOCTYPE HTML><p>"):
        path.write_bytes(content)
        require()
    for content in (b"GGUF", b"<!doctype"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="page is there and is no page: name another file with --page, or remove"):
            require()


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_without_a_name_is_not_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is there already"), atomic_folder(name):
        pytest.fail("was made")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_files_are_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    expected = "is a folder" if kind == "folder" else "is not a regular file"
    with pytest.raises(OutputError, match=expected), atomic_write(path):
        pytest.fail("was opened")
    assert names(tmp_path) == ["odd"]


def test_an_exception_of_the_caller_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "out") as file:
        file.write(bytes([1 // (file.write(b"half") - 4)]))
    assert names(tmp_path) == []


def test_leavings_of_the_dead_are_removed_and_those_of_the_living_and_of_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (tmp_path / ".out.0123456789ab.partial").write_bytes(b"left by a killed writer")
    (tmp_path / ".other.0123456789ab.partial").write_bytes(b"left by another")
    with atomic_write(path) as living:
        living.write(b"first")
        with atomic_write(path) as file:
            file.write(b"second")
        assert path.read_bytes() == b"second"
        assert len(names(tmp_path)) == 3
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == [".other.0123456789ab.partial", "out"]


def test_many_writers_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "out"
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                with atomic_write(path) as file:
                    file.write(bytes([number]) * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    content = path.read_bytes()
    assert len(content) == 1000
    assert len(set(content)) == 1
    assert names(tmp_path) == ["out"]


# Folders


def test_a_folder_is_not_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_folder(path) as folder:
        assert folder.parent == tmp_path
        with atomic_write(folder / "a") as file:
            file.write(b"abc")
        assert not path.exists()
    assert names(path) == ["a"]
    assert names(tmp_path) == ["out"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_bytes(b"abc")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert names(tmp_path) == []


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    """Two writers of one name: the first to end wins, the other is told."""
    path = tmp_path / "out"

    def later() -> None:
        with atomic_folder(path) as outer:
            (outer / "outer").write_bytes(b"")
            with atomic_folder(path) as inner:
                (inner / "inner").write_bytes(b"")
            assert outer.exists()

    with pytest.raises(OutputError, match="out: cannot be written: Directory not empty"):
        later()
    assert names(path) == ["inner"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "full", "link", "dangling", "orphan"])
def test_what_is_no_place_for_a_folder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    match kind:
        case "file":
            path.write_bytes(b"")
        case "full":
            path.mkdir()
            (path / "a").write_bytes(b"")
        case "link":
            path.symlink_to(tmp_path)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case "orphan":
            path = tmp_path / "no" / "out"
    before = names(tmp_path)
    with pytest.raises(OutputError, match="No such file" if kind == "orphan" else "is there already: remove it"):
        atomic_folder(path).__enter__()
    assert names(tmp_path) == before


def test_leavings_of_folders_and_files_of_the_same_name_go(tmp_path: Path) -> None:
    (tmp_path / ".out.0123456789ab.partial").mkdir()
    (tmp_path / ".out.0123456789ab.partial" / "a").write_bytes(b"half")
    (tmp_path / ".out.ba9876543210.partial").write_bytes(b"half")
    (tmp_path / ".other.0123456789ab.partial").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".other.0123456789ab.partial", "out"]


def test_an_error_in_a_folder_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as told, atomic_folder(tmp_path / "out") as folder:
        atomic_write(folder / "a", size=1 << 60).__enter__()
    assert str(told.value).startswith(f"{tmp_path}/out/a: needs 1,152,921,504,606,846,976 bytes, ")
    assert names(tmp_path) == []
