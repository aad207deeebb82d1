"""Profiling: the counts are those of the network, and no interrupt loses or doubles any of them."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import read_activity
from thermocline.activity import profile as module
from thermocline.activity.accumulator import Accumulator
from thermocline.activity.profile import Existing, Profiled, Progress, journal_of
from thermocline.activity.statistics import Activity
from thermocline.activity.store import save_activity
from thermocline.config import LoadSettings, OpsKind
from thermocline.errors import FingerprintError, ModelFormatError, NumericalError, OutputError, UsageError
from thermocline.files.open import open_model
from thermocline.files.quantize import to_float
from thermocline.model.observers import Observer
from thermocline.runtime import profiling
from thermocline.runtime.loading import load_model
from thermocline.runtime.observed import ObservedRunner
from thermocline.runtime.profiling import profile_model

WINDOW, BATCH, LAYERS, NEURONS = 40, 16, 2, 96
SETTINGS = LoadSettings(ctx_size=WINDOW, ubatch=BATCH, threads=1)
FILES = ["a.py", "b/second.md", "b/third.txt"]
Run = Callable[..., Profiled]


class KilledError(BaseException):
    """What no handler of the program catches, as a kill."""


@pytest.fixture
def run(tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Profile the tiny model; a journal is written after every window."""
    monkeypatch.setitem(module.profile.__kwdefaults__, "journal_seconds", 0.0)

    def go(output: str = "x", *, paths: list[Path] | None = None, settings: LoadSettings = SETTINGS, **more: Any):
        source = open_model(more.pop("model", tiny_model))
        try:
            return profile_model(source, paths or [texts], tmp_path / output, settings, **more)
        finally:
            source.close()

    return go


class HandCount:
    """Counts from the input of each FFN, with the formula of the network and the weights of the file."""

    def __init__(self, model: Path) -> None:
        weights = open_model(model).weights
        self.up = [to_float(weights[f"blk.{i}.ffn_up.weight"]).astype(np.float64) for i in range(LAYERS)]
        down = [to_float(weights[f"blk.{i}.ffn_down.weight"]).astype(np.float64) for i in range(LAYERS)]
        self.norms = np.sqrt([(d * d).sum(axis=0) for d in down])
        self.rows: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]

    def ffn_input(self, layer: int, residual: np.ndarray, normed: np.ndarray) -> None:
        self.rows[layer] += [np.maximum(self.up[layer] @ x.astype(np.float64), 0) ** 2 for x in normed]

    def ffn_hidden(self, layer: int, hidden: np.ndarray) -> None:
        pass


def test_the_counts_are_those_of_the_network(run: Run, texts: Path, tiny_model: Path) -> None:
    settings = LoadSettings(ctx_size=WINDOW, ubatch=BATCH, ops=OpsKind.REFERENCE)
    done = run(settings=settings)
    source = open_model(tiny_model)
    loaded = load_model(source, settings)
    runner, hand, lengths = ObservedRunner(loaded.transformer, WINDOW, settings), HandCount(tiny_model), []
    for name in FILES:
        tokens = loaded.tokenizer.encode((texts / name).read_bytes().decode(), add_special=False)
        for start in range(0, len(tokens), WINDOW):
            part = tokens[start : start + WINDOW]
            runner.run(np.array(part, np.int32), hand)
            lengths.append(len(part))
    hidden = np.array(hand.rows)
    activity = done.activity
    assert (activity.tokens, activity.sequences) == (sum(lengths), len(lengths)) == (done.tokens, len(lengths))
    assert hidden.shape == (LAYERS, sum(lengths), NEURONS)
    assert np.array_equal(activity.fired, (hidden != 0).sum(axis=1))
    assert np.allclose(activity.contribution, hidden.sum(axis=1) * hand.norms, rtol=1e-5)
    starts = set(np.cumsum([0, *lengths]).tolist())
    follows = np.array([t for t in range(sum(lengths)) if t not in starts])
    fires = hidden != 0
    assert activity.token_overlap.shared.tolist() == (fires[:, follows] & fires[:, follows - 1]).sum((1, 2)).tolist()
    assert activity.token_overlap.total.tolist() == fires[:, follows].sum((1, 2)).tolist()
    assert 0.1 < activity.active_share.mean() < 0.9


