"""`convert`, `quantize`, and PowerInfer's folders on the command line."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thermocline import read_activity
from thermocline.activity.predictor import load_predictor, save_predictor
from thermocline.files.gguf import GgufFile
from thermocline.files.open import open_model
from thermocline.files.quantize import to_float

CALL = ("-c", 64, "-t", 1)
LAYERS, NEURONS, WIDTH = 2, 96, 64


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))


@pytest.fixture
def activity(command, model, tmp_path) -> Path:
    (tmp_path / "code.py").write_text("def first(n):\n    return n + 1\n" * 20)
    assert command("profile", "-m", model, "--text", "code.py", "-o", "a", *CALL).code == 0
    return tmp_path / "a"


@pytest.fixture
def predictor(model, oracle, tmp_path) -> Path:
    with open_model(model) as source:
        save_predictor(oracle(source, 0.25), tmp_path / "p.safetensors", source.fingerprint, model_name="tiny")
    return tmp_path / "p.safetensors"


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n")


def test_convert_tells_what_it_wrote_and_what_was_lost(command, model) -> None:
    done = command("convert", model, "--outtype", "Q4_0", "-o", "out.gguf")
    assert (done.code, done.err) == (0, "")
    assert "out.gguf: " in done.out
    assert "GB/s read and written" in done.out
    assert "lost less" in done.out
    again = command("convert", model, "--outtype", "q4_0", "-o", "out.gguf")
    assert again.code == 2
    assert again.err == "error: out.gguf is there already; --force replaces it\n"
    record = json.loads(command("convert", model, "--outtype", "q4_0", "-o", "out.gguf", "--force", "--json").out)
    assert record["written"] == Path("out.gguf").stat().st_size
    assert record["read"] == sum(len(t.data) for t in GgufFile.open(model).tensors.values())
    assert (record["powerinfer"], record["activity_tokens"], record["notes"]) == (False, None, [])
    errors = {t["name"]: t for t in record["tensors"]}
    assert errors["blk.0.attn_q.weight"]["to"] == "Q4_0"
    assert 0.03 < errors["blk.0.attn_q.weight"]["relative_error"] < 0.2


@pytest.mark.parametrize("output", [".", "", "/"])
def test_an_output_that_is_no_files_name_is_refused(command, model, activity, predictor, output: str) -> None:
    for call in (("convert", model, "-o", output), ("quantize", model, output, "q4_0")):
        for more in ([], ["--force"]):
            refused = command(*call, *more)
            assert refused.code == 2
            assert "which is a folder; name a file to write" in refused.err
            assert one_line(refused.err)
    for call in (("activity", "export", activity), ("predictor", "export", predictor)):
        refused = command(*call, "-o", output)
        assert refused.code == 1
        assert "is there already: remove it, or name a new folder" in refused.err
    for call in (
        ("activity", "order", activity),
        ("activity", "merge", activity, activity),
        ("report", activity),
        ("profile", "-m", model, "--text", "code.py", *CALL),
        ("train-predictor", "-m", model, "--text", "code.py", *CALL),
        ("plan", "-m", model, "--machine", "pc-high"),
    ):
        refused = command(*call, "-o", output)
        assert refused.code in (1, 2)
        assert one_line(refused.err)


def test_quantize_lists_every_tensor(command, model) -> None:
    done = command("quantize", model, "out.gguf", "q4_0")
    assert (done.code, done.err) == (0, "")
    for name, tensor in GgufFile.open(model).tensors.items():
        assert (name in done.out.split()) == (tensor.format.name == "Q8_0" and name not in KEPT)
    stored = GgufFile.open("out.gguf").weights["blk.0.ffn_up.weight"]
    exact = to_float(GgufFile.open(model).weights["blk.0.ffn_up.weight"]).astype(float)
    error = np.sqrt(((to_float(stored) - exact) ** 2).mean() / (exact**2).mean())
    line = next(line for line in done.out.splitlines() if "blk.0.ffn_up.weight" in line)
    assert f"{error:.2e}" in line


KEPT = {"token_embd.weight", "output.weight"}
"""Stored as Q8_0 before and after."""


def test_everything_into_one_file(command, model, activity, predictor) -> None:
    call = ("convert", model, "--activity", activity, "--predictor", predictor, "-o", "out.gguf")
    done = command(*call)
    assert (done.code, done.err) == (0, "")
    inside = read_activity("out.gguf")
    assert f"inside, counted over {inside.tokens:,} tokens" in " ".join(done.out.split())
    assert (inside.order == np.arange(NEURONS)).all()
    assert f"{inside.tokens:,} tokens" in command("activity", "show", "out.gguf").out
    assert command("report", "out.gguf", "-o", "page.html").code == 0
    assert "Which neurons of tiny fire" in Path("page.html").read_text()
    said = [command("run", "-m", m, "-p", "def", "-n", 8, "--temp", 0, *CALL).out for m in (model, "out.gguf")]
    assert said[0] == said[1]
    shown = json.loads(command("show", "out.gguf", "--json").out)
    assert shown["predictor"]["ranks"] == [192, 192]
    assert shown["activity_tokens"] == inside.tokens
    assert f"counted over {inside.tokens:,} tokens" in command("show", "out.gguf").out


def test_a_file_for_powerinfer_and_back(command, model, predictor, tiny_model) -> None:
    # The tiny model squares its ReLU, which PowerInfer does not compute.
    refused = command("convert", model, "--predictor", predictor, "--powerinfer", "-o", "out.gguf")
    assert refused.code == 1
    assert "PowerInfer cannot run family arcee" in refused.err
    assert one_line(refused.err)
    assert not Path("out.gguf").exists()


def test_tokens_that_nobody_counted_are_not_told_as_counted(command, model, activity) -> None:
    command("activity", "export", activity, "-o", "activation")
    command("activity", "import", "activation", "-m", model, "-o", "b")
    shown = command("activity", "show", "b").out
    found = read_activity("b")
    assert f"at least {found.tokens:,} tokens: how many is not known" in shown
    assert f"at most {found.active_share.mean():.1%}" in shown
    assert "0 sequences" not in shown
    assert json.loads(command("activity", "show", "b", "--json").out)["tokens_known"] is False
    command("convert", model, "--activity", "b", "-o", "out.gguf")
    assert "at least" in command("activity", "show", "out.gguf").out
    command("activity", "import", "activation", "-m", model, "-o", "b", "--force", "-n", 5000)
    assert "at least" not in command("activity", "show", "b").out


@pytest.mark.parametrize("count", [float(1 << 49), 1e302, (1 << 48) + 1])
def test_counts_that_nothing_could_read_are_refused(command, model, count) -> None:
    Path("activation").mkdir()
    for layer in range(LAYERS):
        counts = torch.ones(NEURONS, dtype=torch.float64 if isinstance(count, float) else torch.int64)
        counts[3] = count if layer == 1 else 1
        torch.save(counts, f"activation/activation_{layer}.pt")
    refused = command("activity", "import", "activation", "-m", model, "-o", "b")
    assert refused.code == 1
    assert f"activation_1.pt: counts {count:.0f} firings; allowed: 0 to {1 << 48}" in refused.err
    assert one_line(refused.err)
    assert not Path("b").exists()


def test_tokens_that_nothing_could_read_are_refused(command, model, activity) -> None:
    command("activity", "export", activity, "-o", "activation")
    refused = command("activity", "import", "activation", "-m", model, "-o", "b", "-n", 999999999999999999)
    assert (refused.code, Path("b").exists()) == (2, False)
    assert f"tokens is 999999999999999999; allowed: 0 (the largest count) to {1 << 48}" in refused.err


def test_activations_go_out_and_come_in(command, model, activity) -> None:
    done = command("activity", "export", activity, "-o", "activation", "--verbose")
    assert done.code == 0
    assert done.err == "note: PowerInfer solves only for a multiple of 256 neurons; these are 96\n"
    counts = read_activity(activity).fired
    for layer in range(LAYERS):  # as PowerInfer's solver reads them
        stored = torch.load(f"activation/activation_{layer}.pt", weights_only=True)
        assert stored.dtype == torch.int64
        assert (stored.numpy() == counts[layer]).all()
    back = command("activity", "import", "activation", "-m", model, "-o", "b", "--verbose")
    assert back.code == 0
    assert f"taken for {counts.max()}, the largest count" in back.err
    again = read_activity("b")
    assert (again.fired == counts).all()
    assert again.model_fingerprint == read_activity(activity).model_fingerprint
    assert command("activity", "import", "activation", "-m", model, "-o", "b").code == 2
    exact = command("activity", "import", "activation", "-m", model, "-o", "b", "--force", "-n", 5000, "--json")
    assert json.loads(exact.out) == {"output": "b", "n_layer": LAYERS, "n_ff": NEURONS, "notes": []}
    assert read_activity("b").tokens == 5000
    assert command("convert", model, "--activity", "b", "-o", "out.gguf").code == 0


def write_layers(folder: str, layers: list[Any], stem: str = "activation") -> None:
    Path(folder).mkdir()
    for i, layer in enumerate(layers):
        torch.save(layer, f"{folder}/{stem}_{i}.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("owned"), "x"))


ACTIVATIONS: dict[str, tuple[Any, str]] = {
    "code": ([Evil(), Evil()], "nothing of it was run"),
    "matrix": ([torch.ones(2, 48)] * 2, "a tensor of shape"),
    "bool": ([torch.ones(NEURONS, dtype=torch.bool)] * 2, "bool"),
    "fractions": (
        [torch.ones(NEURONS), torch.full((NEURONS,), 0.5)],
        "activation_1.pt: holds counts that are no whole",
    ),
    "negative": ([-torch.ones(NEURONS)] * 2, "finite counts from 0"),
    "nan": ([torch.full((NEURONS,), float("nan"))] * 2, "finite counts from 0"),
    "a layer too few": ([torch.ones(NEURONS)], "1 layers; the model has 2"),
    "a layer too many": ([torch.ones(NEURONS)] * 3, "3 layers; the model has 2"),
    "neurons": ([torch.ones(NEURONS - 1)] * 2, "95 neurons; the model has 96"),
    "named": ([{"a": torch.ones(NEURONS)}] * 2, "by name"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_are_refused(command, model, name: str) -> None:
    layers, message = ACTIVATIONS[name]
    write_layers("activation", layers)
    done = command("activity", "import", "activation", "-m", model, "-o", "b")
    assert done.code == 1
    assert message in done.err
    assert one_line(done.err)
    assert not Path("owned").exists()
    assert not Path("b").exists()


def test_more_firings_than_tokens_are_refused(command, model) -> None:
    write_layers("activation", [torch.full((NEURONS,), 7)] * 2)
    done = command("activity", "import", "activation", "-m", model, "-o", "b", "-n", 6)
    assert (done.code, done.err) == (2, "error: tokens is 6, but a neuron fired 7 times\n")


def test_twelve_layers_are_taken_by_their_numbers(command, make_deep, tmp_path) -> None:
    """Sorted as texts, layer 10 would come before layer 2."""
    write_layers("activation", [torch.full((NEURONS,), i) for i in range(12)])
    assert command("activity", "import", "activation", "-m", make_deep(12), "-o", "b").code == 0
    assert (read_activity("b").fired[:, 0] == np.arange(12)).all()
    assert command("activity", "export", "b", "-o", "out").code == 0
    assert [int(torch.load(f"out/activation_{i}.pt", weights_only=True)[0]) for i in range(12)] == list(range(12))


@pytest.fixture
def make_deep(tiny_model: Path, tmp_path: Path) -> Any:
    """The tiny model with its first layer repeated."""

    def make(layers: int) -> Path:
        from dataclasses import replace

        from thermocline.files.gguf_writer import write_gguf

        source = GgufFile.open(tiny_model)
        keys = source.typed_metadata() | {"arcee.block_count": np.uint32(layers)}
        weights = [w for name, w in source.weights.items() if not name.startswith("blk.")]
        first = [w for name, w in source.weights.items() if name.startswith("blk.0.")]
        weights += [replace(w, name=w.name.replace("blk.0.", f"blk.{i}.")) for i in range(layers) for w in first]
        write_gguf(tmp_path / "deep.gguf", keys, weights)
        return tmp_path / "deep.gguf"

    return make


def test_predictors_go_out_and_come_in(command, model, predictor) -> None:
    done = command("predictor", "export", predictor, "-o", "folder")
    assert (done.code, done.err) == (0, "")
    fingerprint = GgufFile.open(model).fingerprint
    found = load_predictor(predictor, fingerprint)
    for i, layer in enumerate(found.layers):  # as PowerInfer's converter reads them
        state = torch.load(f"folder/model_{i}.pt", weights_only=True)
        assert set(state) == {"fc1.weight", "fc2.weight"}
        assert (state["fc1.weight"].numpy() == to_float(layer.fc1)).all()
        assert (state["fc2.weight"].numpy() == to_float(layer.fc2)).all()
    told = {"sparse_threshold": 0.25, "thermocline.model": fingerprint}
    assert json.loads(Path("folder/config.json").read_text()) == told
    assert command("predictor", "import", "folder", "-m", model, "-o", "q.safetensors").code == 0
    again = load_predictor("q.safetensors", fingerprint)
    assert again.thresholds == found.thresholds
    assert command("predictor", "import", "folder", "-m", model, "-o", "q.safetensors").code == 2
    assert command("convert", model, "--predictor", "q.safetensors", "-o", "out.gguf").code == 0
    assert command("predictor", "export", "out.gguf", "-o", "second").code == 0
    for i in range(LAYERS):
        assert Path(f"second/model_{i}.pt").read_bytes() == Path(f"folder/model_{i}.pt").read_bytes()


def test_layers_with_thresholds_of_their_own_are_scaled_to_one(command, model, oracle, tmp_path) -> None:
    from dataclasses import replace

    with open_model(model) as source:
        fingerprint, found = source.fingerprint, oracle(source)
    save_predictor(replace(found, thresholds=(0.5, 2.0)), "p.safetensors", fingerprint)
    assert command("predictor", "export", "p.safetensors", "-o", "folder").code == 0
    assert json.loads(Path("folder/config.json").read_text())["sparse_threshold"] == 0.5
    scaled = torch.load("folder/model_1.pt", weights_only=True)["fc2.weight"].numpy()
    np.testing.assert_allclose(scaled, to_float(found.layers[1].fc2) * 0.25)
    for thresholds in ((0.5, -0.5), (0.0, 1.0), (1.0, 0.0)):
        save_predictor(replace(found, thresholds=thresholds), "p.safetensors", fingerprint)
        refused = command("predictor", "export", "p.safetensors", "-o", "other")
        assert refused.code == 2
        assert "PowerInfer has one threshold for all layers; this predictor has" in refused.err
        assert one_line(refused.err)
        assert not Path("other").exists()
    save_predictor(replace(found, thresholds=(0.5, -0.5)), "p.safetensors", fingerprint)
    assert command("predictor", "export", "p.safetensors", "-o", "other", "--predictor-threshold", "-0.1").code == 0
    assert json.loads(Path("other/config.json").read_text())["sparse_threshold"] == -0.1


FC1, FC2 = torch.ones(32, WIDTH), torch.ones(NEURONS, 32)
PREDICTORS: dict[str, tuple[Any, str]] = {
    "code": ([Evil(), Evil()], "nothing of it was run"),
    "integers": ([{"fc1.weight": FC1.int(), "fc2.weight": FC2}] * 2, "a matrix of floats"),
    "a bias": ([{"fc1.weight": FC1, "fc1.bias": FC1[:, 0], "fc2.weight": FC2}] * 2, "and no others"),
    "transposed": ([{"fc1.weight": FC1.T.contiguous(), "fc2.weight": FC2}] * 2, "allowed: one rank"),
    "width": ([{"fc1.weight": torch.ones(32, 63), "fc2.weight": FC2}] * 2, "goes from 63 inputs to 96 neurons"),
    "neurons": ([{"fc1.weight": FC1, "fc2.weight": FC2[1:]}] * 2, "to 95 neurons; the model has 64 and 96"),
    "one layer's neurons": ([{"fc1.weight": FC1, "fc2.weight": FC2[i:]} for i in range(2)], "to 95 neurons; layer 0"),
    "a layer too few": ([{"fc1.weight": FC1, "fc2.weight": FC2}], "1 layers; the model has 2"),
    "a layer too many": ([{"fc1.weight": FC1, "fc2.weight": FC2}] * 3, "3 layers; the model has 2"),
    "nan": ([{"fc1.weight": FC1 * float("nan"), "fc2.weight": FC2}] * 2, "NaN"),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_that_are_refused(command, model, name: str) -> None:
    layers, message = PREDICTORS[name]
    write_layers("folder", layers, "model")
    for call in (("predictor", "import", "folder", "-m", model), ("convert", model, "--predictor", "folder")):
        done = command(*call, "-o", "out")
        assert done.code == 1
        assert message in done.err
        assert one_line(done.err)
        assert not Path("owned").exists()
        assert not Path("out").exists()


def test_a_folder_that_was_exported_for_another_model_is_refused(command, model, predictor, tiny_plain) -> None:
    """Of the same sizes, and called tiny as well."""
    assert command("predictor", "export", predictor, "-o", "folder").code == 0
    own, other = GgufFile.open(model).fingerprint[:12], GgufFile.open(tiny_plain).fingerprint[:12]
    for call in (("predictor", "import", "folder", "-m", tiny_plain), ("convert", tiny_plain, "--predictor", "folder")):
        done = command(*call, "-o", "out")
        assert done.code == 1
        assert f"error: folder: belongs to the model {own}, not to tiny ({other}); give the folder that" in done.err
        assert one_line(done.err)
        assert not Path("out").exists()


def test_folders_by_other_numbers_than_the_models_are_refused(command, model, activity) -> None:
    """PowerInfer's folders do not say whose neurons they number; an ordered model has numbers of its own."""
    write_layers("folder", [{"fc1.weight": FC1, "fc2.weight": FC2}] * 2, "model")
    write_layers("activation", [torch.ones(NEURONS)] * 2)
    assert command("convert", model, "--activity", activity, "-o", "ordered.gguf").code == 0
    for call in (
        ("predictor", "import", "folder", "-m", "ordered.gguf"),
        ("convert", "ordered.gguf", "--predictor", "folder"),
        ("activity", "import", "activation", "-m", "ordered.gguf"),
    ):
        done = command(*call, "-o", "out")
        assert done.code == 2
        assert "whose neurons were put in another order: give it with the model that this one was" in done.err
        assert one_line(done.err)
        assert not Path("out").exists()


