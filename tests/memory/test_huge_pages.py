"""Weights copied to memory of the process's own, in the place of their mapped file."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import thermocline
from thermocline.errors import HardwareError
from thermocline.files.mapped import MappedFile, map_file
from thermocline.memory import huge_pages
from thermocline.memory.huge_pages import HUGE_PAGE, PIECE

SIZE = PIECE + 5 * HUGE_PAGE + 4097
EDGES = 2 * HUGE_PAGE
"""What may stay the file's: less than a huge page at its beginning and at its end."""


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def mapped(tmp_path: Path, content: bytes) -> MappedFile:
    path = tmp_path / "model"
    path.write_bytes(content)
    return map_file(path)


def of_the_file(path: Path) -> int:
    """Bytes of this process's address space that are `path`."""
    maps = [line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [words[0].split("-") for words in maps if words[5:] and words[5].startswith(str(path))]
    return sum(int(stop, 16) - int(start, 16) for start, stop in ends)


def test_a_copy_takes_the_place_of_the_file(mapped: MappedFile, content: bytes) -> None:
    view, told = mapped.view(100, SIZE), list[tuple[int, int]]()
    assert of_the_file(mapped.path) >= SIZE
    copied = huge_pages.copy([view], lambda done, total: told.append((done, total)))
    assert copied > SIZE - EDGES
    assert of_the_file(mapped.path) < EDGES
    assert view.tobytes() == content[100:]
    assert told[-1] == (copied, copied)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_only_what_is_needed_is_copied(mapped: MappedFile, content: bytes) -> None:
    """Two views that share a huge page, and nothing of what follows them."""
    views = [mapped.view(2 * HUGE_PAGE, 3 * HUGE_PAGE + 5), mapped.view(3 * HUGE_PAGE + 5, 4 * HUGE_PAGE)]
    copied = huge_pages.copy([*views, np.zeros(HUGE_PAGE, np.uint8)])
    assert 2 * HUGE_PAGE <= copied <= 3 * HUGE_PAGE
    assert SIZE - copied <= of_the_file(mapped.path) < SIZE - copied + 8192
    assert mapped.view(0, SIZE).tobytes() == content


def test_under_a_budget_nothing_else_is_copied(mapped: MappedFile, content: bytes) -> None:
    """Two neighbours with some padding between them, and one far from both that fills no page."""
    views = [mapped.view(5000, 3 * HUGE_PAGE), mapped.view(3 * HUGE_PAGE + 32, 5 * HUGE_PAGE)]
    copied = huge_pages.copy([*views, mapped.view(12 * HUGE_PAGE, 12 * HUGE_PAGE + 4096)], budgeted=True)
    assert copied in (3 * HUGE_PAGE, 4 * HUGE_PAGE)
    assert mapped.view(0, SIZE).tobytes() == content


def test_the_copy_does_not_need_the_file(mapped: MappedFile, content: bytes) -> None:
    view = mapped.view(2 * HUGE_PAGE, SIZE - 2 * HUGE_PAGE)
    huge_pages.copy([view])
    os.truncate(mapped.path, 0)
    assert view.tobytes() == content[2 * HUGE_PAGE : SIZE - 2 * HUGE_PAGE]


def test_it_pays_for_small_pages_with_room(mapped: MappedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    view, room = mapped.view(0, SIZE), {"available": 3 * SIZE, "usable": 4 * SIZE, "huge_pages": "madvise"}

    def pays(
        aside: int = 0, huge: int = 0, own: int = 0, *, guest: bool = False, budgeted: bool = False, **other: object
    ) -> bool:
        pages = {"AnonHugePages:": own, "FilePmdMapped:": huge}
        monkeypatch.setattr(huge_pages, "find_memory", lambda: SimpleNamespace(**room | other))
        monkeypatch.setattr(huge_pages, "is_guest", lambda: guest)
        monkeypatch.setattr(huge_pages, "_huge_and_held", lambda _, kinds: (sum(map(pages.get, kinds)), SIZE))
        return huge_pages.pays([view], aside, budgeted=budgeted)

    assert pays()
    assert not pays(aside=SIZE + (1 << 20))
    assert not pays(available=2 * SIZE - EDGES - 1)
    assert not pays(usable=2 * SIZE - EDGES - 1)
    assert pays(available=2 * SIZE - EDGES - 1, budgeted=True)
    assert not pays(available=SIZE - EDGES - HUGE_PAGE, budgeted=True)
    assert not pays(huge_pages="never")
    assert not huge_pages.pays([np.zeros(HUGE_PAGE, np.uint8)])
    assert not pays(huge=4 * SIZE // 5)
    assert pays(huge=4 * SIZE // 5, guest=True)  # the system below has small ones for a file's
    assert not pays(own=4 * SIZE // 5, guest=True)


def test_pages_are_counted_as_the_system_tells_them(tmp_path: Path) -> None:
    maps = tmp_path / "smaps"
    maps.write_text(
        "1000-3000 r--s 00000000 fe:00 7 /model\nRss:  8 kB\nAnonHugePages:  0 kB\nFilePmdMapped:  2 kB\n"
        "3000-5000 r--p 00000000 00:00 0\nRss:  8 kB\nAnonHugePages:  6 kB\nFilePmdMapped:  0 kB\n"
        "5000-6000 r--p 00000000 00:00 0\nRss:  4 kB\nAnonHugePages:  4 kB\n"
    )
    both = "AnonHugePages:", "FilePmdMapped:"
    assert huge_pages._huge_and_held([(0x2000, 0x4000)], both, maps) == (8 << 10, 16 << 10)
    assert huge_pages._huge_and_held([(0x2000, 0x4000)], both[:1], maps) == (6 << 10, 16 << 10)
    assert huge_pages._huge_and_held([(0x5000, 0x6000)], both, maps) == (4 << 10, 4 << 10)
    assert huge_pages._huge_and_held([(0x5000, 0x6000)], both, tmp_path / "none") == (0, 0)


def test_without_room_nothing_changes(mapped: MappedFile, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "find_memory", lambda: SimpleNamespace(available=SIZE // 2, usable=SIZE))
    with pytest.raises(HardwareError, match=r"0\.04 GiB of weights cannot be copied: 0\.02 GiB .* leave out --no-mmap"):
        huge_pages.copy([mapped.view(0, SIZE)])
    assert of_the_file(mapped.path) >= SIZE
    assert mapped.view(0, SIZE).tobytes() == content


def test_memory_that_the_system_refuses_leaves_the_file(
    mapped: MappedFile, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = SimpleNamespace(mmap=lambda *_: huge_pages.FAILED)
    monkeypatch.setattr(huge_pages, "c_library", lambda: refusing)
    assert huge_pages.copy([mapped.view(0, SIZE)]) == 0
    assert mapped.view(0, SIZE).tobytes() == content


def test_addresses_are_free_again_when_the_mapping_ends(tmp_path: Path, content: bytes) -> None:
    """Ranges of anonymous memory among them: 50 copies would else stay."""
    path = tmp_path / "model"
    path.write_bytes(content)

    def used() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    huge_pages.copy([map_file(path).view(0, SIZE)])
    before = used()
    for _ in range(50):
        huge_pages.copy([map_file(path).view(0, SIZE)])
    assert used() - before < 10 * SIZE


@pytest.mark.parametrize("settings", [{}, {"ram_budget": "1GiB"}])
def test_tokens_are_those_of_the_mapped_file(settings: dict[str, str]) -> None:
    answers = []
    for mmap in (True, False):
        with thermocline.LLM.load(mmap=mmap, ctx_size=256, threads=1, **settings) as llm:
            report = llm._loaded.report
            answers.append(llm.generate("The", max_tokens=12, temperature=0).text)
            assert (report.own_bytes > report.mapped_bytes / 2) is not mmap
    assert answers[0] == answers[1]
