"""Written files: what the gguf package reads in them, and what they keep of their source."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from thermocline.activity.applied import applied_order
from thermocline.activity.inside import predictor_inside
from thermocline.activity.order import By, Order
from thermocline.activity.predictor import Predictor
from thermocline.config import CacheType, Mode
from thermocline.errors import ModelFormatError, UsageError
from thermocline.files.formats import F16, F32, Q4_0, Q4_K, Q8_0, BlockFormat
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import write_gguf
from thermocline.files.metadata import Metadata
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float, to_float
from thermocline.memory.convert import FILE_TYPES, OUTTYPES, convert, write_records
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.layout import lay_out, neighbours
from thermocline.memory.loader import load_transformer
from thermocline.model.families import family_of
from thermocline.model.network import Segment
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import CpuOps


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_gguf_package_reads_the_same(make_source: Callable[..., Any], tmp_path: Path, outtype: str) -> None:
    source = make_source()
    path = tmp_path / "model.gguf"
    report = convert(source, path, outtype)
    assert report.nbytes == path.stat().st_size
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.block_count"].contents() == 2
    assert reader.fields["llama.hidden_activation"].contents() == "relu"
    assert reader.fields["general.file_type"].contents() == FILE_TYPES[OUTTYPES[outtype].name]
    names = {tensor.name for tensor in reader.tensors}
    assert names == set(source.weights)
    for tensor in reader.tensors:
        wanted = from_float(tensor.name, to_float(source.weights[tensor.name]), expected_format(tensor.name, outtype))
        assert tensor.tensor_type.name == wanted.format.name
        assert tuple(tensor.shape) == ((wanted.columns, wanted.rows) if wanted.rows > 1 else (wanted.columns,))
        assert tensor.data.tobytes() == wanted.data.tobytes()


def expected_format(name: str, outtype: str) -> Any:
    if "norm" in name:
        return F32
    return Q8_0 if outtype == "q4_0" and name == "token_embd.weight" else OUTTYPES[outtype]


def test_file_types_are_ggmls() -> None:
    for name, number in FILE_TYPES.items():
        assert gguf.LlamaFileType(number).name in {f"MOSTLY_{name}", f"ALL_{name}", f"MOSTLY_{name}_S"}


@pytest.mark.parametrize("fmt", [Q4_0, Q4_K], ids=lambda f: f.name)
@pytest.mark.parametrize("asked", [False, True])
def test_embedding_and_head_in_the_format_already_keep_it(
    make_source: Callable[..., Any], tmp_path: Path, fmt: BlockFormat, asked: bool
) -> None:
    """Finer numbers would be the same ones in more bytes, which every token reads."""
    source, out = make_source(fmt, records=True, n_embd=256, n_ff=256), tmp_path / "model.gguf"
    layout = lay_out(source, fmt if asked else None, records=True)
    write_gguf(out, source.metadata, layout.tensors)
    written = GgufFile.open(out).weights
    assert {weight.format for weight in written.values() if weight.rows > 1} == {fmt}
    np.testing.assert_array_equal(written["token_embd.weight"].data, source.weights["token_embd.weight"].data)


def test_rows_that_are_no_whole_blocks_are_announced(make_source: Callable[..., Any], tmp_path: Path) -> None:
    report = convert(make_source(n_embd=48), tmp_path / "model.gguf", "q8_0")
    weights = GgufFile.open(tmp_path / "model.gguf").weights
    assert weights["blk.0.attn_q.weight"].format is F16
    assert weights["blk.0.ffn_down.weight"].format is Q8_0
    assert report.notes[-1].startswith("13 matrices are F16: their rows, as token_embd.weight's 48, are no whole")


@pytest.fixture
def stored(make_source: Callable[..., Any], tmp_path: Path) -> GgufFile:
    """A file with more in it than a network: a tokenizer, predictors, rotary factors."""
    source = make_source(Q8_0)
    header = dict(source.metadata) | {
        "general.file_type": np.uint32(7),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(50)],
        "tokenizer.ggml.scores": np.zeros(50, dtype=np.float32),
        "powerinfer.sparse_threshold": np.float32(0.5),
        "some.float64": np.float64(0.1),
    }
    n_ff, n_embd = source.weights["blk.0.ffn_up.weight"].shape
    shapes = {"fc1": (3, n_embd), "fc2": (n_ff, 3)}
    predictor = [
        from_float(f"blk.{i}.{name}.weight", np.full(shape, i + 1, np.float32), F16)
        for i in range(2)
        for name, shape in shapes.items()
    ]
    factors = from_float("rope_freqs.weight", np.full((1, 16), 2, dtype=np.float32), F32)
    path = tmp_path / "stored.gguf"
    write_gguf(path, header, [*source.weights.values(), *predictor, factors])
    return GgufFile.open(path)


def test_records_keep_all_the_rest_of_a_file(stored: GgufFile, tmp_path: Path) -> None:
    report = write_records(stored, tmp_path / "records.gguf")
    records = GgufFile.open(tmp_path / "records.gguf")
    down = {f"blk.{i}.ffn_down.weight" for i in range(2)}
    assert set(records.tensors) == {name.replace("ffn_down", "ffn_down_t") for name in stored.tensors}
    for name in set(stored.tensors) - down:
        assert records.tensors[name].format is stored.tensors[name].format
        assert records.tensors[name].data.tobytes() == stored.tensors[name].data.tobytes()
    ours, theirs = records.typed_metadata(), stored.typed_metadata()
    for key in ("powerinfer.sparse_threshold", "some.float64", "general.file_type", "tokenizer.ggml.model"):
        assert type(ours[key]) is type(theirs[key])
        assert ours[key] == theirs[key]
    assert list(ours["tokenizer.ggml.tokens"]) == [f"t{i}" for i in range(50)]
    assert {r.tensor for r in report.reblocked} == down
    for reblocked in report.reblocked:
        turned = to_float(records.weights[reblocked.tensor.replace("down", "down_t")]).T
        assert np.abs(turned - to_float(stored.weights[reblocked.tensor])).max() == pytest.approx(
            reblocked.max_abs_error
        )
    specs = [family_of(s).spec(s) for s in (stored, records)]  # type: ignore[arg-type]
    assert replace(specs[0], name="x") == replace(specs[1], name="x")


def test_records_and_back_is_the_same_file_of_floats(make_source: Callable[..., Any], tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "plain.gguf")
    write_records(GgufFile.open(tmp_path / "plain.gguf"), tmp_path / "records.gguf")
    convert(GgufFile.open(tmp_path / "records.gguf"), tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_an_unknown_activation_of_records_is_written_down(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """A PowerInfer file means ReLU by its layout; once in the standard layout, only the key says so."""
    source = make_source(records=True)
    silent = {key: value for key, value in source.metadata.items() if "activation" not in key}
    convert(replace(source, metadata=Metadata("tiny", silent)), tmp_path / "standard.gguf")
    again = GgufFile.open(tmp_path / "standard.gguf")
    assert family_of(again).spec(again).ffn == FfnKind(Activation.RELU, gated=True)


def test_progress_names_every_tensor(make_source: Callable[..., Any], tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    convert(make_source(Q4_0), tmp_path / "model.gguf", progress=lambda *step: told.append(step))
    tensors = GgufFile.open(tmp_path / "model.gguf").tensors
    sizes = [len(t.data) for t in tensors.values()]
    assert told == [(sum(sizes[:i]), sum(sizes), name) for i, name in enumerate(tensors)]


def test_what_cannot_be_written_leaves_nothing_behind(make_source: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="outtype is q5_1; allowed: f32, f16, bf16, q8_0, q4_0, q4_k"):
        convert(make_source(), tmp_path / "model.gguf", "q5_1")
    broken = make_source()
    del broken.weights["blk.0.attn_q.weight"]
    with pytest.raises(ModelFormatError, match=r"blk\.0\.attn_q\.weight is missing"):
        convert(broken, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_neighbours_pair_what_halves_paired() -> None:
    order = neighbours(2, 12)
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# In order, and with a predictor


def order_of(n_layer: int = 2, n_ff: int = 96, seed: int = 4) -> Order:
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(n_ff) for _ in range(n_layer)]).astype(np.int32)
    return Order("m" * 64, "tiny", By.FREQUENCY, 10, rows, np.zeros((n_layer, n_ff)))


def predictor_of(fmt: Any = F32) -> Predictor:
    rng = np.random.default_rng(5)
    layers = [
        PredictorLayer(
            from_float("fc1", rng.standard_normal((32, 64)).astype(np.float32), fmt),
            from_float("fc2", rng.standard_normal((96, 32)).astype(np.float32), fmt),
        )
        for _ in range(2)
    ]
    return Predictor(tuple(layers), (0.5, -np.inf), (0.25, 0.75), {"audit": {"passed": True, "summary": "x"}})


@pytest.mark.parametrize("stored_records", [False, True], ids=["standard", "records"])
@pytest.mark.parametrize("outtype", [None, "f16", "q8_0"])
def test_neurons_are_stored_in_order(
    make_source: Callable[..., Any], tmp_path: Path, outtype: str | None, stored_records: bool
) -> None:
    """Gate, up, down and the predictor's outputs alike, by the same numbers; all else as it was."""
    source, order = make_source(records=stored_records), order_of()
    plain, sorted_ = tmp_path / "plain.gguf", tmp_path / "sorted.gguf"
    convert(source, plain, outtype, records=True, predictor=predictor_of())
    convert(source, sorted_, outtype, records=True, predictor=predictor_of(), order=order)
    before, after = GgufFile.open(plain), GgufFile.open(sorted_)
    assert set(before.weights) == set(after.weights)
    moved = 0
    for name, weight in before.weights.items():
        part = name.split(".")[-2]
        data = weight.data
        if part in {"ffn_gate", "ffn_up", "ffn_down_t", "fc2"}:
            data = data[order.order[int(name.split(".")[1])]]
            moved += 1
        assert after.weights[name].data.tobytes() == data.tobytes()
    assert moved == 8
    applied = applied_order(after.metadata, family_of(after).spec(after))
    assert applied is not None
    assert applied.model == "m" * 64
    np.testing.assert_array_equal(applied.order, order.order)
    assert applied_order(before.metadata, family_of(before).spec(before)) is None