def test_what_was_exported_for_an_ordered_model_comes_back_to_it(command, model, activity, predictor) -> None:
    line = ("convert", model, "--activity", activity, "--predictor", predictor, "-o", "ordered.gguf")
    assert command(*line).code == 0
    assert command("predictor", "export", "ordered.gguf", "-o", "folder").code == 0
    assert command("predictor", "import", "folder", "-m", "ordered.gguf", "-o", "back.safetensors").code == 0
    back = load_predictor("back.safetensors", GgufFile.open("ordered.gguf").fingerprint)
    for i, layer in enumerate(back.layers):
        inside = GgufFile.open("ordered.gguf").weights[f"blk.{i}.fc2.weight"]
        assert (to_float(layer.fc2) == to_float(inside)).all()
    assert command("predictor", "import", "folder", "-m", model, "-o", "x").code == 1


def test_a_bare_pickle_is_refused(command, model) -> None:
    Path("activation").mkdir()
    for i in range(LAYERS):
        Path(f"activation/activation_{i}.pt").write_bytes(pickle.dumps(Evil()))
    done = command("activity", "import", "activation", "-m", model, "-o", "b")
    assert done.code == 1
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["convert"], 2, "model"),
        (["convert", "m.gguf"], 2, "--output"),
        (["convert", "nowhere", "-o", "x"], 1, "does not exist"),
        (["convert", "m.gguf", "-o", "no/x"], 1, "No such file or directory"),
        (["convert", "m.gguf", "-o", "x", "--outtype", "q9"], 2, "outtype is q9"),
        (["convert", "m.gguf", "-o", "x", "--activity", "m.gguf"], 2, "m.gguf has no activity inside"),
        (["report", "m.gguf", "-o", "x"], 2, "m.gguf has no activity inside"),
        (["profile", "-m", "m.gguf", "--text", ".", "-o", "m.gguf", "--merge"], 1, "m.gguf"),
        (["run", "-m", "m.gguf", "-p", "x", "--count-activity", "m.gguf"], 1, "m.gguf"),
        (["convert", "m.gguf", "-o", "x", "--predictor-threshold", "much"], 2, "much"),
        (["quantize", "m.gguf", "x"], 2, "kind"),
        (["quantize", "m.gguf", "x", "Q4_K_M"], 2, "mixtures of types are not made"),
        (["quantize", "m.gguf", "m.gguf", "Q4_0"], 2, "is there already"),
        (["predictor", "export", "m.gguf", "-o", "x"], 2, "has no predictor inside"),
        (["activity", "import", "nowhere", "-m", "m.gguf", "-o", "x"], 1, "does not exist"),
    ],
)
def test_wrong_lines_are_told_in_one_line(command, model, arguments, code, problem) -> None:
    done = command(*arguments)
    assert done.code == code
    assert problem.lower() in done.err.lower()
    assert one_line(done.err)
    assert done.out == ""
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["m.gguf"]


