"""Which texts are read, and how they are cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from thermocline.activity import texts as module
from thermocline.activity.texts import RefusedTextError, find_texts, is_text, windows
from thermocline.errors import UsageError


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def test_folders_are_read_by_name_and_nothing_twice(texts: Path) -> None:
    corpus = find_texts([texts / "b" / "third.txt", texts])
    names = [str(file.path.relative_to(texts)) for file in corpus.files]
    assert names == ["b/third.txt", "a.py", "b/second.md", "empty.txt", "picture.png", "zeros.bin"]
    assert corpus.nbytes == sum((texts / name).stat().st_size for name in names)
    assert [is_text(file) for file in corpus.files] == [True, True, True, True, False, False]


def test_the_digest_changes_with_a_file(texts: Path) -> None:
    before = find_texts([texts]).digest
    assert find_texts([texts]).digest == before
    os.utime(texts / "a.py", ns=(1, 1))
    touched = find_texts([texts]).digest
    (texts / "new.txt").write_text("x")
    assert len({before, touched, find_texts([texts]).digest}) == 3


def test_a_loop_of_links_ends(texts: Path) -> None:
    (texts / "loop").symlink_to(texts)
    (texts / "dangling").symlink_to(texts / "nowhere")
    assert len(find_texts([texts]).files) == 6


@pytest.mark.parametrize("length", [3, 7, 64, 1000])
def test_windows_join_to_the_document(texts: Path, length: int) -> None:
    file = find_texts([texts / "b" / "second.md"]).files[0]
    found = list(windows(file, tokenize, (7, 8), length))
    assert all(window.tokens[:2] == (7, 8) and len(window.tokens) <= length for window in found)
    assert all(len(window.tokens) == length for window in found[:-1])
    joined = [token for window in found for token in window.tokens[2:]]
    assert joined == list((texts / "b" / "second.md").read_bytes())
    assert found[-1].nbytes == file.size
    assert [w.nbytes for w in found] == sorted(w.nbytes for w in found)


def test_a_long_document_is_cut_after_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 10)
    path = tmp_path / "long.txt"
    path.write_bytes("\ufeffone two\nthree four\r\nfive\nsixsevenéightnineteneleven".encode())
    pieces: list[str] = []

    def record(text: str) -> list[int]:
        pieces.append(text)
        return tokenize(text)

    list(windows(find_texts([path]).files[0], record, (), 4))
    assert pieces[0] == "one two\nthree four\r\n"
    assert "".join(pieces) == path.read_bytes().decode("utf-8-sig")
    assert max(map(len, pieces)) <= 20


def test_an_undecodable_end_is_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "late.txt").write_bytes(b"fine\n" * 1000 + b"\xff")
    assert not is_text(find_texts([tmp_path]).files[0])


def test_a_text_that_the_tokenizer_refuses(texts: Path) -> None:
    def refuse(text: str) -> list[int]:
        raise UsageError("the text has a byte that this vocabulary cannot spell")

    with pytest.raises(RefusedTextError, match="cannot spell"):
        list(windows(find_texts([texts / "a.py"]).files[0], refuse, (), 10))


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to read"):
        find_texts([])
    with pytest.raises(UsageError, match="no text to read"):
        find_texts([tmp_path])
    with pytest.raises(UsageError, match=r"nowhere cannot be read: No such file"):
        find_texts([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="cannot be read"):
        find_texts(["a\0b"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        find_texts([tmp_path / "pipe"])
    (tmp_path / "x").write_text("x")
    with pytest.raises(UsageError, match="holds nothing"):
        list(windows(find_texts([tmp_path / "x"]).files[0], tokenize, (1, 2), 2))


def test_an_order_of_chance_is_the_same_wherever_the_files_lie(tmp_path: Path) -> None:
    orders = []
    for folder in ("a", "z"):
        (tmp_path / folder).mkdir()
        for i in range(20):
            (tmp_path / folder / f"{i:02}.txt").write_text("x" * (i % 5 + 1))
        orders.append([file.path.name for file in find_texts([tmp_path / folder]).shuffled().files])
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == [f"{i:02}.txt" for i in range(20)]
