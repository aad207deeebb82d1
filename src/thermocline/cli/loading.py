"""Loading a model, with a bar for a person who has to wait while it is read from a disk."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import thermocline
from thermocline.config import LoadSettings

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 0.3
"""Seconds before the bar appears: what lies in the page cache is there sooner."""


def load(model: str | None, settings: LoadSettings) -> thermocline.LLM:
    """`LLM.load`, with the progress on standard error if a person is reading it."""
    bar = ReadingBar()
    try:
        return thermocline.LLM.load(model, settings, progress=bar if bar.watched else None)
    finally:
        bar.close()


class ReadingBar:
    """Bytes read, of how many, and the rate."""

    def __init__(self) -> None:
        self.watched = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() - self._began < PATIENCE or done == total:
                return
            self._bar = _bar(total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _bar(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("reading the model"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.add_task("", total=total)
    bar.start()
    return bar
