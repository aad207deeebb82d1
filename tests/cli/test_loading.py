"""The bar that is shown while a model is read."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from thermocline.cli import loading


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_person_sees_how_much_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(loading, "PATIENCE", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bar = loading.ReadingBar()
    bar(500_000_000, 2_000_000_000)
    bar(1_000_000_000, 2_000_000_000)
    bar.close()
    assert "reading the model" in terminal.getvalue()
    assert "/2.0 GB" in terminal.getvalue()


def test_nothing_is_shown_for_what_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = loading.ReadingBar()
    bar(1, 2)
    bar(2, 2)
    bar.close()
    assert terminal.getvalue() == ""


def test_pipes_stay_quiet(command: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE", -1.0)
    assert not loading.ReadingBar().watched
    result = command("run", "-p", "def", "-n", "1")
    assert (result.code, result.err) == (0, "")  # type: ignore[attr-defined]
