"""Every error a user can cause, with the numbers and the remedy in its message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WARNING = "WARNING: "
"""Begins a notice that something was asked for and is not done; everybody is told, not only a person who looks."""


class ThermoclineError(Exception):
    """Base of all errors a user can cause. `exit_code` is what the command line returns."""

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """The system asked the program to end (SIGTERM). Nobody goes on after that, as one may after Ctrl-C."""


class UsageError(ThermoclineError):
    """A flag, an argument or a setting is wrong (exit code 2)."""

    exit_code = 2


class SamplingError(UsageError):
    """A sampling setting is out of its range or not finite."""


class ContextError(UsageError):
    """Prompt and answer do not fit the context. With `at_least`, more than `needed` may be needed."""

    def __init__(self, needed: int, available: int, remedy: str, *, at_least: bool = False) -> None:
        least = "at least " * at_least
        super().__init__(f"{least}{needed} tokens do not fit a context of {available}; {remedy}")
        self.needed = needed
        self.available = available


class ModelFormatError(ThermoclineError):
    """A file is not what it claims to be.

    `field` names what was wrong, `offset` the byte where it was found (None if it has no place).
    """

    def __init__(self, path: Path | str, field: str, problem: str, *, offset: int | None = None) -> None:
        where = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{printable(str(path))}: {field}{where}: {problem}")
        self.path = str(path)
        self.field = field
        self.offset = offset


class UnsupportedModelError(ThermoclineError):
    """The file is sound, but names a family, format, tokenizer or value that is not implemented."""


class TokenizerError(ThermoclineError):
    """The vocabulary or its merges are unusable."""


class ChatTemplateError(ThermoclineError):
    """The model's chat template is missing, too large, too slow or refused by the sandbox."""


class HardwareError(ThermoclineError):
    """The machine lacks what was asked for."""


class HangError(HardwareError):
    """A device does not come to an end: whatever else it is given would be waited for without one."""


class MissingPackageError(ThermoclineError):
    """What was asked for needs a package that is not installed; `extra` is the extra of this one that brings it."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed or does not load; pip install 'thermocline[{extra}]'"
        )
        self.extra = extra


class BudgetError(ThermoclineError):
    """What was asked for does not fit a memory budget.

    `tier` is the memory, `missing` the bytes it lacks, `table` the itemised account (one line a row), and
    `remedy` the nearest setting that fits.
    """

    def __init__(self, tier: str, missing: int, remedy: str, table: str = "") -> None:
        account = f"\n{table}" if table else ""
        size = f" ({missing / 2**30:.2f} GiB)" if missing >= 2**30 else f" ({missing / 2**20:.2f} MiB)"
        super().__init__(f"{tier} lacks {missing:,} bytes{size if missing >= 2**20 else ''}: {remedy}{account}")
        self.tier = tier
        self.missing = missing
        self.remedy = remedy
        self.table = table


class AllocationError(ThermoclineError):
    """A memory refused what its budget allows: something else has taken it."""

    def __init__(self, tier: str, nbytes: int, purpose: str, table: str = "") -> None:
        account = f"\n{table}" if table else ""
        super().__init__(
            f"{tier} refused {nbytes:,} bytes for {purpose}, though its budget has room: something else uses this "
            f"memory; free some, or lower --{tier}-budget{account}"
        )
        self.tier = tier
        self.nbytes = nbytes


class PlanError(ThermoclineError):
    """A plan is damaged, impossible, or belongs to something else. `field` names what was wrong."""

    def __init__(self, source: Path | str, field: str, problem: str) -> None:
        super().__init__(f"{printable(str(source))}: {field}: {problem}; make a new plan with `thermocline plan`")
        self.source = str(source)
        self.field = field


class FingerprintError(ThermoclineError):
    """A file belongs to another model than the one it was given for."""

    def __init__(self, path: Path | str, belongs: str, given: str, remedy: str) -> None:
        models = f"the model {printable(belongs, 60)}, not to {printable(given, 60)}"
        super().__init__(f"{printable(str(path))}: belongs to {models}; {remedy}")
        self.path = str(path)


class NumericalError(ThermoclineError):
    """Logits or weights are not finite."""


class OutputError(ThermoclineError):
    """A file could not be written; the old one, if any, is untouched."""


def printable(text: str, limit: int = 200) -> str:
    """`text` safe for one line of a terminal: control characters escaped, cut at `limit`."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def skipped_words(skipped: Sequence[Path | str], shown: int = 3) -> str:
    """What to say of files that were skipped; empty if none was."""
    if not skipped:
        return ""
    names = ", ".join(printable(Path(path).name, 60) for path in skipped[:shown])
    more = f" and {len(skipped) - shown} more" if len(skipped) > shown else ""
    files = "1 file was" if len(skipped) == 1 else f"{len(skipped):,} files were"
    return f"{files} skipped, being no UTF-8 text or none that the vocabulary spells: {names}{more}"