def test_what_is_another_models_is_told_by_file_and_fingerprint(
    command, model, activity, predictor, tiny_plain, tmp_path
) -> None:
    """Both models are called tiny."""
    command("activity", "order", activity, "-o", "order")
    command("profile", "-m", tiny_plain, "--text", "code.py", "-o", "other", *CALL)
    for arguments, file in (
        (["convert", tiny_plain, "--activity", "a", "-o", "x"], "a"),
        (["convert", tiny_plain, "--order", "order", "-o", "x"], "order"),
        (["plan", "-m", tiny_plain, "--activity", "a"], "a"),
        (["plan", "-m", tiny_plain, "--activity", "order"], "order"),
        (["activity", "merge", "a", "other", "-o", "x"], "other"),
        (["convert", tiny_plain, "--predictor", "p.safetensors", "-o", "x"], "p.safetensors"),
        (["run", "-m", tiny_plain, "-p", "x", "--predictor", "p.safetensors", *CALL], "p.safetensors"),
        (["perplexity", "-m", tiny_plain, "--text", "code.py", "--predictor", "p.safetensors", *CALL], "p.safetensors"),
        (["audit", "-m", tiny_plain, "--text", "code.py", "--predictor", "p.safetensors", *CALL], "p.safetensors"),
        (["report", "other", "--predictor", "p.safetensors", "-o", "x"], "p.safetensors"),
        (["plan", "-m", tiny_plain, "--predictor", "p.safetensors", "--mode", "predicted"], "p.safetensors"),
    ):
        done = command(*arguments)
        assert (done.code, done.out) == (1, "")
        assert re.match(rf"error: {file}: belongs to the model tiny \([0-9a-f]{{12}}\), not to", done.err), done.err
        assert one_line(done.err)
    assert not Path("x").exists()


def test_an_activity_in_the_place_of_a_model_is_told_as_one(command, activity) -> None:
    assert "it looks like an activity, an order or a predictor" in command("convert", activity, "-o", "x").err
