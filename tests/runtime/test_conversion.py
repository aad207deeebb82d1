"""Conversion from end to end: orders, predictors, activities inside; refusals, interrupts and full disks."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import LLM, convert, describe, profile, quantize, read_activity
from thermocline import order as make_order
from thermocline.activity.applied import applied_order
from thermocline.activity.inside import predictor_inside
from thermocline.activity.predictor import save_predictor
from thermocline.config import LoadSettings
from thermocline.errors import (
    FingerprintError,
    ModelFormatError,
    NumericalError,
    OutputError,
    ThermoclineError,
    UsageError,
)
from thermocline.files.companion import companion
from thermocline.files.formats import F16, F32
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import write_gguf
from thermocline.files.open import open_model
from thermocline.files.powerinfer import PowerinferPredictor
from thermocline.files.powerinfer_folder import write_predictor_folder
from thermocline.files.quantize import from_float, to_float
from thermocline.files.sidecar import SidecarKind, read_sidecar, write_sidecar
from thermocline.model.families import family_of

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 16}
TEXT = "def first(n):\n    return n + 1\n" * 20


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))


@pytest.fixture
def activity(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(TEXT)
    path = tmp_path / "m.activity.safetensors"
    profile(model, [tmp_path / "code.py"], path, LoadSettings(ctx_size=64, threads=1))
    return path


@pytest.fixture
def predictor(model: Path, oracle: Any, tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    with open_model(model) as source:
        save_predictor(oracle(source, 1e-20, 0.5), path, source.fingerprint, model_name="tiny")
    return path


def says(path: Path, **settings: Any) -> str:
    with LLM.load(path, threads=1, **settings) as llm:
        return llm.generate("def ", **GREEDY).text


def test_ordered_with_its_predictor_it_says_the_same(model: Path, activity: Path, predictor: Path) -> None:
    out = model.with_name("out.gguf")
    done = convert(model, out, activity=activity, predictor=predictor)
    assert done.written == out.stat().st_size
    assert done.read == sum(len(t.data) for t in GgufFile.open(model).tensors.values())
    assert done.tokens == read_activity(activity).tokens
    plain = says(model)
    assert says(out) == plain
    assert says(out, mode="predicted") == plain
    assert says(out, mode="dense") == plain


def test_the_activity_inside_is_for_the_new_numbers(model: Path, activity: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(model, out, activity=activity)
    before, after = read_activity(activity), read_activity(out)
    assert [p.name for p in tmp_path.glob("out*")] == ["out.gguf"]
    assert (after.tokens, after.runs, after.sizes.tolist()) == (before.tokens, before.runs, before.sizes.tolist())
    assert after.model_fingerprint == GgufFile.open(out).fingerprint != before.model_fingerprint
    assert (np.diff(after.fired, axis=1) <= 0).all()
    assert (np.sort(after.fired) == np.sort(before.fired)).all()
    assert (after.order == np.arange(96)).all()
    again = tmp_path / "again"
    profile(out, [tmp_path / "code.py"], again, LoadSettings(ctx_size=64, threads=1))
    # In another order sums are rounded otherwise, so that a neuron at the border fires or not, here and there.
    counted = read_activity(again)
    assert np.abs(counted.fired - after.fired).sum() <= 0.001 * after.fired.sum()
    np.testing.assert_allclose(counted.contribution, after.contribution, rtol=0.01, atol=0.01)


def test_counts_of_the_original_still_order_a_converted_model(model: Path, activity: Path, tmp_path: Path) -> None:
    make_order(activity, tmp_path / "by", by="contribution")
    convert(model, tmp_path / "a.gguf", order=tmp_path / "by", outtype="f16")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", activity=activity)
    convert(model, tmp_path / "c.gguf", activity=activity, outtype="f16")
    b, c = GgufFile.open(tmp_path / "b.gguf"), GgufFile.open(tmp_path / "c.gguf")
    fired = [read_activity(tmp_path / f"{name}.gguf").fired for name in "bc"]
    assert (fired[0] == fired[1]).all()
    assert set(b.weights) == set(c.weights)
    other = quantize(tmp_path / "b.gguf", tmp_path / "d.gguf", "Q8_0")
    assert not other.powerinfer
    convert(tmp_path / "d.gguf", tmp_path / "e.gguf", activity=activity)  # of the first model, by way of two others


def test_an_activity_inside_goes_along_whatever_is_made_of_the_model(
    model: Path, activity: Path, tmp_path: Path
) -> None:
    make_order(activity, tmp_path / "by", by="contribution")
    a = tmp_path / "a.gguf"
    convert(model, a, activity=activity)
    quantize(a, tmp_path / "b.gguf", "F16")
    assert (read_activity(tmp_path / "b.gguf").fired == read_activity(a).fired).all()
    convert(model, tmp_path / "c.gguf", activity=a.with_name("by").with_name(activity.name))
    make_order(a, tmp_path / "again", by="contribution")
    convert(a, tmp_path / "d.gguf", order=tmp_path / "again")
    direct = tmp_path / "e.gguf"
    convert(model, direct, order=tmp_path / "by")
    assert says(tmp_path / "d.gguf") == says(direct)
    moved, counted = read_activity(tmp_path / "d.gguf"), read_activity(activity)
    with open_model(model) as source:
        order = applied_order(GgufFile.open(tmp_path / "d.gguf").metadata, family_of(source).spec(source))
    assert order is not None
    assert (moved.fired == np.take_along_axis(counted.fired, order.order.astype(int), axis=1)).all()
    assert (moved.contribution == np.take_along_axis(counted.contribution, order.order.astype(int), axis=1)).all()
    assert (np.diff(moved.contribution, axis=1) <= 0).all()


def test_what_lies_beside_of_another_model_is_told(model: Path, activity: Path, tmp_path: Path) -> None:
    beside = companion(tmp_path / "out.gguf", SidecarKind.ACTIVITY)
    shutil.copy(activity, beside)
    done = convert(model, tmp_path / "out.gguf", activity=activity)
    assert any("out.activity.safetensors is of another model" in note for note in done.notes)
    assert beside.read_bytes() == activity.read_bytes()


def test_a_predictor_beside_of_another_model_is_told(
    model: Path, activity: Path, predictor: Path, tmp_path: Path
) -> None:
    shutil.copy(predictor, companion(tmp_path / "out.gguf", SidecarKind.PREDICTOR))
    done = convert(model, tmp_path / "out.gguf", activity=activity)
    (note,) = done.notes
    assert note.endswith("out.predictor.safetensors is of another model: it will not be used with this one")
    done = convert(model, tmp_path / "out.gguf", activity=activity, predictor=predictor, force=True)
    assert done.notes[0].endswith("will not be used with this one, and hides the predictor inside")


def test_that_a_predictor_inside_is_not_audited_is_told(model: Path, predictor: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    (note,) = convert(model, out, predictor=predictor).notes
    assert note.startswith("the predictor inside was not audited with this file's numbers: --mode auto does not use it")
    with open_model(out) as written:
        write_sidecar(companion(out, SidecarKind.AUDIT), SidecarKind.AUDIT, written.fingerprint, {"audit": {}}, {})
    assert convert(model, out, predictor=predictor, force=True).notes == ()
    assert convert(model, tmp_path / "none.gguf").notes == ()


def test_a_predictor_that_is_not_finite_or_damaged_does_not_go_inside(
    model: Path, predictor: Path, tmp_path: Path
) -> None:
    sidecar = read_sidecar(predictor)
    fc1 = to_float(sidecar.weights["blk.0.fc1.weight"]).copy()
    fc1[3, 5] = np.nan
    weights = {**sidecar.weights, "blk.0.fc1.weight": from_float("fc1", fc1, F32)}
    nan = tmp_path / "nan.safetensors"
    write_sidecar(nan, SidecarKind.PREDICTOR, sidecar.model_fingerprint, sidecar.info, {**sidecar.arrays, **weights})
    for outtype in ("auto", "q8_0"):
        with pytest.raises(NumericalError, match=r"nan\.safetensors: .*fc1.* NaN or infinity"):
            convert(model, tmp_path / "out.gguf", predictor=nan, outtype=outtype)
    content = bytearray(predictor.read_bytes())
    content[-3] ^= 1
    nan.write_bytes(content)
    with pytest.raises(ModelFormatError, match="checksum"):
        convert(model, tmp_path / "out.gguf", predictor=nan)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "blk.1.ffn_down.weight", "blk.1.attn_norm.weight"])
@pytest.mark.parametrize("outtype", ["same", "q8_0", "q4_0", "q6_k"])
def test_weights_that_are_not_finite_are_not_written(
    tiny_model: Path, broken: Any, tmp_path: Path, tensor: str, outtype: str
) -> None:
    wrong, out = broken(tiny_model, tensor), tmp_path / "out.gguf"
    with pytest.raises(NumericalError, match=f"tensor {re.escape(tensor)} holds NaN"):
        convert(wrong, out) if outtype == "same" else quantize(wrong, out, outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("outtype", ["auto", "f16"])
def test_standard_leaves_the_predictor_inside_behind(
    model: Path, predictor: Path, tmp_path: Path, outtype: str
) -> None:
    convert(model, tmp_path / "both.gguf", predictor=predictor)
    done = convert(tmp_path / "both.gguf", tmp_path / "out.gguf", standard=True, outtype=outtype)
    assert done.notes == ("the predictor inside is left out: other engines cannot read it",)
    out = GgufFile.open(tmp_path / "out.gguf")
    assert set(out.tensors) == set(GgufFile.open(model).tensors)
    assert not [key for key in out.typed_metadata() if "predictor" in key or "sparse_threshold" in key]


def test_other_models_are_refused_by_fingerprint(
    model: Path, activity: Path, predictor: Path, tiny_plain: Path, tmp_path: Path
) -> None:
    make_order(activity, tmp_path / "by")
    for wrong in ({"activity": activity}, {"predictor": predictor}, {"order": tmp_path / "by"}):
        with pytest.raises(FingerprintError):
            convert(tiny_plain, tmp_path / "out.gguf", **wrong)
    assert not (tmp_path / "out.gguf").exists()


def test_a_folder_of_powerinfers_predictors_goes_inside(model: Path, oracle: Any, tmp_path: Path) -> None:
    with open_model(model) as source:
        found = oracle(source)
    write_predictor_folder(tmp_path / "folder", PowerinferPredictor(found.layers, 1e-20))
    convert(model, tmp_path / "out.gguf", predictor=tmp_path / "folder")
    inside = predictor_inside(GgufFile.open(tmp_path / "out.gguf"))
    assert inside is not None
    assert inside.thresholds == pytest.approx((1e-20, 1e-20))
    assert says(tmp_path / "out.gguf", mode="predicted") == says(model)
    convert(model, tmp_path / "low.gguf", predictor=tmp_path / "folder", threshold=-1.0)
    assert predictor_inside(GgufFile.open(tmp_path / "low.gguf")).thresholds == (-1.0, -1.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 64, 96), "found 2 of 2 layers; missing: fc1 of layer 1, fc2 of layer 1"),
        ((3, 64, 96), "found 6 of 2 layers"),
        ((2, 96, 96), "goes from 96 inputs to 96 neurons; the model has 64 and 96"),
        ((2, 64, 128), "goes from 64 inputs to 128 neurons; the model has 64 and 96"),
    ],
)
@pytest.mark.parametrize("outtype", ["auto", "f16"])
def test_a_predictor_of_another_network_inside_is_not_carried_on(
    model: Path, tmp_path: Path, outtype: str, sizes: tuple[int, int, int], words: str
) -> None:
    n_layer, n_embd, n_ff = sizes
    wrong = [
        from_float(f"blk.{i}.{name}.weight", np.ones(shape, np.float32), F16)
        for i in range(n_layer)
        for name, shape in (("fc1", (32, n_embd)), ("fc2", (n_ff, 32)))
    ]
    source = GgufFile.open(model)
    write_gguf(tmp_path / "wrong.gguf", source.typed_metadata(), [*source.weights.values(), *wrong])
    with pytest.raises(ModelFormatError) as caught:
        convert(tmp_path / "wrong.gguf", tmp_path / "out.gguf", outtype=outtype)
    assert words in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_standard_and_dense_models_keep_the_layout_of_other_engines(
    model: Path, tiny_silu: Path, tmp_path: Path
) -> None:
    convert(model, tmp_path / "standard.gguf", standard=True, outtype="f16")
    convert(tiny_silu, tmp_path / "silu.gguf", outtype="f16")
    convert(model, tmp_path / "records.gguf", outtype="f16")
    parts = [
        {name.split(".")[2] for name in GgufFile.open(tmp_path / f"{name}.gguf").tensors if "ffn_down" in name}
        for name in ("standard", "silu", "records")
    ]
    assert parts == [{"ffn_down"}, {"ffn_down"}, {"ffn_down_t"}]
    # What is stored as it was keeps its format by default, and quantising keeps the layout.
    convert(model, tmp_path / "auto.gguf")
    assert {t.format.name for t in GgufFile.open(tmp_path / "auto.gguf").tensors.values()} == {"F32", "Q8_0"}
    quantize(tmp_path / "records.gguf", tmp_path / "q.gguf", "q4_0")
    tensors = GgufFile.open(tmp_path / "q.gguf").tensors
    assert tensors["blk.0.ffn_down_t.weight"].format.name == "Q4_0"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"outtype": "q5_1"}, "outtype is q5_1; allowed: auto, f32, f16, bf16, q8_0, q4_0"),
    "both": ({"activity": "a", "order": "b"}, "give --activity or --order, not both"),
    "standard order": ({"standard": True, "order": "b"}, "--standard writes what other engines read"),
    "standard predictor": ({"standard": True, "predictor": "b"}, "--standard writes what other engines read"),
    "standard threshold": ({"standard": True, "threshold": 0.5}, "--standard writes what other engines read"),
    "powerinfer type": ({"powerinfer": True, "outtype": "q8_0"}, "PowerInfer computes with auto, f16, q4_0"),
    "threshold of nobody": ({"threshold": 0.0}, "none is inside the model: name one with --predictor"),
    "powerinfer without": ({"powerinfer": True}, "PowerInfer's loader needs a predictor"),
    "unknown": ({"outttype": "f16"}, "outttype is no setting; known are outtype, predictor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(model: Path, tmp_path: Path, name: str) -> None:
    wanted, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        convert(model, tmp_path / "out.gguf", **wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_dense_models_have_nothing_to_predict(tiny_silu: Path, tmp_path: Path) -> None:
    for wanted in ({"predictor": "p"}, {"powerinfer": True}):
        with pytest.raises(UsageError, match="silu gives no zeros"):
            convert(tiny_silu, tmp_path / "out.gguf", **wanted)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q3_K", "", "f64"])
def test_types_that_are_not_made(model: Path, tmp_path: Path, kind: str) -> None:
    hint = "; mixtures of types are not made" if kind == "Q4_K_M" else ""
    with pytest.raises(UsageError, match=f"Q4_K, Q5_K, Q6_K{hint}$"):
        quantize(model, tmp_path / "out.gguf", kind)


def test_files_that_are_there_are_kept_unless_forced(model: Path, activity: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    for act in (lambda **f: convert(model, out, **f), lambda **f: quantize(model, out, "Q4_0", **f)):
        with pytest.raises(UsageError, match=r"out\.gguf is there already; --force replaces it"):
            act()
        assert out.read_text() == "mine"
    convert(model, out, force=True)
    assert GgufFile.open(out).tensors


def test_a_model_may_replace_itself(model: Path) -> None:
    before = says(model)
    convert(model, model, outtype="f32", force=True)
    assert {t.format.name for t in GgufFile.open(model).tensors.values()} == {"F32"}
    assert says(model) == before


# Killed, cut short, out of space


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_full_disk_leaves_the_old_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out, writes, real = tmp_path / "out.gguf", [], os.write
    out.write_text("old")

    def full(descriptor: int, data: Any) -> int:
        writes.append(1)
        if len(writes) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr("thermocline.files.atomic.os.write", full)
        with pytest.raises(OutputError, match="No space left"):
            convert(model, out, outtype="f16", force=True)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]


def test_too_little_space_is_told_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*disk[:3], 0, 0, *disk[5:])))
    tensors: list[str] = []
    with pytest.raises(OutputError, match="0 are free on its disk"):
        convert(model, tmp_path / "out.gguf", progress=lambda done, total, name: tensors.append(name))
    assert tensors == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_at_every_tensor_leaves_nothing(model: Path, tmp_path: Path, error: type[BaseException]) -> None:
    count = len(GgufFile.open(model).tensors)

    def stop_at(last: int) -> Callable[[int, int, str], None]:
        seen: list[str] = []

        def tell(done: int, total: int, name: str) -> None:
            seen.append(name)
            if len(seen) > last:
                raise error

        return tell

    for last in range(count):
        with pytest.raises(error):
            convert(model, tmp_path / "out.gguf", outtype="f16", progress=stop_at(last))
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


KILLED = """
import sys
from thermocline import convert
convert(sys.argv[1], sys.argv[2], outtype="f16", force=True, progress=lambda d, t, name: print(name, flush=True))
print("done", flush=True)
"""


def test_kill_minus_nine_in_a_loop(model: Path, tmp_path: Path) -> None:
    """Whenever it is killed, there is no file, or the old one; the next run clears what the last one left."""
    out, kills = tmp_path / "out.gguf", 0
    convert(model, tmp_path / "whole.gguf", outtype="f16")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for lines in (1, 5, 12, 20, 1000, 1, 15):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(model), str(out)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        told = [line for _, line in zip(range(lines), iter(child.stdout.readline, b""), strict=False)]
        child.kill()
        child.communicate()
        kills += child.returncode == -9 and b"done\n" not in told
        assert not out.exists() or out.read_bytes() == whole
    assert kills >= 4
    assert out.read_bytes() == whole
    convert(model, out, outtype="f16", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf", "whole.gguf"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4", b"{}"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    for act in (
        lambda: convert(tmp_path / "m.gguf", tmp_path / "o"),
        lambda: quantize(tmp_path / "m.gguf", "o", "F16"),
    ):
        with pytest.raises(ThermoclineError):
            act()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# For PowerInfer


@pytest.fixture
def reglu(tiny_silu: Path, tmp_path: Path) -> Path:
    """The SwiGLU model as ReGLU, which PowerInfer computes."""
    source = GgufFile.open(tiny_silu)
    write_gguf(
        tmp_path / "m.gguf",
        source.typed_metadata() | {"llama.hidden_activation": "relu"},
        list(source.weights.values()),
    )
    return tmp_path / "m.gguf"


def magic(path: Path) -> bytes:
    return path.read_bytes()[:4]


def test_a_file_for_powerinfer_predicts_here_as_there(reglu: Path, oracle: Any, tmp_path: Path) -> None:
    with open_model(reglu) as source:
        save_predictor(oracle(source, 1e-20), tmp_path / "p.safetensors", source.fingerprint)
    out = tmp_path / "out.gguf"
    done = convert(reglu, out, predictor=tmp_path / "p.safetensors", powerinfer=True)
    assert done.powerinfer
    assert magic(out) == b"PWRI"
    assert (describe(out).kind, describe(reglu).kind) == ("powerinfer", "gguf")
    stored = GgufFile.open(out)
    assert stored.metadata["powerinfer.sparse_threshold"] == pytest.approx(1e-20)
    assert {t.format.name for t in stored.tensors.values()} == {"F32", "F16"}
    convert(reglu, tmp_path / "f16.gguf", outtype="f16")
    assert says(out, mode="predicted") == says(tmp_path / "f16.gguf")
    # Its neurons in another order, from the predictor that is inside; then as PowerInfer's INT4.
    (tmp_path / "code.py").write_text(TEXT)
    profile(out, [tmp_path / "code.py"], tmp_path / "a", LoadSettings(ctx_size=64, threads=1))
    again = convert(out, tmp_path / "sorted.gguf", powerinfer=True, activity=tmp_path / "a")
    assert again.powerinfer
    assert magic(tmp_path / "sorted.gguf") == b"PWRI"
    assert says(tmp_path / "sorted.gguf", mode="predicted") == says(out)


def test_powerinfers_files_stay_its_own_where_it_computes_with_the_type(
    reglu: Path, oracle: Any, tmp_path: Path
) -> None:
    with open_model(reglu) as source:
        save_predictor(oracle(source, 1e-20), tmp_path / "p.safetensors", source.fingerprint)
    convert(reglu, tmp_path / "f.gguf", predictor=tmp_path / "p.safetensors", powerinfer=True)
    done = quantize(tmp_path / "f.gguf", tmp_path / "q4.gguf", "Q4_0")
    assert done.powerinfer
    assert magic(tmp_path / "q4.gguf") == b"PWRI"
    assert GgufFile.open(tmp_path / "q4.gguf").tensors["blk.0.fc2.weight"].format.name == "Q4_0"
    done = quantize(tmp_path / "f.gguf", tmp_path / "q8.gguf", "Q8_0")
    assert not done.powerinfer
    assert magic(tmp_path / "q8.gguf") == b"GGUF"
    assert done.notes[0] == "PowerInfer computes with F16, Q4_0 only: the file is for Thermocline"
    assert says(tmp_path / "q8.gguf", mode="predicted") == says(tmp_path / "q8.gguf")
