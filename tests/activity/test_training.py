"""Training: predictors reach what was asked of them, and no interrupt loses or changes anything."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import LLM
from thermocline.activity import training as module
from thermocline.activity.capture import Capture
from thermocline.activity.predictor import load_predictor
from thermocline.activity.training import Step, Trained
from thermocline.config import LoadSettings, OpsKind, TrainSettings
from thermocline.errors import (
    FingerprintError,
    MissingPackageError,
    NumericalError,
    OutputError,
    ThermoclineError,
    UsageError,
)
from thermocline.files.open import open_model
from thermocline.files.sidecar import SidecarKind, write_sidecar
from thermocline.files.workplace import Workplace
from thermocline.memory.checks import first_bytes
from thermocline.model.families import family_of
from thermocline.runtime import training as runtime
from thermocline.runtime.profiling import profile_model
from thermocline.runtime.training import train_predictor

pytest.importorskip("torch")

WINDOW, LAYERS, NEURONS, WIDTH = 16, 2, 96, 64
LOAD = LoadSettings(ctx_size=WINDOW, ubatch=5, threads=1)
FAST = {"epochs": 2.0, "batch": 64, "max_share": 0.0, "train_on": "cpu", "rank": 32}
Run = Callable[..., Trained]


class KilledError(BaseException):
    """What no handler of the program catches, as a kill."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train a predictor of the tiny model; the state of the reading is saved after every sequence."""
    monkeypatch.setattr("thermocline.activity.capture.SAVE_SECONDS", 0.0)

    def go(output: str = "x", *, paths: list[Path] | None = None, load: LoadSettings = LOAD, **more: Any) -> Trained:
        changes = {name: more.pop(name) for name in list(more) if name in TrainSettings.__slots__}
        with open_model(more.pop("model", tiny_model)) as source:
            settings = TrainSettings(**{**FAST, **changes})
            return train_predictor(source, paths or [texts], tmp_path / output, load, settings, **more)

    return go


def same(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("goal", [0.6, 0.95])
@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "f16"])
def test_what_was_asked_for_is_reached_and_told(run: Run, tmp_path: Path, tiny_model: Path, goal: float, outtype: str):
    done = run(energy_recall=goal, outtype=outtype)
    fingerprint = open_model(tiny_model).fingerprint
    predictor = load_predictor(tmp_path / "x", fingerprint, verify=True)
    assert [layer.fc1.format.name.lower() for layer in predictor.layers] == [outtype] * LAYERS
    for layer, matrices, threshold, share in zip(
        done.layers, predictor.layers, predictor.thresholds, predictor.active_shares, strict=True
    ):
        assert goal <= layer["energy_recall"] < 1.0
        assert layer["active"] * layer["recall"] == pytest.approx(layer["selected"] * layer["precision"])
        assert layer["bytes"] == matrices.fc1.nbytes + matrices.fc2.nbytes
        assert (layer["rank"], layer["threshold"]) == (32, pytest.approx(threshold, rel=1e-6))
        assert share == pytest.approx(layer["selected"], abs=1e-6)
    assert predictor.info["layers"] == [dict(layer) for layer in done.layers]
    assert done.share == predictor.parameters / 82752


def test_a_recall_can_be_asked_for_too(run: Run) -> None:
    low = run("low", energy_recall=0.5).layers
    high = run("high", energy_recall=0.5, recall=0.9).layers
    assert all(layer["recall"] < 0.9 for layer in low)
    assert all(layer["recall"] >= 0.9 for layer in high)


def test_training_makes_it_better_than_chance(run: Run) -> None:
    """A selection by chance would need as many neurons as it is to carry of the energy."""
    for layer in run(epochs=40.0, energy_recall=0.9).layers:
        assert layer["selected"] < 0.75
        assert layer["precision"] > 1.2 * layer["active"]