def test_an_ordered_model_computes_the_same(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """To the rounding of sums in another order; and predicted, where the predictor's rows went along."""
    predictor = replace(predictor_of(), thresholds=(0.5, 0.5))
    for name, order in (("plain", None), ("sorted", order_of())):
        convert(make_source(), tmp_path / f"{name}.gguf", records=True, predictor=predictor, order=order)
    results = []
    for name in ("plain", "sorted"):
        source = GgufFile.open(tmp_path / f"{name}.gguf")
        inside = predictor_inside(source)
        assert inside is not None
        for mode in (Mode.EXACT, Mode.PREDICTED):
            transformer = load_transformer(source, CpuOps(1), mode=mode, predictor=inside)[0]
            cache = KVCache(transformer.spec, transformer.ops, 8, CacheType.F32, CacheType.F32)
            workspace = Workspace(transformer.spec, transformer.ops, 8, scored=transformer.scored)
            rows, fired = [], 0
            for position in range(8):
                token = np.array([3 * position], np.int32)
                step = transformer.step(token, (Segment(cache, position, 1),), workspace)
                rows.append(step.logits.copy())
                fired += step.work.fired
            results.append((np.concatenate(rows), fired))
    (exact, fired), (predicted, fewer), (exact_sorted, fired_sorted), (predicted_sorted, fewer_sorted) = results
    assert 0 < fewer < fired
    assert (fired, fewer) == (fired_sorted, fewer_sorted)
    np.testing.assert_allclose(exact_sorted, exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predicted_sorted, predicted, rtol=1e-4, atol=1e-5)
    assert np.abs(predicted - exact).max() > 1e-3


def test_an_order_upon_an_order_is_told_by_the_first_numbers(make_source: Callable[..., Any], tmp_path: Path) -> None:
    first, second = order_of(), order_of(seed=9)
    convert(make_source(), tmp_path / "a.gguf", records=True, order=first)
    convert(GgufFile.open(tmp_path / "a.gguf"), tmp_path / "b.gguf", records=True, order=second)
    convert(GgufFile.open(tmp_path / "b.gguf"), tmp_path / "c.gguf", "q8_0", records=True)
    for name in ("b", "c"):
        file = GgufFile.open(tmp_path / f"{name}.gguf")
        applied = applied_order(file.metadata, family_of(file).spec(file))
        assert applied is not None
        assert applied.model == "m" * 64
        for layer in range(2):
            np.testing.assert_array_equal(applied.order[layer], first.order[layer][second.order[layer]])
    original = make_source().weights["blk.1.ffn_up.weight"]
    again = GgufFile.open(tmp_path / "b.gguf").weights["blk.1.ffn_up.weight"]
    np.testing.assert_array_equal(to_float(again), to_float(original)[applied.order[1]])


def test_an_order_that_is_none_is_refused(make_source: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an order needs neuron records"):
        convert(make_source(), tmp_path / "m.gguf", order=order_of())
    source = make_source(records=True)
    for wrong in (np.zeros(192, np.int32), np.arange(192, dtype=np.int32)):
        keys = dict(source.metadata) | {"thermocline.neuron_order": wrong, "thermocline.neuron_order.model": "m" * 64}
        broken = replace(source, metadata=Metadata("tiny", keys))
        with pytest.raises(ModelFormatError, match=r"neuron_order: names a neuron twice"):
            convert(broken, tmp_path / "m.gguf", records=True)
    assert list(tmp_path.iterdir()) == []


def test_a_predictor_inside_keeps_what_it_knows(make_source: Callable[..., Any], tmp_path: Path) -> None:
    path, predictor = tmp_path / "m.gguf", predictor_of()
    convert(make_source(), path, records=True, predictor=predictor)
    found = predictor_inside(GgufFile.open(path))
    assert found is not None
    assert found.thresholds == (0.5, -np.inf)
    assert found.active_shares == (0.25, 0.75)
    assert found.audit is None  # it was of another file's numbers
    for ours, theirs in zip(found.layers, predictor.layers, strict=True):
        assert ours.fc1.data.tobytes() == theirs.fc1.data.tobytes()
        assert ours.fc2.data.tobytes() == theirs.fc2.data.tobytes()
    # In other numbers the shares are not known, and the format goes with the model's.
    convert(GgufFile.open(path), tmp_path / "q.gguf", "q4_0", records=True)
    coarse = predictor_inside(GgufFile.open(tmp_path / "q.gguf"))
    assert coarse is not None
    assert coarse.thresholds == found.thresholds
    assert coarse.active_shares is None
    assert {layer.fc2.format for layer in coarse.layers} == {Q4_0}
    convert(GgufFile.open(path), tmp_path / "k.gguf", "q6_k", records=True)
    finer = predictor_inside(GgufFile.open(tmp_path / "k.gguf"))
    assert finer is not None
    assert {layer.fc1.format for layer in finer.layers} == {Q8_0}


def test_one_threshold_is_also_powerinfers(make_source: Callable[..., Any], tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "m.gguf", records=True, predictor=replace(predictor_of(), thresholds=(0.5, 0.5)))
    assert GgufFile.open(tmp_path / "m.gguf").metadata["powerinfer.sparse_threshold"] == 0.5
    convert(make_source(), tmp_path / "n.gguf", records=True, predictor=predictor_of())
    assert "powerinfer.sparse_threshold" not in GgufFile.open(tmp_path / "n.gguf").metadata


@pytest.mark.parametrize(
    ("key", "values"),
    [("thresholds", [0.5]), ("thresholds", [0.5, np.nan]), ("active_shares", [0.5, 1.5]), ("active_shares", [0.5])],
)
def test_thresholds_and_shares_that_are_none(
    make_source: Callable[..., Any], tmp_path: Path, key: str, values: list[float]
) -> None:
    source = make_source(records=True)
    header = dict(source.metadata) | {f"thermocline.predictor.{key}": np.array(values, np.float32)}
    layers = predictor_of().layers
    extra = [
        replace(weight, name=f"blk.{i}.{part}.weight")
        for i, layer in enumerate(layers)
        for part, weight in (("fc1", layer.fc1), ("fc2", layer.fc2))
    ]
    write_gguf(tmp_path / "m.gguf", header, [*source.weights.values(), *extra])
    with pytest.raises(ModelFormatError, match=f"thermocline.predictor.{key}"):
        predictor_inside(GgufFile.open(tmp_path / "m.gguf"))


def test_memory_holds_one_tensor(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """The largest is one of 20; what is held beside it is a tile of float32 rows and a few copies of that."""
    convert(make_source(F16, n_embd=1024, n_ff=6144), tmp_path / "m.gguf", "f16")
    source = GgufFile.open(tmp_path / "m.gguf")
    largest = max(len(t.data) for t in source.tensors.values())
    tile = 256 * 6144 * 4
    order = order_of(n_ff=6144)
    tracemalloc.start()
    try:
        convert(source, tmp_path / "q.gguf", "q8_0", records=True, order=order)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < largest + 6 * tile
    assert largest + 6 * tile < sum(len(t.data) for t in source.tensors.values())


# Other types, and the errors that are told


@pytest.mark.parametrize("outtype", ["q4_k", "q5_k", "q6_k"])
def test_k_quants_and_what_does_not_fit_them(make_source: Callable[..., Any], tmp_path: Path, outtype: str) -> None:
    """Rows of 256 are K-quants, embedding Q6_K; rows of 96 are whole blocks of Q8_0 only."""
    report = convert(make_source(n_embd=256), tmp_path / "m.gguf", outtype)
    weights = GgufFile.open(tmp_path / "m.gguf").weights
    assert weights["blk.0.ffn_up.weight"].format.name == outtype.upper()
    assert weights["token_embd.weight"].format.name == "Q6_K"
    assert weights["blk.0.ffn_down.weight"].format is Q8_0
    assert report.notes[-1].startswith("2 matrices are Q8_0: their rows, as blk.0.ffn_down.weight's 96,")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.file_type"].contents() == FILE_TYPES[outtype.upper()]


@pytest.mark.parametrize("records", [False, True])
def test_errors_are_those_of_the_file(make_source: Callable[..., Any], tmp_path: Path, records: bool) -> None:
    source = make_source()
    report = convert(source, tmp_path / "m.gguf", "q4_0", records=records, threads=2)
    stored = GgufFile.open(tmp_path / "m.gguf").weights
    assert len(report.reblocked) == 15
    for r in report.reblocked:
        exact = to_float(source.weights[r.tensor]).astype(np.float64)
        found = to_float(stored[r.tensor if not records else r.tensor.replace("ffn_down", "ffn_down_t")])
        if records and "ffn_down" in r.tensor:
            found = found.T
        error = found - exact
        assert r.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
        assert r.relative_error == pytest.approx(np.sqrt((error**2).mean() / (exact**2).mean()), rel=1e-5)
        assert r.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-6)
        assert (r.source, r.format) == ("F32", "Q8_0" if r.tensor == "token_embd.weight" else "Q4_0")
