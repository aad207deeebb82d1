"""Profiling: run texts through a model and count which neurons fire.

The run is a list of windows, each a sequence of its own. Between two of them everything that is known fits in one
file, the journal, so that a run that was killed goes on from there and ends with the same numbers, bit for bit.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.activity.accumulator import Accumulator
from thermocline.activity.statistics import Activity, Floats
from thermocline.activity.store import MAX_THRESHOLD, activity_of, load_activity, save_activity
from thermocline.activity.texts import Corpus, Reading, Tokenize
from thermocline.errors import FingerprintError, ModelFormatError, OutputError, UsageError, printable, skipped_words
from thermocline.files.atomic import existing_mode, require_kind
from thermocline.files.pace import Pace
from thermocline.files.sidecar import SidecarKind, is_sidecar, named, read_sidecar
from thermocline.model.observers import Observer
from thermocline.ops.contract import Array

JOURNAL_SECONDS: Final = 20.0
"""How much work a killed run loses at most, beside the window it was in; one that has just begun loses less."""


class Existing(StrEnum):
    """What to do with an activity that is there already."""

    REFUSE = "refuse"
    MERGE = "merge"
    OVERWRITE = "overwrite"


class Runner(Protocol):
    """A model that can be watched."""

    @property
    def window(self) -> int:
        """Most tokens of a sequence."""

    @property
    def batch(self) -> int:
        """Most tokens of a step."""

    def run(self, tokens: npt.NDArray[np.int32], observer: Observer) -> None:
        """Run `tokens` (1 to `window`) through prefill as a sequence of their own."""

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """An observed array as numpy's."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model that is profiled: whose statistics these are, and what runs it. `down_norms` is (n_layer, n_ff)."""

    fingerprint: str
    name: str
    down_norms: Floats
    tokenize: Tokenize
    prefix: tuple[int, ...]
    runner: Runner


class Progress(NamedTuple):
    """How far a run is: `share` of the work (0 to 1), tokens done, and seconds of this start."""

    share: float
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a run gave. `resumed` tokens were counted by an earlier, interrupted start."""

    activity: Activity
    tokens: int
    resumed: int
    files: int
    skipped: tuple[Path, ...]
    seconds: float


@dataclass(slots=True)
class _Run:
    """One run: where it stands. `position` counts its windows."""

    identity: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    position: int = 0
    tokens: int = 0
    sequences: int = 0

    def record(self, **more: Any) -> dict[str, Any]:
        """What the activity keeps of it."""
        return {"id": self.id, "tokens": self.tokens, "sequences": self.sequences, **self.identity, **more}


class _Counted:
    """What a run counted up to the end of a window, and the journal that keeps it."""

    def __init__(self, journal: Path, run: _Run, activity: Activity) -> None:
        self._journal, self._run = journal, run
        self.grow(activity)

    def grow(self, activity: Activity) -> None:
        """Another window was counted."""
        state = {"id": self._run.id, "identity": self._run.identity, "position": self._run.position}
        self._last = activity, state  # both at once: an interrupt comes at any moment

    def save(self) -> None:
        """Write the journal.

        Raises:
            OutputError: it could not be written.
        """
        activity, state = self._last
        try:
            save_activity(activity, self._journal, kind=SidecarKind.JOURNAL, more={"run": state})
        except OutputError as error:
            more = f"; {_goes_on(self._journal)}" if self._journal.exists() else ""
            raise OutputError(f"the journal of this run: {error}{more}") from error

    @contextmanager
    def saved_at_interrupt(self) -> Iterator[None]:
        """Write the journal where the block is interrupted, and note that on the interrupt."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            with suppress(OutputError):
                self.save()
            interrupt.add_note(_goes_on(self._journal))
            raise


