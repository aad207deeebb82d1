"""Texts to profile and the pieces of a model that profiles them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from thermocline.activity.statistics import Activity

TEXTS = {
    "b/second.md": "# The second\n" + "pack my box with five dozen jugs\n" * 6,
    "a.py": "def first(n):\n    return n + 1\n" * 9,
    "b/third.txt": "ünïcode, the heathen\r\n\tand tabs",
    "empty.txt": "",
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of small texts, with files among them that are none, and hidden ones."""
    folder = tmp_path / "texts"
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (folder / "zeros.bin").write_bytes(b"abc\0def")
    (folder / ".hidden").write_text("not read")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("not read")
    return folder


def _same(first: Activity, second: Activity) -> bool:
    arrays = [
        [a.fired, a.contribution, a.sizes, a.token_overlap.shared, a.token_overlap.total, a.layer_overlap.shared,
         a.layer_overlap.total]
        for a in (first, second)
    ]  # fmt: skip
    numbers = [(a.model_fingerprint, a.tokens, a.sequences, a.threshold) for a in (first, second)]
    return numbers[0] == numbers[1] and all((x == y).all() for x, y in zip(*arrays, strict=True))


@pytest.fixture
def same() -> Callable[[Activity, Activity], bool]:
    """Whether two activities hold the same counts, bit for bit."""
    return _same
