"""llama.cpp as the peer that results are compared with, in a process of its own.

Its environment is separate, and only benchmarks want it:

    python -m venv llama && llama/bin/pip install llama-cpp-python
    python -m benchmarks.side_by_side --llama-python llama/bin/python ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

WORKER = Path(__file__).with_name("peer_worker.py")


class PeerError(Exception):
    """The peer cannot be started, or could not do what it was asked."""


class Peer:
    """A worker that runs llama.cpp; ends with the block it is used in.

    Raises:
        PeerError: the interpreter lacks llama-cpp-python, or a request failed.
    """

    def __init__(self, python: str) -> None:
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen([python, str(WORKER)], stdin=pipe, stdout=pipe, text=True)
        except OSError as error:
            raise PeerError(
                f"{python} cannot be started: {error.strerror}; name another with --llama-python"
            ) from error
        try:
            self.about: dict[str, Any] = self.ask("hello")
        except PeerError as error:
            raise PeerError(
                f"{error}; install it into an environment and name its interpreter with --llama-python"
            ) from error

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send one request and wait for the answer."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended is more telling
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the peer ended during {do!r} with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def seconds(self, do: str, **arguments: object) -> float:
        """What a request took, as the worker measured it."""
        return float(self.ask(do, **arguments)["seconds"])

    def logits(self, path: Path, windows: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Logits (tokens, vocabulary) of windows of equal length, by one thread."""
        size = len(windows[0])
        self.ask("load", path=str(path), n_ctx=size, threads=1, batch=size, logits_all=True)
        results = []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "logits.npy"
            for window in windows:
                self.ask("logits", tokens=list(window), output=str(file))
                results.append(np.load(file))
        return results

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the flag that names the peer's interpreter."""
    parser.add_argument(
        "--llama-python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter of an environment with llama-cpp-python",
    )