def profile(
    subject: Subject,
    corpus: Corpus,
    output: Path,
    *,
    tokens: int = 0,
    threshold: float = 0.0,
    existing: Existing = Existing.REFUSE,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Profiled:
    """Run `corpus` through the model, at most `tokens` of it (0: all), and write the activity to `output`.

    A limited run takes the files in an order of chance.

    A journal beside the output lets a second start go on where a killed one stopped; `restart` forgets it. With
    `Existing.MERGE` the new counts are added to those of `output`, which must be this model's.

    Raises:
        UsageError: `output` is there and was not to be touched, or the journal is of a run over other texts.
        FingerprintError: `output` or the journal belongs to another model.
        OutputError: something could not be written; what was there before is untouched.
        NumericalError: the model computes NaN.
    """
    began = time.perf_counter()
    require_replaceable(output, existing)
    journal = journal_of(output)
    _require_settings(tokens, threshold)
    run = _Run(
        {"texts": corpus.digest, "window": subject.runner.window, "batch": subject.runner.batch, "limit": tokens}
    )
    start = Activity.empty(subject.fingerprint, subject.name, *subject.down_norms.shape, threshold=threshold)
    before = None if restart else _resume(journal, run, start)
    old = _existing(output, existing, subject, run, resumed=before is not None)
    if old is not None and any(record.get("id") == run.id for record in old.runs):
        journal.unlink(missing_ok=True)  # killed between the last two steps of a run: all was done
        return Profiled(old, run.tokens, run.tokens, len(corpus.files), (), time.perf_counter() - began)
    reading = Reading(
        corpus.shuffled() if tokens else corpus, subject.tokenize, subject.prefix, subject.runner.window, tokens
    )
    accumulator = Accumulator(before or start, subject.down_norms, subject.runner.to_host)
    resumed, pace = run.tokens, Pace(journal_seconds)
    counted = _Counted(journal, run, accumulator.result())
    if before is None:
        counted.save()  # a disk that cannot be written to shows at once
    with counted.saved_at_interrupt():
        for number, window in enumerate(reading):
            if number < run.position:
                continue
            accumulator.begin_sequence()
            subject.runner.run(np.asarray(window.tokens, np.int32), accumulator)
            run.position, run.tokens, run.sequences = number + 1, accumulator.tokens, accumulator.sequences
            counted.grow(accumulator.result())
            if progress is not None:
                seconds = time.perf_counter() - began
                progress(Progress(reading.share, run.tokens, (run.tokens - resumed) / seconds))
            if pace.due():
                counted.save()
                pace.saved()
    if not run.tokens:
        journal.unlink(missing_ok=True)
        more = skipped_words(reading.skipped) or "what was read is empty"
        raise UsageError(f"there is nothing to count: {more}; name texts in UTF-8")
    files = reading.files
    fresh = accumulator.result((run.record(files=files, bytes=reading.nbytes),))
    activity = fresh if old is None else old.merge(fresh, path=output)
    try:
        save_activity(activity, output)
    except OutputError as error:
        with suppress(OutputError):
            counted.save()
        raise OutputError(f"{error}; {_goes_on(journal)}") from error
    journal.unlink(missing_ok=True)
    return Profiled(activity, run.tokens, resumed, files, tuple(reading.skipped), time.perf_counter() - began)


def require_replaceable(output: Path, existing: Existing) -> None:
    """Refuse a folder, or a file that is no activity, in the place of `output`: before the work, not after.

    Raises:
        OutputError: it is no regular file.
        UsageError: it is no activity, which `Existing.MERGE` tells when it reads it.
    """
    existing_mode(output)
    if existing is not Existing.MERGE:
        require_kind(output, "activity", partial(is_sidecar, kind=SidecarKind.ACTIVITY))


def journal_of(output: Path) -> Path:
    """Where an unfinished run that will write `output` keeps what it has."""
    return output.with_name(output.name + ".journal")


def _require_settings(tokens: int, threshold: float) -> None:
    if not 0 <= tokens <= 1 << 40:
        raise UsageError(f"tokens is {tokens}; allowed: 0 (all of the text) to {1 << 40}")
    if not 0 <= threshold <= MAX_THRESHOLD:
        raise UsageError(f"threshold is {threshold:g}; allowed: 0 to {MAX_THRESHOLD:g}")


def _existing(output: Path, existing: Existing, subject: Subject, run: _Run, *, resumed: bool) -> Activity | None:
    """The activity that the new counts are added to, or that an interrupted run had already finished."""
    if not output.exists() or existing is Existing.OVERWRITE:
        return None
    try:
        old = load_activity(output)
        old.require_model(subject.fingerprint, subject.name)
    except (ModelFormatError, FingerprintError):
        if existing is Existing.MERGE:
            raise
        old = None
    finished = resumed and old is not None and any(record.get("id") == run.id for record in old.runs)
    if existing is Existing.REFUSE and not finished:
        raise UsageError(
            f"{printable(str(output))} is there already: --merge adds to it, --overwrite makes it anew, "
            "or name another file with -o"
        )
    return old


def _resume(journal: Path, run: _Run, start: Activity) -> Activity | None:
    """What an interrupted run had counted, and `run` set to where it stood; None if there is no journal."""
    if not journal.exists():
        return None
    sidecar = read_sidecar(journal, SidecarKind.JOURNAL)
    if sidecar.model_fingerprint != start.model_fingerprint:
        belongs = named(sidecar.model_name, sidecar.model_fingerprint)
        given = named(start.model_name, start.model_fingerprint)
        raise FingerprintError(journal, belongs, given, "finish its run with that one, or give --restart to forget it")
    activity, state = activity_of(sidecar), sidecar.info.get("run")
    if not isinstance(state, Mapping) or not isinstance(state.get("id"), str):
        raise ModelFormatError(journal, "info.run", "does not tell which run it is of")
    if type(state.get("position")) is not int or state["position"] < 0:
        raise ModelFormatError(journal, "info.run", "does not tell how far the run was")
    same = activity.threshold == start.threshold and activity.fired.shape == start.fired.shape
    if state.get("identity") != run.identity or not same:
        raise UsageError(
            f"an unfinished run over other texts or with other settings has its journal in {printable(str(journal))}: "
            "repeat its command to finish it, or give --restart to forget it"
        )
    run.id, run.position = state["id"], state["position"]
    run.tokens, run.sequences = activity.tokens, activity.sequences
    return activity


def _goes_on(journal: Path) -> str:
    return f"what was counted is kept in {printable(str(journal))}: the same command goes on with it"
