"""Parts of a benchmark in processes of their own: one that fails, hangs or spoils the device harms no other."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]
Part = Callable[[Results, Callable[[], None]], None]
"""Fills in results that hold those of earlier parts; what it is given besides tells of what is there so far."""
SECONDS_TO_EXIT = 10.0
"""That a process gets once its work is done."""


def failure(error: BaseException) -> str:
    """An error in one line."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def attempt(shown: Row, measure: Callable[..., Row], *arguments: Any) -> Row:
    """A row with what was measured, or with how that failed."""
    try:
        return shown | measure(*arguments)
    except Exception as error:  # compilers and drivers have classes of their own
        print(f"failed: {shown}: {failure(error)}", file=sys.stderr)
        return shown | {"failed": failure(error)}


def apart(name: str, part: Part, results: Results, seconds: float, keep: Callable[[], None]) -> str | None:
    """Run `part` for at most so many seconds; what it told of is in `results`, and `keep` was called each time.

    This process must not have used the device. Returns what went wrong, None if nothing did.
    """
    sys.stdout.flush()  # or the part prints it once more
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(part, results, theirs), name=name)
    process.start()
    theirs.close()
    deadline, trouble = time.monotonic() + seconds, None
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not ours.poll(left):
            trouble = f"not done after {seconds:.0f} s"
            process.kill()
            break
        try:
            told, error = ours.recv()
        except EOFError:
            break
        results.update(told)
        trouble = error or trouble
        keep()
    process.join(SECONDS_TO_EXIT)
    if process.is_alive():  # its work is done, and the next part is to find the device free
        process.kill()
        process.join(SECONDS_TO_EXIT)
    elif trouble is None and process.exitcode != 0:
        trouble = f"its process ended with {process.exitcode}"
    return None if trouble is None else f"{name}: {trouble}"


def _run(part: Part, results: Results, pipe: Connection) -> None:
    error = None
    try:
        part(results, lambda: pipe.send((results, None)))
    except Exception as raised:  # whatever it is, the other parts go on
        traceback.print_exc()
        error = failure(raised)
    pipe.send((results, error))
    pipe.close()
