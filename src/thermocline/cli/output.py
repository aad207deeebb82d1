"""What goes where: text and results to standard output, what is said about them to standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from thermocline.errors import WARNING, Terminated

if TYPE_CHECKING:
    from thermocline.api import LLM, RunReport, Stream

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(127, 160), 0xFFFD
)
"""Control characters to pictures of them: a terminal would obey what a model writes."""


class Written(NamedTuple):
    """A text that was written as it came, and whether Ctrl-C cut it short."""

    text: str
    interrupted: bool


def status(line: str, *, always: bool = False) -> None:
    """Say `line` on standard error if a person is reading it, or `always`."""
    if sys.stderr is None:
        return
    if sys.stderr.isatty():
        print(f"{DIM}{line}{PLAIN}", file=sys.stderr, flush=True)
    elif always:
        print(line, file=sys.stderr, flush=True)


def tell_notice(notice: str, *, always: bool = False) -> None:
    """Say what is odd; what was asked for and is not done, to everybody."""
    warning = notice.startswith(WARNING)
    status(notice if warning else f"note: {notice}", always=always or warning)


def notices(llm: LLM, *, always: bool = False) -> None:
    """Say what is odd about a model, or what was decided while it was loaded."""
    for notice in llm.notices:
        tell_notice(notice, always=always)
    if always and llm.plan is not None:
        from thermocline.cli.plan import plan_table  # the tables are slow to import, and seldom wanted
        from thermocline.cli.tables import print_tables

        print_tables(*(plan_table(table) for table in llm.plan_tables()), stderr=True)


def tell_report(report: RunReport, *, always: bool = False) -> None:
    """Say what a run did; where it was not what its plan predicted, to everybody."""
    for line in report.lines():
        status(line, always=always or line.startswith(WARNING))


def echo(prompt: str) -> None:
    """Show a prompt before its continuation, to a person only: standard output gets nothing but the new text."""
    if sys.stderr is not None and sys.stderr.isatty() and sys.stdout.isatty():
        sys.stderr.write(f"{DIM}{prompt.translate(CONTROLS)}{PLAIN}")
        sys.stderr.flush()


def write_stream(stream: Stream) -> Written:
    """Write the text of `stream` to standard output as it comes, and end the line. Ctrl-C stops it."""
    text, interrupted = "", False
    try:
        for item in stream:
            text += item.text
            _write(item.text)
    except Terminated:
        raise
    except KeyboardInterrupt:
        interrupted = True
    if not text.endswith("\n"):
        _write("\n")
    return Written(text, interrupted)


def write_json(record: object) -> None:
    """One JSON object on standard output."""
    _write(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """What JSON makes of our own types: numpy numbers, sets, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _write(text: str) -> None:
    if sys.stdout.isatty():
        text = text.translate(CONTROLS)
    # The terminal may know fewer characters than the model.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
