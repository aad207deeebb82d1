"""Text of another kind warms its own neurons: counted truly, moved within bounds, the tokens being the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from thermocline import LLM, api, plan
from thermocline.activity.statistics import Activity
from thermocline.activity.store import load_activity, save_activity
from thermocline.config import LoadSettings
from thermocline.errors import FingerprintError, ModelFormatError, OutputError, UsageError
from thermocline.files.companion import companion
from thermocline.files.open import open_model
from thermocline.files.sidecar import SidecarKind
from thermocline.hardware.machine import Tier
from thermocline.memory.convert import convert
from thermocline.placement.workload import EMULATED, Overheads
from thermocline.runtime import drift
from thermocline.runtime.counting import FiringCounts
from thermocline.runtime.drift import MARGIN

pytestmark = pytest.mark.usefixtures("machine_home")

CODE = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write("
PROSE = "Once upon a time there was an old man who lived by the sea. Every morning he went down to the"


@pytest.fixture(autouse=True)
def a_night_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are saved up by the clock; tests decide by the rate alone."""
    ticks = iter(range(0, 1_000_000, 100))
    monkeypatch.setattr(drift, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def turns(llm: LLM, *prompts: str) -> tuple[list[tuple[int, ...]], list[Any]]:
    made = [llm.generate(prompt, temperature=0.0, max_tokens=32, ignore_eos=True) for prompt in prompts]
    return [g.tokens for g in made], [g.report for g in made]


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_neurons_follow_the_text_and_the_tokens_stay(mode: str) -> None:
    """Of the model that comes with the package, whose activity is of code."""
    settings = {"device": "emulated", "vram_budget": "4MB", "mode": mode, "ubatch": 32}
    talk = (CODE, PROSE, PROSE, PROSE, CODE)
    with LLM.load(**settings) as llm:
        expected, still = turns(llm, *talk)
    assert [r.moved for r in still] == [None] * 5
    with LLM.load(**settings, drift="1GiB") as llm:
        memory = llm._loaded.placing.memory
        before = memory.ledger.rows()
        tokens, reports = turns(llm, *talk)
        assert memory.ledger.rows() == before
        assert memory.is_true
        planned = llm.plan
        assert planned is not None
        movable = llm._loaded.engine.watch.drift.movable  # type: ignore[union-attr]
        assert sum(layer.hot for layer in movable.layers) == sum(layer.hot for layer in planned.layers)
    assert tokens == expected
    moved = [report.moved for report in reports]
    assert moved[0] is None
    assert moved[2] is not None
    assert moved[2].hot_after > moved[2].hot_before
    assert reports[3].split.hot_share > reports[1].split.hot_share
    assert any(line.startswith("drift:") for line in reports[2].lines())
    assert reports[2].as_dict()["moved"]["neurons"] == moved[2].neurons


def test_no_more_bytes_are_moved_than_were_saved_up() -> None:
    settings = {"device": "emulated", "vram_budget": "4MB", "mode": "exact", "ubatch": 32}
    with LLM.load(**settings, drift="1B") as llm:
        assert [r.moved for r in turns(llm, CODE, PROSE, PROSE)[1]] == [None] * 3
    for rate in (2_000, 20_000):
        with LLM.load(**settings, drift=f"{rate}B") as llm:
            for report in turns(llm, CODE, PROSE, PROSE)[1][1:]:
                assert report.moved is not None
                assert 0 < report.moved.nbytes <= rate * drift.LONGEST


def test_neurons_with_biases_follow_the_text(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch, own_home: None) -> None:
    monkeypatch.setattr("thermocline.runtime.planning.LARGEST_CLUSTER", 32)
    settings: dict[str, Any] = {"device": "emulated", "threads": 1, "ctx_size": 32, "ubatch": 8}
    talk = ("he", "the cat", "the cat", "he", "he")

    def answers(llm: LLM) -> list[Any]:
        return [llm.generate(text, temperature=0.0, max_tokens=20, ignore_eos=True) for text in talk]

    with LLM.load(tiny_opt, vram_budget="60KB", **settings) as llm:
        expected = [answer.tokens for answer in answers(llm)]
    with LLM.load(tiny_opt, vram_budget="60KB", drift="1GiB", **settings) as llm:
        moved = answers(llm)
        assert llm._loaded.placing.memory.is_true
    assert [answer.tokens for answer in moved] == expected
    assert any(answer.report.moved is not None for answer in moved)


@pytest.fixture
def records(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: None) -> Path:
    """A model that can leave neurons on disk, with what a run needs beside it in the scale of tiny models."""
    bare = Overheads(staging=2_000, reading=0, graphs=0, margin_vram=0, margin_ram=0)
    monkeypatch.setattr("thermocline.runtime.planning.Overheads", lambda: bare)
    monkeypatch.setattr("thermocline.runtime.planning.EMULATED", replace(EMULATED, reading=2_000))
    monkeypatch.setattr("thermocline.runtime.planning.LARGEST_CLUSTER", 32)
    monkeypatch.setattr("thermocline.runtime.below.IN_FLIGHT", 0)
    for module in ("placement.problem", "runtime.placing", "memory.movable"):
        monkeypatch.setattr(f"thermocline.{module}.MOVING_BYTES", 1_000)
    with open_model(tiny_model) as source:
        convert(source, tmp_path / "tiny.gguf", None, records=True)
    with open_model(tmp_path / "tiny.gguf") as source:
        counts = np.random.default_rng(5).integers(0, 1000, (2, 96)).astype(np.int64)
        activity = Activity.from_counts(source.fingerprint, "tiny", counts, 1000)
    save_activity(activity, companion(tmp_path / "tiny.gguf", SidecarKind.ACTIVITY))
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_what_is_on_disk_is_read_ahead_or_changes_places(records: Path, device: str) -> None:
    more: dict[str, Any] = {"device": device, "threads": 1, "ctx_size": 64, "ubatch": 8}
    settings: dict[str, Any] = {"prompt": 8, "output": 8}
    if device == "emulated":
        more["vram_budget"] = settings["vram_budget"] = "56KB"
        settings["device"] = "emulated"
    talk = ("hello", "the cat", "the cat", "hello", "hello")
    with LLM.load(records, **more) as llm:
        expected, _ = turns(llm, *talk)
    whole = plan(records, ram_budget="2GiB", load=LoadSettings(**more, drift="1GiB"), **settings).plan
    budget = f"{whole.bytes_of(Tier.RAM) - 7_000}B"
    with LLM.load(records, **more, ram_budget=budget, drift="1GiB") as llm:
        assert llm._loaded.placing.below.store is not None
        memory = llm._loaded.placing.memory
        before = memory.ledger.rows()
        tokens, reports = turns(llm, *talk)
        assert memory.ledger.rows() == before
        assert memory.is_true
    assert tokens == expected
    assert any(report.moved is not None for report in reports)
    assert all(report.moved.hot_after >= report.moved.hot_before for report in reports if report.moved is not None)


def test_a_read_that_fails_ends_the_moving_and_not_the_request(records: Path) -> None:
    whole = plan(records, ram_budget="2GiB", load=LoadSettings(ctx_size=64, ubatch=8, drift="1GiB")).plan
    budget = f"{whole.bytes_of(Tier.RAM) - 7_000}B"
    with LLM.load(records, threads=1, ctx_size=64, ubatch=8, ram_budget=budget, drift="1GiB") as llm:
        expected, _ = turns(llm, "hello")
        watch, store = llm._loaded.engine.watch, llm._loaded.placing.below.store
        assert watch is not None
        assert watch.drift is not None
        assert store is not None
        real = store.read_hottest
        store.read_hottest = lambda *_: (_ for _ in ()).throw(UsageError("the disk is gone"))  # type: ignore[method-assign]
        assert turns(llm, "hello")[0] == expected
        assert watch.drift.failed == "the disk is gone"
        store.read_hottest = real  # type: ignore[method-assign]
        assert turns(llm, "hello")[0] == expected


# --- counts -----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_profile_and_add_up(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat")
    api.profile(tiny_model, [text], tmp_path / "profile.safetensors")
    profiled, out = load_activity(tmp_path / "profile.safetensors"), tmp_path / "counts.safetensors"
    for time in (1, 2):
        with LLM.load(tiny_model, count_activity=out, threads=1) as llm:
            prompt = [*llm._loaded.tokenizer.prefix, *llm.tokenize(text.read_text(), add_special=False)]
            llm.generate(prompt, temperature=0.0, max_tokens=1)
        counted = load_activity(out)
        assert counted.tokens == time * profiled.tokens
        np.testing.assert_array_equal(counted.fired, time * profiled.fired)
        assert len(counted.runs) == time
    merged = api.merge_activities([tmp_path / "profile.safetensors", out], tmp_path / "merged.safetensors")
    assert merged.tokens == 3 * profiled.tokens


def test_what_was_counted_long_ago_counts_less() -> None:
    counts, before = FiringCounts(1, 4), np.array([[1.0, 0.5, 0.0, 0.0]])
    np.testing.assert_array_equal(counts.temperatures(before), before)
    for fired in ([0, 1, 1, 0], [0, 1, 0, 1]):
        for _ in range(4000):
            counts.ffn_fired(0, np.array(fired))
            counts.end_step(1)
        counts.forget_lately()
    heat = counts.temperatures(before)[0]
    assert heat[1] > 0.9 > heat[3] > 2 * heat[2] > 0
    assert heat[0] < 0.1
    assert counts.activity("0" * 64, "m", "exact").fired.tolist() == [[0, 8000, 4000, 4000]]


# --- which neurons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_pairs_keep_the_number_of_hot_neurons_and_are_worth_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    temperatures, hot = rng.random((3, 40)), rng.random((3, 40)) < 0.4
    depths = rng.integers(0, 41, 3).tolist()
    comes, goes = drift._pairs(temperatures, hot, depths)
    assert len(comes) == len(goes)
    up, down = temperatures[tuple(comes.T)], temperatures[tuple(goes.T)]
    assert not hot[tuple(comes.T)].any()
    assert hot[tuple(goes.T)].all()
    assert (up - down >= MARGIN).all()
    assert (np.diff(up) <= 0).all()
    assert (np.diff(down) >= 0).all()


def test_pairs_reach_the_depths_that_were_asked_for() -> None:
    temperatures = np.tile(np.linspace(1, 0, 40), (2, 1))
    hot = np.zeros((2, 40), bool)
    hot[:, 25:] = True  # the coldest of all
    comes, goes = drift._pairs(temperatures, hot, [20, 10])
    hot[tuple(comes.T)], hot[tuple(goes.T)] = True, False
    assert hot.sum(axis=1).tolist() == [20, 10]
    assert hot[0, :20].all()
    assert len(drift._pairs(temperatures, hot, [20, 10])[0]) == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_drift_says_so(tiny_model: Path, tiny_silu: Path, tmp_path: Path) -> None:
    for settings, words in (
        ({"mode": "dense", "drift": "auto"}, "all neurons alike"),
        ({"device": "emulated", "vram_budget": "60KB", "ctx_size": 64, "drift": "0"}, "allowed"),
        ({"device": "emulated", "vram_budget": "60KB", "ctx_size": 64, "drift": "fast"}, "drift is"),
    ):
        with pytest.raises(UsageError, match=words):
            LLM.load(tiny_model, **settings)
    with pytest.raises(UsageError, match="every neuron fires"):
        LLM.load(tiny_silu, count_activity=tmp_path / "x.safetensors")
    with LLM.load(tiny_model, drift="auto") as llm:
        assert any("--drift does nothing" in notice for notice in llm.notices)
    with LLM.load(tiny_model, drift="auto", ram_budget="90%", ctx_size=64) as llm:
        assert llm.plan is not None
        assert any("--drift does nothing" in notice for notice in llm.notices)
    for call in (api.profile, api.audit, api.perplexity):
        more = (tmp_path / "out",) if call is api.profile else ()
        with pytest.raises(UsageError, match="of runs that generate"):
            call(tiny_model, [Path(__file__)], *more, LoadSettings(drift="auto"))  # type: ignore[operator]


def test_counts_are_not_added_to_another_models(tiny_model: Path, tiny_plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    with open_model(tiny_plain) as source:
        save_activity(Activity.from_counts(source.fingerprint, "other", np.ones((2, 96), np.int64), 5), other)
    kept = other.read_bytes()
    with pytest.raises(FingerprintError):
        LLM.load(tiny_model, count_activity=other)
    assert other.read_bytes() == kept
    other.write_bytes(b"nonsense")
    with pytest.raises(ModelFormatError):
        LLM.load(tiny_model, count_activity=other)


def test_where_no_counts_can_be_written_is_told_before_anything_is_generated(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("none/counts.safetensors", "file/counts.safetensors"):
        with pytest.raises(OutputError, match=r"counts.safetensors: cannot be written: .*directory"):
            LLM.load(tiny_model, count_activity=tmp_path / name)
    with pytest.raises(OutputError, match="is a folder; name a file"):
        LLM.load(tiny_model, count_activity=tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="its folder does not allow it"):
        LLM.load(tiny_model, count_activity=tmp_path / "counts.safetensors")


def test_predictors_move_along(
    with_predictor: Callable[..., Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictor's rows are in the order of the neurons; one that is always right shows a row that is not."""
    monkeypatch.setattr("thermocline.runtime.planning.LARGEST_CLUSTER", 32)
    model = with_predictor(tiny_model)
    talk = ("hello", "the cat", "abc", "hello")
    with LLM.load(model, mode="predicted", ctx_size=64, ubatch=8) as llm:
        expected, _ = turns(llm, *talk)
    settings = {"mode": "predicted", "ctx_size": 64, "ubatch": 8, "device": "emulated", "vram_budget": "60KiB"}
    with LLM.load(model, **settings, drift="1GiB") as llm:
        tokens, reports = turns(llm, *talk)
    assert tokens == expected
    assert any(report.moved is not None for report in reports)


def test_settings_of_a_copied_model_stay_its_own(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(tiny_model, copy)
    with LLM.load(copy, count_activity=tmp_path / "never.safetensors"):
        pass
    assert not (tmp_path / "never.safetensors").exists()  # nothing was generated
