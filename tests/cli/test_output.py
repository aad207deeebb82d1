"""What reaches a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from thermocline.cli import output
from thermocline.errors import NumericalError, UsageError


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_pictures_of_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    terminal_utf8 = type("Utf8", (Terminal,), {"encoding": "utf-8"})()
    for screen, wanted in ((terminal_utf8, "a\u241b[2Jb\ufffd\n\tc→"), (terminal, "a?[2Jb?\n\tc?")):
        monkeypatch.setattr(sys, "stdout", screen)
        output._write("a\x1b[2Jb\x9b\n\tc→")
        assert screen.getvalue() == wanted


def test_a_pipe_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", pipe)
    output._write("a\x1b[2Jb→")
    assert pipe.buffer.getvalue() == "a\x1b[2Jb→".encode()


def test_status_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    for screen, always, wanted in (
        (io.StringIO(), False, ""),
        (io.StringIO(), True, "hello\n"),
        (Terminal(), False, f"{output.DIM}hello{output.PLAIN}\n"),
    ):
        monkeypatch.setattr(sys, "stderr", screen)
        output.status("hello", always=always)
        assert screen.getvalue() == wanted


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericalError("it is NaN"), 1),
        (UsageError("it is NaN"), 2),
        (OSError("it is NaN"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_was_noted_on_an_error_is_told(command, monkeypatch, error: BaseException, code: int) -> None:
    def fail(arguments: object) -> int:
        error.add_note("what was done is kept in x.work")
        raise error

    monkeypatch.setattr("thermocline.cli.main._dispatch", fail)
    monkeypatch.setattr("thermocline.cli.main._silence_stdout", lambda: None)
    done = command("profile")
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else "error: it is NaN"
    assert (done.code, done.err) == (code, f"{what}; what was done is kept in x.work\n")
