"""Written files: what the gguf package reads in them, and what they keep of their source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from thermocline.errors import ModelFormatError, UsageError
from thermocline.files.formats import F16, F32, Q4_0, Q8_0
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import from_float, to_float
from thermocline.memory.convert import FILE_TYPES, OUTTYPES, convert, write_records
from thermocline.memory.layout import neighbours
from thermocline.model.families import family_of
from thermocline.ops.contract import Activation, FfnKind


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
        assert gguf.LlamaFileType(number).name in {f"MOSTLY_{name}", f"ALL_{name}"}


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
    predictor = np.arange(96, dtype=np.float16).view(np.uint8)
    factors = from_float("rope_freqs.weight", np.full((1, 16), 2, dtype=np.float32), F32)
    extra = [NewTensor("blk.0.fc1.weight", F16, (3, 32), lambda: predictor), factors]
    path = tmp_path / "stored.gguf"
    write_gguf(path, header, [*source.weights.values(), *extra])
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
    names = list(GgufFile.open(tmp_path / "model.gguf").tensors)
    assert told == [(i, len(names), name) for i, name in enumerate(names)]


def test_what_cannot_be_written_leaves_nothing_behind(make_source: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="outtype is q5_k; allowed: f32, f16, bf16, q8_0, q4_0"):
        convert(make_source(), tmp_path / "model.gguf", "q5_k")
    broken = make_source()
    del broken.weights["blk.0.attn_q.weight"]
    with pytest.raises(ModelFormatError, match=r"blk\.0\.attn_q\.weight is missing"):
        convert(broken, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_neighbours_pair_what_halves_paired() -> None:
    order = neighbours(2, 12)
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
