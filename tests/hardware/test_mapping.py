"""Mapped files that become shorter while they are in use: an error where somebody looks, else words before the end."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from thermocline.errors import HardwareError
from thermocline.files.mapped import map_file
from thermocline.hardware.mapping import GONE, sheltered

PAGES = 8


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x01" * (PAGES * mmap.PAGESIZE - 100))
    return path


def test_what_is_gone_reads_as_zeros_and_is_an_error_from_then_on(file: Path) -> None:
    mapped = map_file(file)
    view = mapped.view(0, mapped.size)
    with sheltered([mapped.buffer]):
        assert int(view.sum()) == mapped.size
    os.truncate(file, 2 * mmap.PAGESIZE)
    with pytest.raises(HardwareError, match=GONE), sheltered([mapped.buffer]):
        assert int(view.sum()) == 2 * mmap.PAGESIZE
    assert int(view.sum()) == 2 * mmap.PAGESIZE
    with pytest.raises(HardwareError, match=file.name), sheltered([mapped.buffer]):
        pass


def test_an_error_that_comes_of_the_zeros_is_told_as_their_cause(file: Path) -> None:
    mapped = map_file(file)
    view = mapped.view(0, mapped.size)
    with pytest.raises(KeyError), sheltered([mapped.buffer]):
        raise KeyError
    os.truncate(file, mmap.PAGESIZE)
    with pytest.raises(HardwareError, match=GONE) as found, sheltered([mapped.buffer]):
        raise ValueError(f"the number is {view[-1]}")
    assert isinstance(found.value.__cause__, ValueError)
    with pytest.raises(KeyboardInterrupt), sheltered([mapped.buffer]):
        raise KeyboardInterrupt


def test_threads_that_miss_the_same_at_once_all_go_on(file: Path) -> None:
    mapped = map_file(file)
    sums: list[int] = []
    os.truncate(file, mmap.PAGESIZE)

    def read(page: int) -> None:
        sums.append(int(mapped.view(page * mmap.PAGESIZE, (page + 1) * mmap.PAGESIZE - 100).sum()))

    def read_all() -> None:
        threads = [threading.Thread(target=read, args=(1 + i % (PAGES - 1),)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with pytest.raises(HardwareError), sheltered([mapped.buffer]):
        read_all()
    assert sums == [0] * 32


def test_one_files_loss_is_not_anothers(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(file.read_bytes())
    broken, whole = map_file(file), map_file(other)
    os.truncate(file, mmap.PAGESIZE)
    with pytest.raises(HardwareError, match=file.name), sheltered([broken.buffer, whole.buffer]):
        assert (broken.view(0, broken.size)[-1], whole.view(0, whole.size)[-1]) == (0, 1)
    with sheltered([whole.buffer]):
        assert whole.view(0, whole.size)[-1] == 1


def test_mappings_that_are_gone_make_room_for_others(file: Path) -> None:
    numbers = set()
    for _ in range(2000):
        numbers.add(map_file(file).buffer.number)
    assert -1 not in numbers
    kept = [map_file(file) for _ in range(600)]  # more than are watched: the rest is as it always was
    assert {mapped.buffer.number for mapped in kept} > {-1}
    with sheltered([mapped.buffer for mapped in kept]):
        assert int(kept[-1].view(0, 10).sum()) == 10
    del kept
    assert map_file(file).buffer.number >= 0


DIES = """
import os, sys
from pathlib import Path
from thermocline.files.mapped import map_file
from thermocline.hardware.mapping import sheltered
path = Path(sys.argv[1])
mapped = map_file(path)
with sheltered([mapped.buffer]):
    pass
{before}
os.truncate(path, 4096)
{then}
"""


@pytest.mark.parametrize(
    ("options", "before", "then", "words"),
    [
        ([], "", "mapped.view(0, mapped.size).sum()", [GONE]),
        (["-X", "faulthandler"], "", "mapped.view(0, mapped.size).sum()", [GONE, "Fatal Python error: Bus error"]),
        ([], "", "import signal; os.kill(os.getpid(), signal.SIGBUS)", []),
    ],
    ids=["gone", "beside another handler", "sent"],
)
def test_where_nobody_looks_the_process_ends_and_says_why(
    file: Path, options: list[str], before: str, then: str, words: list[str]
) -> None:
    script = DIES.format(before=before, then=then)
    done = subprocess.run([sys.executable, *options, "-c", script, str(file)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert all(word in done.stderr for word in words)
    assert bool(words) == (file.name in done.stderr)


def test_memory_that_is_no_mapping_of_ours_is_left_alone(file: Path) -> None:
    script = """
import mmap, os, sys
from pathlib import Path
from thermocline.files.mapped import map_file
from thermocline.hardware.mapping import sheltered
ours = map_file(Path(sys.argv[1]))
with open(sys.argv[1] + ".other", "w+b") as other:
    other.write(bytes(8192)); other.flush()
    theirs = mmap.mmap(other.fileno(), 0)
    os.truncate(other.name, 0)
    with sheltered([ours.buffer]):
        theirs[5000]
"""
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert GONE not in done.stderr


def test_a_mapping_is_the_files_bytes(file: Path) -> None:
    mapped = map_file(file)
    assert np.array_equal(mapped.view(0, mapped.size), np.fromfile(file, np.uint8))
    assert mapped.buffer.path == file