@pytest.mark.usefixtures("machine_home")
def test_the_model_runs_with_it(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    done = run(energy_recall=0.9)
    with LLM.load(tiny_model, predictor=tmp_path / "x", mode="predicted", threads=1) as llm:
        report = llm.generate("def ", temperature=0, max_tokens=24, ignore_eos=True).report
    assert report.predictor_bytes == done.predictor.nbytes
    assert 0.2 < report.selected_share < 1.0


def test_the_rank_is_that_of_the_fewest_bytes(run: Run) -> None:
    for layer in run(rank=0, energy_recall=0.9).layers:
        tried = {t["rank"]: t["read"] for t in layer["tried"]}
        best = min(tried, key=tried.__getitem__)
        assert all(rank in tried for rank in (32, 64, 96, 128) if abs(rank - best) == 32)
        assert layer["rank"] == best


def test_where_no_rank_is_worth_it_all_neurons_are_selected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRID", (64, 96))
    for layer in run(rank=0, energy_recall=0.9999).layers:
        assert layer["pays"] is False  # not even those 32 ranks more than the smallest
        assert (layer["rank"], layer["selected"], layer["recall"], layer["energy_recall"]) == (32, 1.0, 1.0, 1.0)
        assert layer["precision"] == layer["active"] > 0.1


def test_the_share_of_the_model_is_bounded(run: Run) -> None:
    done = run(rank=0, max_share=0.25, energy_recall=0.9)
    assert all(t["rank"] <= 64 for layer in done.layers for t in layer["tried"])
    with pytest.raises(UsageError, match=r"12\.4% of the model's numbers; --max-share allows 9\.0%"):
        run("y", rank=0, max_share=0.09)


def test_a_rank_that_was_asked_for_is_bounded_too(run: Run, tmp_path: Path) -> None:
    for given, allowed in (({"max_share": 0.2}, r"20\.00%"), ({"max_share": TrainSettings().max_share}, r"9\.00%")):
        with pytest.raises(UsageError, match=rf"rank 64 has 24\.75% .* --max-share allows {allowed}: lower --rank"):
            run(rank=64, **given)
    assert not (tmp_path / "x.work").exists()
    assert run(rank=64, max_share=0.25).share == pytest.approx(0.2475, abs=1e-4)


def test_ranks_that_are_refused_leave_nothing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of the smallest rank"):
        run(rank=0, max_share=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize("outtype", ["q4_0", "f16"])
def test_a_predictor_pays_where_a_token_reads_less_than_in_mode_exact(run: Run, tiny_model: Path, outtype: str) -> None:
    done = run(energy_recall=0.5, outtype=outtype)
    with open_model(tiny_model) as source:
        spec = family_of(source).spec(source)
        first = first_bytes(spec, family_of(source).weights(source, spec))
    read = [layer["bytes"] + layer["selected"] * each for layer, each in zip(done.layers, first, strict=True)]
    assert [layer["pays"] for layer in done.layers] == [a < b for a, b in zip(read, first, strict=True)]
    assert (done.predicted_bytes, done.exact_bytes) == (pytest.approx(sum(read), abs=1), sum(first))
    assert done.saves is done.predictor.saves(first) is (outtype == "q4_0")


def test_what_is_captured_is_what_the_network_computed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[Any]] = {"x": [], "h": []}
    monkeypatch.setattr(Workplace, "remove", lambda self: None)
    hidden, inputs, begun = Capture.ffn_hidden, Capture.ffn_input, Capture.begin_sequence
    checking: list[bool] = []

    def begin(self: Capture) -> None:
        begun(self)
        checking.append(self._checking)

    def watch(self: Capture, layer: int, residual: Any, normed: Any) -> None:
        inputs(self, layer, residual, normed)
        if layer == 1:
            seen["x"] += [(checking[-1], row) for row in residual.astype(np.float16)]

    def listen(self: Capture, layer: int, activation: Any) -> None:
        hidden(self, layer, activation)
        if layer == 1:
            seen["h"] += [(checking[-1], row * self._norms[1]) for row in activation]

    monkeypatch.setattr(Capture, "begin_sequence", begin)
    monkeypatch.setattr(Capture, "ffn_input", watch)
    monkeypatch.setattr(Capture, "ffn_hidden", listen)
    done = run(load=LoadSettings(ctx_size=WINDOW, ubatch=5, ops=OpsKind.REFERENCE), tokens=200)
    folder = tmp_path / "x.work"
    x = np.fromfile(folder / "1.x", np.float16).reshape(-1, WIDTH)
    level = np.fromfile(folder / "1.level", np.uint8).reshape(-1, NEURONS // 2)
    check = np.fromfile(folder / "1.check", np.float16).reshape(-1, WIDTH)
    energy = np.fromfile(folder / "1.energy", np.float16).reshape(-1, NEURONS)
    assert len(x) + len(check) == done.tokens == 200
    assert len(check) >= 200 // 8
    assert np.array_equal(x, [row for kept, row in seen["x"] if not kept])
    assert np.array_equal(check, [row for kept, row in seen["x"] if kept])
    expected = np.array([row for kept, row in seen["h"] if kept])
    assert np.array_equal(energy > 0, expected > 0)
    assert np.allclose(energy, expected, rtol=1e-3, atol=1e-6)
    levels = np.stack([level & 15, level >> 4], axis=2).reshape(-1, NEURONS)
    wanted = np.array([row for kept, row in seen["h"] if not kept])
    assert np.array_equal(levels > 0, wanted > 0)
    assert (levels.max(axis=1) == 15).all()
    octaves = np.floor(np.log2(wanted.max(axis=1, keepdims=True))) - np.floor(np.log2(np.maximum(wanted, 1e-30)))
    assert np.array_equal(levels, np.where(wanted > 0, np.clip(15 - octaves, 1, 15), 0))


def kill_after(steps: int) -> Callable[[Step], None]:
    seen = []

    def kill(step: Step) -> None:
        seen.append(step)
        if len(seen) == steps:
            raise KilledError

    return kill


@pytest.mark.parametrize("rank", [32, 0])
def test_a_run_killed_again_and_again_gives_the_same_bits(run: Run, tmp_path: Path, rank: int) -> None:
    settings = {"rank": rank, "epochs": 0.3, "tokens": 150}
    run("whole", **settings)
    kills = 0
    for _ in range(1000):
        try:
            done = run(progress=kill_after(2), **settings)
            break
        except KilledError:
            assert not (tmp_path / "x").exists()
            kills += 1
    assert kills >= 5
    assert done.resumed
    assert same(tmp_path / "x", tmp_path / "whole")
    assert not (tmp_path / "x.work").exists()


def test_a_run_killed_early_has_its_first_sequence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the interval between two saves is."""
    whole: list[str] = []
    read: list[str] = []
    run("whole", progress=lambda step: whole.append(step.doing))
    monkeypatch.setattr("thermocline.activity.capture.SAVE_SECONDS", 1e9)
    with pytest.raises(KilledError):
        run(progress=kill_after(2))
    assert run(progress=lambda step: read.append(step.doing)).resumed
    assert read == whole[1:]
    assert same(tmp_path / "x", tmp_path / "whole")


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_an_interrupted_run_has_all_sequences_that_it_finished(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: int
) -> None:
    """However long the interval between two saves is, and though it comes amid a sequence's layers."""
    whole: list[str] = []
    first: list[str] = []
    rest: list[str] = []
    run("whole", progress=lambda step: whole.append(step.doing))
    write = Capture.ffn_hidden

    def interrupted(self: Capture, layer: int, hidden: Any) -> None:
        write(self, layer, hidden)
        if len(first) == sequences:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("thermocline.activity.capture.SAVE_SECONDS", 1e9)
        patched.setattr(Capture, "ffn_hidden", interrupted)
        with pytest.raises(KeyboardInterrupt) as told:
            run(progress=lambda step: first.append(step.doing))
    assert [note for note in told.value.__notes__ if "the same command goes on with it" in note]
    assert run(progress=lambda step: rest.append(step.doing)).resumed
    assert first + rest == whole
    assert same(tmp_path / "x", tmp_path / "whole")


@pytest.mark.parametrize("rank", [32, 0])
def test_a_kill_within_the_fit_of_a_layer_loses_none_of_its_steps(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    whole: list[str] = []
    run("whole", rank=rank, progress=lambda step: whole.append(step.doing))
    monkeypatch.setattr("thermocline.activity.fit_state.SAVE_SECONDS", 0.0)
    for killed in range(whole.index(next(line for line in whole if line.startswith("layer"))) + 1, len(whole), 5):
        left: list[str] = []
        with pytest.raises(KilledError):
            run(rank=rank, progress=kill_after(killed))
        assert run(rank=rank, progress=lambda step, left=left: left.append(step.doing)).resumed
        assert left in (whole[killed:], whole[killed - 1 :])  # what a fit's last step made is kept with its layer
        assert same(tmp_path / "x", tmp_path / "whole")
        (tmp_path / "x").unlink()


def test_a_kill_between_the_result_and_the_end_trains_nothing_twice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Workplace) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Workplace, "remove", killed)
        with pytest.raises(KilledError):
            run()
    content = (tmp_path / "x").read_bytes()
    steps: list[Step] = []
    assert run(progress=steps.append).resumed
    assert steps == []
    assert (tmp_path / "x").read_bytes() == content
    assert not (tmp_path / "x.work").exists()


def test_layers_that_do_not_fit_the_disk_at_once_are_read_for_in_turn(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("whole")
    read: list[str] = []
    monkeypatch.setattr(module, "layers_at_once", lambda folder, wanted, each: 1)
    run(progress=lambda step: read.append(step.doing))
    assert same(tmp_path / "x", tmp_path / "whole")
    first = [i for i, line in enumerate(read) if line.startswith("layer 1")]
    assert any(line.startswith("reading") for line in read[first[-1] :])


@pytest.mark.parametrize("at_once", [1, 2])
def test_progress_moves_while_reading_and_never_back(run: Run, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "layers_at_once", lambda folder, wanted, each: min(at_once, len(wanted)))
    steps: list[Step] = []
    run(progress=steps.append)
    shares = [step.share for step in steps]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1
    reading = [step.share for step in steps if step.doing.startswith("reading")]
    assert len(set(reading)) == len(reading) > 2
    assert reading[-1] == pytest.approx((1 + module.READING) / 2 if at_once == 1 else module.READING)


def test_a_disk_without_room_is_told_before_anything_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("thermocline.activity.capture.shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(OutputError, match=r"one layer takes [\d,]+ bytes and 1,000 are free .*--tokens"):
        run()
    assert not (tmp_path / "x.work").exists()  # nothing was done, so that the next command may be another


def test_what_would_fail_alike_is_not_kept(run: Run, tmp_path: Path, texts: Path) -> None:
    """The remedy is another text, or another setting: an unfinished run would be in its way."""
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UsageError, match="the text is too short"):
        run(paths=[tmp_path / "short.txt"])
    assert not (tmp_path / "x.work").exists()
    run()


def test_what_a_full_disk_left_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise OutputError("x: the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_predictor", full)
        with pytest.raises(OutputError, match=r"is full; what was done is kept in .*x\.work: the same command goes on"):
            run()
    read: list[str] = []
    assert run(progress=lambda step: read.append(step.doing)).resumed
    assert not read  # all layers were there


def test_no_more_is_gathered_than_was_reckoned_with(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few long sequences: of two, the second is kept for measuring, and those rows are the larger ones."""
    wrote: list[int] = []
    real = Capture.data

    def data(self: Capture, layer: int) -> Any:
        found = real(self, layer)
        wrote.append(sum(array.nbytes for array in (found.x, found.level, found.check, found.energy)))
        most = Capture.bytes_per_layer(self.n_embd, self.n_ff, self.tokens, LOAD.ctx_size)
        assert wrote[-1] <= most <= 3 * wrote[-1]
        return found

    monkeypatch.setattr(Capture, "data", data)
    run(tokens=2 * LOAD.ctx_size)
    assert wrote


@pytest.mark.parametrize("after", [0, 5, 60])
def test_a_full_disk_leaves_the_old_file_and_a_second_start_resumes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    run("whole")
    write_sidecar(tmp_path / "x", SidecarKind.PREDICTOR, "0" * 64, {}, {})
    old = (tmp_path / "x").read_bytes()
    writes, real = [], os.write

    def full(descriptor: int, data: Any) -> int:
        writes.append(1)
        if len(writes) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left"):
            run(overwrite=True)
    assert (tmp_path / "x").read_bytes() == old
    run(overwrite=True)
    assert same(tmp_path / "x", tmp_path / "whole")
    assert not list(tmp_path.glob(".*partial"))


def test_what_is_no_predictor_is_not_replaced_by_one(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    before = tiny_model.read_bytes()
    with pytest.raises(UsageError, match="is there and is no predictor: name another file with -o"):
        run(str(tiny_model), overwrite=True)
    assert tiny_model.read_bytes() == before


KILLED = """
import sys
from pathlib import Path
import torch
from thermocline.activity import capture
from thermocline.config import LoadSettings, TrainSettings
from thermocline.files.open import open_model
from thermocline.runtime.training import train_predictor
torch.set_num_threads(1)
capture.SAVE_SECONDS = 0.0
def tell(step):
    print(step.doing, flush=True)
model, texts, output = map(Path, sys.argv[1:])
settings = TrainSettings(epochs=2.0, batch=64, max_share=0.0, train_on="cpu", rank=32)
load = LoadSettings(ctx_size=16, ubatch=5, threads=1)
train_predictor(open_model(model), [texts], output, load, settings, progress=tell)
"""


def test_kill_minus_nine_in_a_loop(run: Run, tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    run("whole")
    kills = 0
    for lines in (3, 48):
        arguments = [tiny_model, texts, tmp_path / "x"]
        child = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stdout=subprocess.PIPE)
        told = [line for _, line in zip(range(lines), iter(child.stdout.readline, b""), strict=False)]
        child.kill()
        child.communicate()
        if not told:
            break
        kills += child.returncode == -9
        assert not (tmp_path / "x").exists() or same(tmp_path / "x", tmp_path / "whole")
    assert kills >= 2
    run(overwrite=True)
    assert same(tmp_path / "x", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "whole", "x"]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.02}, {"batch": 32}, {"rank": 64}, {"outtype": "f16"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("reached", ["layer 1", "layer 2", "the end"])
def test_other_settings_go_on_with_what_was_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reached: str
) -> None:
    def kill(step: Step | None = None, *given: Any, **more: Any) -> None:
        if not isinstance(step, Step) or step.doing.startswith(reached):
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_predictor", kill)
        with pytest.raises(KilledError):
            run(progress=kill)
    whole = run("fresh", **changes)
    notes: list[str] = []
    done: list[str] = []
    assert run(**changes, notice=notes.append, progress=lambda step: done.append(step.doing)).resumed
    assert {line.split(" of ")[0] for line in done} == {"layer 1", "layer 2"}
    (name, value) = next(iter(changes.items()))
    (note,) = (note for note in notes if "read before" in note)
    before = FAST.get(name, getattr(TrainSettings(), name))
    assert note.startswith(f"goes on with {whole.tokens:,} tokens that were read before, and fits all layers anew: ")
    assert note.endswith(f": {name.replace('_', '-')} {value}, was {before}")
    assert same(tmp_path / "x", tmp_path / "fresh")


def test_other_settings_go_on_with_a_reading_that_was_cut_short(run: Run, tmp_path: Path) -> None:
    whole: list[str] = []
    read: list[str] = []
    run("fresh", seed=2, progress=lambda step: whole.append(step.doing))
    with pytest.raises(KilledError):
        run(progress=kill_after(3))
    run(seed=2, progress=lambda step: read.append(step.doing))
    assert read == whole[3:]
    assert same(tmp_path / "x", tmp_path / "fresh")


def test_other_settings_read_again_for_layers_that_had_no_room(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "layers_at_once", lambda folder, wanted, each: 1)
    with monkeypatch.context() as patched:
        patched.setattr(module, "save_predictor", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    run("fresh", seed=2)
    done: list[str] = []
    run(seed=2, progress=lambda step: done.append(step.doing))
    turns = [line for line, before in zip(done, ["", *done], strict=False) if line[:7] != before[:7]]
    assert [line[:7] for line in turns] == ["layer 2", "reading", "layer 1"]
    assert same(tmp_path / "x", tmp_path / "fresh")


def test_what_was_read_for_a_training_that_diverged_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is a smaller learning rate, and the texts need not be read for that."""

    def diverge(*given: Any) -> None:
        raise NumericalError("training diverged")

    with monkeypatch.context() as patched:
        patched.setattr("thermocline.activity.fitting.Fitter.fit", diverge)
        with pytest.raises(NumericalError):
            run()
    done: list[str] = []
    run(learning_rate=0.001, progress=lambda step: done.append(step.doing))
    assert done
    assert not any(line.startswith("reading") for line in done)


def test_a_broken_model_is_not_taken_for_a_training_that_diverged(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Capture, layer: int, hidden: Any) -> None:
        write(self, layer, np.full_like(self._to_host(hidden), np.nan if layer == 1 else 1))

    def spoiled(*given: Any) -> Any:
        learner = learn(*given)
        rows = learner.first_rows
        return replace(learner, first_rows=lambda layer: rows(layer) * np.float32(np.nan if layer == 1 else 1))

    write, learn = Capture.ffn_hidden, runtime._learner
    with monkeypatch.context() as patched:
        patched.setattr(Capture, "ffn_hidden", broken)
        with pytest.raises(NumericalError, match="layer 1 computed NaN"):
            run()
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "_learner", spoiled)
        with pytest.raises(NumericalError, match=r"layer 1: the FFN's first matrix.* holds NaN") as told:
            run()
    assert "learning-rate" not in str(told.value)
    assert not (tmp_path / "x.work").exists()


def test_an_unfinished_run_that_read_something_else_is_refused_and_can_be_forgotten(
    run: Run, texts: Path, tmp_path: Path, tiny_plain: Path
) -> None:
    with pytest.raises(KilledError):
        run(progress=kill_after(3))
    kept = {file.name: file.read_bytes() for file in (tmp_path / "x.work").iterdir()}
    others: list[dict[str, Any]] = [
        {"paths": [texts / "b"]}, {"tokens": 100}, {"model": tiny_plain},
        {"load": LoadSettings(ctx_size=WINDOW - 1, threads=1)},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(UsageError, match="--restart"):
            run(**other)
    assert kept == {file.name: file.read_bytes() for file in (tmp_path / "x.work").iterdir()}
    run("fresh", tokens=100)
    run(tokens=100, restart=True)
    assert same(tmp_path / "x", tmp_path / "fresh")


def test_an_activity_with_another_threshold_is_another_reading(run: Run, tmp_path: Path, texts: Path, tiny_model: Path):
    for name, threshold in (("low", 0.0), ("high", 0.1)):
        with open_model(tiny_model) as source:
            profile_model(source, [texts], tmp_path / name, LOAD, threshold=threshold)
    with pytest.raises(KilledError):
        run(progress=kill_after(3))
    with pytest.raises(UsageError, match="--restart"):
        run(activity=tmp_path / "high")
    notes: list[str] = []
    run(activity=tmp_path / "low", notice=notes.append)
    assert any(re.search(r"anew: activity \d+, was 0$", note) for note in notes)


def test_two_runs_at_once_are_refused(run: Run) -> None:
    def nested(step: Step) -> None:
        with pytest.raises(UsageError, match="another run is at work"):
            run()
        raise KilledError

    with pytest.raises(KilledError):
        run(progress=nested)


def test_an_output_is_not_touched_unless_asked(run: Run, tmp_path: Path) -> None:
    run()
    content = (tmp_path / "x").read_bytes()
    with pytest.raises(UsageError, match="--overwrite makes it anew"):
        run(seed=2)
    assert (tmp_path / "x").read_bytes() == content
    run(seed=2, overwrite=True)
    assert (tmp_path / "x").read_bytes() != content


def test_an_activity_of_another_model_is_refused(run: Run, tmp_path: Path, texts: Path, tiny_plain: Path, tiny_model):
    for model, name in ((tiny_plain, "other"), (tiny_model, "own")):
        with open_model(model) as source:
            profile_model(source, [texts], tmp_path / name, LOAD)
    with pytest.raises(FingerprintError):
        run(activity=tmp_path / "other")
    assert run(activity=tmp_path / "own").tokens > 0


def test_too_little_text_is_told(run: Run, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc")
    with pytest.raises(UsageError, match="it makes 3 tokens in 1 sequences"):
        run(paths=[tmp_path / "short"])


def test_without_torch_the_remedy_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "thermocline.activity.fitting", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'thermocline\[train\]'"):
        run()


def test_a_model_without_zeros_has_nothing_to_predict(run: Run, tiny_silu: Path) -> None:
    with pytest.raises(UsageError, match="nothing to predict"):
        run(model=tiny_silu)


def test_nothing_of_torch_is_imported_before_it_is_needed() -> None:
    code = "import sys, thermocline.api, thermocline.cli.train_predictor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"energy_recall": 0.0}, {"energy_recall": 1.0}, {"recall": 1.0}, {"rank": 33}, {"epochs": 0.0}, {"batch": 0},
        {"learning_rate": float("nan")}, {"outtype": "q6_k"}, {"train_on": "tpu"}, {"tokens": -1}, {"max_share": 1.5},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ThermoclineError, match="allowed"):
        TrainSettings(**settings)
