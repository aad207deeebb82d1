"""Activities on disk: they come back, and what no run can have counted is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thermocline.activity.accumulator import Accumulator
from thermocline.activity.statistics import Activity
from thermocline.activity.store import INFO_KEY, PREFIX, activity_metadata, find_activity, load_activity, save_activity
from thermocline.errors import ModelFormatError, UsageError
from thermocline.files.formats import F32
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import write_gguf
from thermocline.files.quantize import from_float
from thermocline.files.sidecar import SidecarKind, read_sidecar, write_sidecar

MODEL = "ab" * 32


@pytest.fixture
def counted() -> Activity:
    random = np.random.default_rng(2)
    accumulator = Accumulator(Activity.empty(MODEL, "tiny", 2, 10, threshold=0.25), np.ones((2, 10)))
    accumulator.begin_sequence()
    for layer in range(2):
        accumulator.ffn_hidden(layer, np.maximum(random.normal(size=(12, 10)), 0).astype(np.float32))
    return accumulator.result(({"id": "r", "tokens": 12},))


def test_it_comes_back(counted: Activity, tmp_path: Path, same) -> None:
    path = tmp_path / "x.activity.safetensors"
    checksum = save_activity(counted, path)
    found = load_activity(path)
    assert same(found, counted)
    assert (found.runs, found.model_name) == (({"id": "r", "tokens": 12},), "tiny")
    sidecar = read_sidecar(path)
    assert (sidecar.checksum, sidecar.kind) == (checksum, SidecarKind.ACTIVITY)
    assert np.array_equal(sidecar.arrays["order"], counted.order)


def test_counts_alone_are_an_activity_too(tmp_path: Path, same) -> None:
    activity = Activity.from_counts(MODEL, "powerinfer", np.array([[3, 0, 5]]), 9)
    save_activity(activity, tmp_path / "x")
    assert same(load_activity(tmp_path / "x"), activity)


def test_tokens_that_are_not_known_stay_so(tmp_path: Path) -> None:
    fired = np.array([[3, 0, 5]])
    known = Activity.from_counts(MODEL, "powerinfer", fired, 9)
    save_activity(replace(known, tokens_known=False), tmp_path / "x")
    found = load_activity(tmp_path / "x")
    assert not found.tokens_known
    assert found.summary()["tokens_known"] is False
    assert not known.merge(found).tokens_known
    assert not Accumulator(found, np.ones((1, 3))).result().tokens_known
    save_activity(known, tmp_path / "y", more={"tokens_known": 1})
    with pytest.raises(ModelFormatError, match="neither true nor false"):
        load_activity(tmp_path / "y")


def broken(counted: Activity) -> dict[str, tuple[dict[str, object], str]]:
    many = counted.fired.copy()
    many[0, 0] = 13
    negative = counted.fired.copy()
    negative[0, 0] = -1
    nan = counted.contribution.copy()
    nan[1, 1] = np.nan
    return {
        "more than all tokens": ({"fired": many}, "order|fired"),
        "less than none": ({"fired": negative}, "outside 0"),
        "wrong type": ({"fired": counted.fired.astype(np.float64)}, "needed: int64"),
        "wrong axes": ({"fired": counted.fired[0]}, "needed: int64 of 2 axes"),
        "no neurons": ({"fired": counted.fired[:, :0]}, "no neurons|contribution"),
        "not finite": ({"contribution": nan}, "finite"),
        "below zero": ({"contribution": -counted.contribution}, "finite number from 0"),
        "another shape": ({"contribution": counted.contribution[:1]}, "contribution: is float64"),
        "not that order": ({"order": counted.order[:, ::-1]}, "not the order"),
        "too many sets": ({"sizes": counted.sizes + 1}, "active sets"),
        "more shared than there is": (
            {"token_overlap": np.stack([counted.token_overlap.total + 1, counted.token_overlap.total])},
            "more than what fired",
        ),
        "more compared than fired": (
            {"layer_overlap": np.full((2, 2), 10**6)},
            "more than what fired",
        ),
        "missing": ({"sizes": None}, "sizes: is missing"),
    }


CASES = list(broken(Activity.from_counts(MODEL, "m", np.ones((2, 2), int), 1)))


@pytest.mark.parametrize("case", CASES)
def test_what_no_run_can_have_counted_is_refused(counted: Activity, tmp_path: Path, case: str) -> None:
    changes, problem = broken(counted)[case]
    path = tmp_path / "x"
    save_activity(counted, path)
    good = read_sidecar(path)
    arrays = {name: array for name, array in {**good.arrays, **changes}.items() if array is not None}
    write_sidecar(path, SidecarKind.ACTIVITY, MODEL, good.info, arrays)
    with pytest.raises(ModelFormatError, match=problem):
        load_activity(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": -1}, "info.tokens"),
        ({"tokens": 3.0}, "info.tokens"),
        ({"tokens": True}, "info.tokens"),
        ({"tokens": 1 << 60}, "info.tokens"),
        ({"sequences": None}, "info.sequences"),
        ({"threshold": -1}, "info.threshold"),
        ({"threshold": "0"}, "info.threshold"),
        ({"runs": {}}, "info.runs"),
        ({"runs": [1]}, "info.runs"),
        ({"runs": [{"id": ["x"]}]}, "info.runs"),
    ],
)
def test_hostile_info_is_refused(counted: Activity, tmp_path: Path, change, problem: str) -> None:
    path = tmp_path / "x"
    save_activity(counted, path)
    good = read_sidecar(path)
    write_sidecar(path, SidecarKind.ACTIVITY, MODEL, {**good.info, **change}, good.arrays)
    with pytest.raises(ModelFormatError, match=problem):
        load_activity(path)


def test_a_journal_is_no_activity(counted: Activity, tmp_path: Path) -> None:
    save_activity(counted, tmp_path / "x", kind=SidecarKind.JOURNAL)
    with pytest.raises(ModelFormatError, match="kind journal; needed is one of kind activity"):
        load_activity(tmp_path / "x")


@pytest.mark.parametrize("call", ["find_activity({!r})", "is_gguf(Path({!r}))"])
def test_a_pipe_is_refused_and_not_waited_for(call: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    source = "from pathlib import Path\nfrom thermocline.activity.store import find_activity, is_gguf\n"
    source += f"print({call.format(str(tmp_path / 'pipe'))})"
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert "is a pipe; a regular file is needed" in ran.stderr or ran.stdout == "False\n"


def test_a_predictor_or_a_text_is_no_activity(counted: Activity, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("tokens")
    with pytest.raises(ModelFormatError):
        load_activity(tmp_path / "x")
    with pytest.raises(ModelFormatError, match="does not exist"):
        load_activity(tmp_path / "nowhere")


# Inside model files


def model_with(path: Path, metadata: dict[str, object]) -> Path:
    write_gguf(path, {"general.name": "tiny", **metadata}, [from_float("w", np.ones((2, 32), np.float32), F32)])
    return path


def test_it_comes_back_from_a_model_file(counted: Activity, tmp_path: Path, same) -> None:
    path = model_with(tmp_path / "m.gguf", activity_metadata(counted))
    found = find_activity(path)
    assert same(replace(found, model_fingerprint=MODEL), counted)
    assert found.model_fingerprint == GgufFile.open(path).fingerprint
    assert (found.model_name, found.runs, found.threshold) == ("tiny", counted.runs, 0.25)
    save_activity(counted, tmp_path / "x")
    assert same(find_activity(tmp_path / "x"), counted)
    # What is added up and written back is a sidecar: a model must never be taken for one.
    with pytest.raises(ModelFormatError):
        load_activity(path)
    with pytest.raises(UsageError, match="has no activity inside"):
        find_activity(model_with(tmp_path / "bare.gguf", {}))


INSIDE_BROKEN: dict[str, tuple[str, object]] = {
    "no JSON": (INFO_KEY, "{"),
    "a number": (INFO_KEY, np.uint32(5)),
    "no layers": (INFO_KEY, '{"tokens": 12, "sequences": 1, "threshold": 0, "runs": []}'),
    "layers of nothing": (INFO_KEY, '{"layers": 0, "tokens": 12, "sequences": 1, "threshold": 0, "runs": []}'),
    "many layers": (INFO_KEY, '{"layers": 99999999999, "tokens": 12, "sequences": 1, "threshold": 0, "runs": []}'),
    "other layers": (INFO_KEY, '{"layers": 4, "tokens": 12, "sequences": 1, "threshold": 0, "runs": []}'),
    "fewer tokens": (INFO_KEY, '{"layers": 2, "tokens": 1, "sequences": 1, "threshold": 0, "runs": []}'),
    "narrow counts": (f"{PREFIX}fired", np.zeros(20, np.int32)),
    "no counts": (f"{PREFIX}fired", np.zeros(0, np.int64)),
    "half a row": (f"{PREFIX}fired", np.zeros(19, np.int64)),
    "below zero": (f"{PREFIX}fired", np.full(20, -1, np.int64)),
    "more than all": (f"{PREFIX}fired", np.full(20, 13, np.int64)),
    "words": (f"{PREFIX}fired", ["a", "b"]),
    "whole": (f"{PREFIX}contribution", np.zeros(20, np.int64)),
    "not finite": (f"{PREFIX}contribution", np.full(20, np.nan)),
    "few sizes": (f"{PREFIX}sizes", np.zeros(2, np.int64)),
    "long overlap": (f"{PREFIX}token_overlap", np.zeros(6, np.int64)),
}


@pytest.mark.parametrize("name", INSIDE_BROKEN)
def test_what_is_inside_and_damaged_is_refused(counted: Activity, tmp_path: Path, name: str) -> None:
    key, value = INSIDE_BROKEN[name]
    path = model_with(tmp_path / "m.gguf", {**activity_metadata(counted), key: value})
    with pytest.raises(ModelFormatError):
        find_activity(path)


@pytest.mark.parametrize("key", ["fired", "contribution", "sizes", "token_overlap", "layer_overlap"])
def test_what_is_inside_and_incomplete_is_refused(counted: Activity, tmp_path: Path, key: str) -> None:
    metadata = activity_metadata(counted)
    del metadata[f"{PREFIX}{key}"]
    with pytest.raises(ModelFormatError, match="is missing"):
        find_activity(model_with(tmp_path / "m.gguf", metadata))