def test_kernels_count_what_the_reference_counts(run: Run) -> None:
    slow = run("slow", settings=LoadSettings(ctx_size=WINDOW, ubatch=BATCH, ops=OpsKind.REFERENCE)).activity
    fast = run("fast").activity
    assert fast.tokens == slow.tokens
    assert np.abs(fast.fired - slow.fired).max() <= 0.05 * slow.tokens
    assert np.abs(fast.active_share - slow.active_share).max() < 0.01


def test_what_is_no_text_is_skipped_and_told(run: Run, texts: Path) -> None:
    done = run()
    assert sorted(path.name for path in done.skipped) == ["picture.png", "zeros.bin"]
    assert done.files == 4
    (record,) = done.activity.runs
    assert (record["tokens"], record["files"], record["window"]) == (done.tokens, 4, WINDOW)
    assert record["bytes"] == sum((texts / name).stat().st_size for name in FILES)


@pytest.mark.parametrize("limit", [1, 39, 40, 41, 100])
def test_a_limit_of_tokens_is_kept_to_the_token(run: Run, limit: int) -> None:
    done = run(tokens=limit)
    assert done.tokens == done.activity.tokens == limit
    assert done.activity.sizes.sum(axis=1).tolist() == [limit] * LAYERS
    assert run("all").tokens > 100


def test_progress_ends_at_all(run: Run) -> None:
    seen: list[Progress] = []
    done = run(progress=seen.append)
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.3
    assert shares[-1] > 0.5  # what is left of the bytes are files that were skipped
    assert seen[-1].tokens == done.tokens


def test_merging_adds_and_equals_one_run(run: Run, texts: Path, tmp_path: Path) -> None:
    run(paths=[texts / "a.py"])
    merged = run(paths=[texts / "b"], existing=Existing.MERGE).activity
    whole = run("whole", paths=[texts / "a.py", texts / "b"]).activity
    assert np.array_equal(merged.fired, whole.fired)
    assert np.array_equal(merged.sizes, whole.sizes)
    assert np.allclose(merged.contribution, whole.contribution, rtol=1e-12)
    assert (merged.tokens, merged.sequences, len(merged.runs)) == (whole.tokens, whole.sequences, 2)
    assert read_activity(tmp_path / "x").tokens == whole.tokens


def test_an_output_is_not_touched_unless_asked(run: Run, tmp_path: Path, same) -> None:
    first = run(tokens=50).activity
    content = (tmp_path / "x").read_bytes()
    with pytest.raises(UsageError, match="--merge adds to it"):
        run()
    assert (tmp_path / "x").read_bytes() == content
    assert same(run(tokens=50, existing=Existing.OVERWRITE).activity, first)


def test_another_model_is_refused(run: Run, tiny_plain: Path, tmp_path: Path) -> None:
    run(tokens=50, model=tiny_plain)
    content = (tmp_path / "x").read_bytes()
    with pytest.raises(FingerprintError, match="tiny"):
        run(existing=Existing.MERGE)
    with pytest.raises(KilledError):
        run("y", model=tiny_plain, progress=kill_after(2))
    with pytest.raises(FingerprintError):
        run("y")
    assert (tmp_path / "x").read_bytes() == content
    assert run(existing=Existing.OVERWRITE).tokens > 50


def kill_after(windows: int) -> Callable[[Progress], None]:
    seen = []

    def kill(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == windows:
            raise KilledError

    return kill


def test_a_run_killed_after_every_window_gives_the_same_bits(run: Run, tmp_path: Path, same) -> None:
    whole = run("whole")
    resumed = 0
    for _ in range(1000):
        try:
            done = run(progress=kill_after(2))
            break
        except KilledError:
            assert not (tmp_path / "x").exists()
            resumed += 1
    assert resumed > 3
    assert done.resumed > 0
    assert same(done.activity, whole.activity)
    assert same(read_activity(tmp_path / "x"), whole.activity)
    assert not journal_of(tmp_path / "x").exists()


def test_a_run_killed_early_has_its_first_window(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same
) -> None:
    """However long the interval between two saves is."""
    whole = run("whole")
    monkeypatch.setitem(module.profile.__kwdefaults__, "journal_seconds", 1e9)
    with pytest.raises(KilledError):
        run(progress=kill_after(2))
    done = run()
    assert WINDOW == done.resumed < done.tokens
    assert same(done.activity, whole.activity)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_an_interrupted_run_has_all_windows_that_it_finished(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same, windows: int
) -> None:
    """However long the interval between two saves is, and though it comes amid a window's layers."""
    whole = run("whole")
    finished: list[Progress] = []
    count = Accumulator.ffn_hidden

    def interrupted(self: Accumulator, layer: int, hidden: Any) -> None:
        count(self, layer, hidden)
        if len(finished) == windows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(module.profile.__kwdefaults__, "journal_seconds", 1e9)
        patched.setattr(Accumulator, "ffn_hidden", interrupted)
        with pytest.raises(KeyboardInterrupt) as told:
            run(progress=finished.append)
    assert [note for note in told.value.__notes__ if "the same command goes on with it" in note]
    done = run()
    assert done.resumed == finished[-1].tokens
    assert same(done.activity, whole.activity)


@pytest.mark.parametrize("existing", [Existing.REFUSE, Existing.MERGE])
def test_a_kill_between_the_result_and_the_end_counts_nothing_twice(
    run: Run, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, same, existing: Existing
) -> None:
    if existing is Existing.MERGE:
        run(paths=[texts / "a.py"])

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KilledError):
            run(paths=[texts / "b"], existing=existing)
    content = (tmp_path / "x").read_bytes()
    assert journal_of(tmp_path / "x").exists()
    again = run(paths=[texts / "b"], existing=existing)
    assert (tmp_path / "x").read_bytes() == content
    assert same(again.activity, read_activity(tmp_path / "x"))
    assert not journal_of(tmp_path / "x").exists()


def test_a_journal_of_another_run_is_refused_and_can_be_forgotten(run: Run, texts: Path, tmp_path: Path, same) -> None:
    with pytest.raises(KilledError):
        run(progress=kill_after(3))
    for changes in (
        {"paths": [texts / "b"]},
        {"tokens": 10},
        {"threshold": 0.5},
        {"settings": LoadSettings(ctx_size=WINDOW - 1, ubatch=BATCH, threads=1)},
    ):
        with pytest.raises(UsageError, match="--restart"):
            run(**changes)
    fresh = run("fresh", paths=[texts / "b"]).activity
    assert same(run(paths=[texts / "b"], restart=True).activity, fresh)


def test_a_journal_of_another_model_can_be_forgotten(run: Run, tiny_plain: Path, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(model=tiny_plain, progress=kill_after(3))
    with pytest.raises(FingerprintError, match=r"x\.journal: belongs to the model .*--restart to forget it"):
        run()
    assert run(restart=True).tokens > 0


@pytest.mark.parametrize("threshold", [1e31, float("inf"), float("nan"), -1.0])
def test_thresholds_beyond_the_limits_are_told_them(run: Run, threshold: float) -> None:
    with pytest.raises(UsageError, match=rf"threshold is {re.escape(f'{threshold:g}')}; allowed: 0 to 1e\+30"):
        run(threshold=threshold)


@pytest.mark.parametrize("existing", [Existing.REFUSE, Existing.OVERWRITE])
def test_what_is_no_activity_is_not_replaced(run: Run, tmp_path: Path, existing: Existing) -> None:
    (tmp_path / "x").write_bytes(b"GGUF and more")
    with pytest.raises(UsageError, match=r"x is there and is no activity: name another file with -o"):
        run(existing=existing)
    assert (tmp_path / "x").read_bytes() == b"GGUF and more"


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}"])
def test_a_damaged_journal_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    journal_of(tmp_path / "x").write_bytes(content)
    with pytest.raises(ModelFormatError, match="journal"):
        run()
    assert run(restart=True).tokens > 0


@pytest.mark.parametrize("run_state", [None, {}, {"id": 1, "position": 0}, {"id": "x", "position": -1}, {"id": "x"}])
def test_a_hostile_journal_is_refused(run: Run, tmp_path: Path, tiny_model: Path, run_state: Any) -> None:
    fingerprint = open_model(tiny_model).fingerprint
    empty = Activity.empty(fingerprint, "tiny", LAYERS, NEURONS)
    kind = module.SidecarKind.JOURNAL
    save_activity(empty, journal_of(tmp_path / "x"), kind=kind, more={"run": run_state})
    with pytest.raises(ModelFormatError, match=r"info\.run"):
        run()


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_full_disk_leaves_the_old_file_and_a_second_start_resumes(
    run: Run, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, same, after: int
) -> None:
    whole = run("whole")
    run(paths=[texts / "a.py"], tokens=30)
    content = (tmp_path / "x").read_bytes()
    writes, real = [], os.write

    def full(descriptor: int, data: Any) -> int:
        writes.append(1)
        if len(writes) > 2 * after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr("thermocline.files.atomic.os.write", full)
        with pytest.raises(OutputError, match="No space left"):
            run(existing=Existing.OVERWRITE)
    assert (tmp_path / "x").read_bytes() == content
    assert not list(tmp_path.glob(".*partial"))
    assert same(run(existing=Existing.OVERWRITE).activity, whole.activity)


def test_a_result_that_cannot_be_written_is_resumed_from_the_journal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same
) -> None:
    whole = run("whole")
    real = module.save_activity

    def save(activity: Activity, path: Path, **more: Any) -> str:
        if path.name == "x":
            raise OutputError("x: the disk is full")
        return real(activity, path, **more)

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_activity", save)
        with pytest.raises(OutputError, match="is full"):
            run()
    done = run()
    assert done.resumed == done.tokens == whole.tokens
    assert same(done.activity, whole.activity)


KILLED = """
import sys
from pathlib import Path
from thermocline.activity import profile as module
from thermocline.activity.accumulator import Accumulator
from thermocline.config import LoadSettings
from thermocline.files.open import open_model
from thermocline.runtime.profiling import profile_model
module.profile.__kwdefaults__["journal_seconds"] = 0.0
def tell(progress):
    print(progress.tokens, flush=True)
model, texts, output = map(Path, sys.argv[1:])
settings = LoadSettings(ctx_size=40, ubatch=16, threads=1)
profile_model(open_model(model), [texts], output, settings, progress=tell)
"""


def test_kill_minus_nine_in_a_loop(run: Run, tiny_model: Path, texts: Path, tmp_path: Path, same) -> None:
    whole = run("whole")
    output, arguments = tmp_path / "x", [tiny_model, texts, tmp_path / "x"]
    reached, kills = 0, 0
    for lines in (1, 2, 3, 1, 4, 1000):
        child = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stdout=subprocess.PIPE)
        told = [line for _, line in zip(range(lines), iter(child.stdout.readline, b""), strict=False)]
        child.kill()
        child.communicate()
        if not told:  # it had finished before
            break
        kills += child.returncode == -9
        assert int(told[0]) > reached
        reached = int(told[-2]) if len(told) > 1 else reached  # the window told last may not be in the journal yet
        if output.exists():
            assert same(read_activity(output), whole.activity)
    assert kills >= 4
    if not output.exists() or journal_of(output).exists():
        run()
    assert same(read_activity(output), whole.activity)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "whole", "x"]


@pytest.mark.parametrize("settings", [{"tokens": -1}, {"threshold": -0.1}, {"threshold": float("nan")}])
def test_settings_out_of_range_are_refused(run: Run, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="allowed"):
        run(**settings)


def test_a_model_without_zeros_needs_a_threshold(run: Run, tiny_silu: Path) -> None:
    with pytest.raises(UsageError, match="say with --threshold"):
        run(model=tiny_silu)
    all_of_it = run("all", model=tiny_silu, threshold=1e-30, tokens=40).activity
    some = run("some", model=tiny_silu, threshold=0.3, tokens=40).activity
    assert all_of_it.active_share.min() > 0.99
    assert 0 < some.active_share.max() < 0.9


def test_texts_with_nothing_in_them(run: Run, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is nothing to count: 1 file was skipped"):
        run(paths=[texts / "empty.txt", texts / "zeros.bin"])
    assert not (tmp_path / "x").exists()
    assert not journal_of(tmp_path / "x").exists()


def test_a_missing_folder_is_told_before_the_model_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "load_model", None)
    with pytest.raises(UsageError, match="make it first"):
        run("nowhere/x")


def test_nan_stops_a_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: ObservedRunner, tokens: np.ndarray, observer: Observer) -> None:
        observer.ffn_hidden(0, np.full((1, NEURONS), np.nan, np.float32))

    monkeypatch.setattr(ObservedRunner, "run", spoil)
    with pytest.raises(NumericalError, match="layer 0"):
        run()
    assert not (tmp_path / "x").exists()
