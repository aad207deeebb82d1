"""Hugging Face folders: read like the safetensors library does, and refused when they lie."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from thermocline.errors import ModelFormatError, ThermoclineError, UnsupportedModelError
from thermocline.files.formats import BF16, F16, F32
from thermocline.files.open import open_model
from thermocline.files.quantize import to_float
from thermocline.files.safetensors_folder import HfFolder

RUNAWAY = 30.0  # seconds of CPU: far above what a bounded reader takes on any machine

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "rope_scaling": {"factor": 2.0, "rope_type": "linear"}}
HOMES = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}


def single(make: SimpleNamespace, root: Path, content: bytes) -> Path:
    return make.folder(root, {"config.json": CONFIG, "model.safetensors": content})


def sharded(make: SimpleNamespace, root: Path, **changes: Any) -> Path:
    """Tensors a and b in one shard, c in another; `changes` replaces parts of the index or whole files."""
    index = {
        "metadata": {"total_size": changes.pop("total_size", 48)},
        "weight_map": changes.pop("weight_map", HOMES),
    }
    files: dict[str, Any] = {
        "config.json": CONFIG,
        "model.safetensors.index.json": index,
        "m-1.safetensors": make.safetensors({"a": make.tensor(), "b": make.tensor(offsets=(16, 32))}, bytes(32)),
        "m-2.safetensors": make.safetensors({"c": make.tensor()}, bytes(16)),
    }
    files |= {name.replace("__", "-").replace("_", "."): content for name, content in changes.items()}
    return make.folder(root, {name: content for name, content in files.items() if content is not None})


def test_values_are_those_that_the_library_wrote(tmp_path: Path, make: SimpleNamespace) -> None:
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(4, 2, dtype=torch.float16),
        "bf16": torch.randn(2, 7).bfloat16(),
        "vector": torch.randn(6),
        "one": torch.randn(1, 1, 3, 2),
    }
    make.folder(tmp_path, {"config.json": CONFIG})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = open_model(tmp_path)
    assert isinstance(model, HfFolder)
    assert model.kind == "hf"
    assert model.warnings == ()
    assert [model.weights[n].format for n in ("f32", "f16", "bf16")] == [F32, F16, BF16]
    for name, tensor in tensors.items():
        weight = model.weights[name]
        expected = tensor.float().reshape(-1, tensor.shape[-1]).numpy()
        assert weight.shape == expected.shape
        np.testing.assert_array_equal(to_float(weight), expected)
        assert not weight.data.flags.writeable


def test_other_kinds_are_listed_and_refused_by_name(tmp_path: Path, make: SimpleNamespace) -> None:
    make.folder(tmp_path, {"config.json": CONFIG})
    tensors = {
        "f8": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        "i64": torch.zeros(2, dtype=torch.int64),
        "cube": torch.zeros(2, 3, 4),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    model = open_model(tmp_path)
    assert set(model.tensors) == set(tensors)
    for name, decisive in {"f8": "F8_E4M3", "i64": "I64", "cube": r"\[2, 3, 4\]", "none": r"\[0, 4\]"}.items():
        with pytest.raises(UnsupportedModelError, match=f"tensor {name} .*{decisive}"):
            model.weights[name]
    assert to_float(model.weights["scalar"]).tolist() == [[1.5]]


def test_shards_are_one_model(tmp_path: Path, make: SimpleNamespace) -> None:
    with open_model(sharded(make, tmp_path), strict=True) as model:
        assert sorted(model.weights) == ["a", "b", "c"]
        assert model.warnings == ()
        assert model.nbytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
        weight = model.weights["c"]
    assert weight.shape == (2, 2)
    assert not model.weights


def test_config_and_companions(tmp_path: Path, make: SimpleNamespace) -> None:
    path = single(make, tmp_path, make.safetensors({"a": make.tensor()}, bytes(16)))
    make.folder(tmp_path, {"tokenizer_config.json": {"bos_token": "<s>"}, "generation_config.json": "[1]"})
    model = HfFolder.open(path)
    assert model.config is model.metadata
    assert model.config.integer("num_hidden_layers", 1, 512) == 2
    assert model.config.section("rope_scaling").number("factor", 1, 100) == 2
    assert model.companion("tokenizer.json") is None
    assert model.json("special_tokens_map.json") is None
    tokenizer = model.json("tokenizer_config.json")
    assert tokenizer is not None
    assert tokenizer.text("bos_token") == "<s>"
    with pytest.raises(ModelFormatError, match="is a JSON list; an object is needed"):
        model.json("generation_config.json")
    with pytest.raises(ValueError, match="passwd"):
        model.companion("../../etc/passwd")


def test_fingerprints_tell_folders_apart(tmp_path: Path, make: SimpleNamespace) -> None:
    content = make.safetensors({"a": make.tensor()}, bytes(16))
    base = open_model(single(make, tmp_path / "a", content)).fingerprint
    assert open_model(single(make, tmp_path / "b", content)).fingerprint == base
    assert open_model(single(make, tmp_path / "c", content[:-1] + b"\1")).fingerprint != base
    other = make.folder(tmp_path / "d", {"config.json": CONFIG | {"x": 1}, "model.safetensors": content})
    assert open_model(other).fingerprint != base


def header(text: str | bytes, data: bytes = b"") -> Callable[[SimpleNamespace], bytes]:
    return lambda m: m.safetensors(None, data, raw=text.encode() if isinstance(text, str) else text)


def one(data: int = 16, **fields: object) -> Callable[[SimpleNamespace], bytes]:
    """A file of one tensor with some of its fields replaced (None removes)."""
    return lambda m: m.safetensors(
        {"a": {k: v for k, v in (m.tensor() | fields).items() if v is not None}}, bytes(data)
    )


def two(*offsets: tuple[int, int], data: int = 32) -> Callable[[SimpleNamespace], bytes]:
    return lambda m: m.safetensors({n: m.tensor(offsets=o) for n, o in zip("ab", offsets, strict=True)}, bytes(data))


GOOD = '"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
SHARD: dict[str, tuple[Callable[[SimpleNamespace], bytes], str]] = {
    # L28
    "empty": (lambda m: b"", "0 bytes; at least 8 needed"),
    "seven-bytes": (lambda m: b"\2\0\0\0\0\0\0", "7 bytes; at least 8 needed"),
    "length-2^64-1": (lambda m: m.safetensors({}, length=(1 << 64) - 1), "found 18446744073709551615; allowed"),
    "length-100000001": (lambda m: m.safetensors({}, length=100_000_001), "found 100000001; allowed"),
    "length-over-file": (lambda m: m.safetensors({}, length=3), "found 3; allowed: 2 to 2"),
    "length-0": (lambda m: m.safetensors({}, length=0), "found 0; allowed"),
    "gguf-inside": (lambda m: m.Gguf().bytes(), "it looks like a GGUF file"),
    "pickle-inside": (lambda m: b"\x80\x02" + bytes(60), "pickle, which is never opened"),
    "zip-inside": (lambda m: b"PK\3\4" + bytes(60), "never opened"),
    "lfs-pointer": (lambda m: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    # L29
    "not-json": (header("{]"), "header at byte 1: is not JSON"),
    "leading-space": (header(' {"a":{}}'), "and then an object"),
    "an-array": (header("[1,2]"), "and then an object"),
    "cut-json": (header('{"a":'), "is not JSON"),
    "not-utf8": (header(b'{"\xff":1}'), "is not UTF-8"),
    "nul-padding": (header("{" + GOOD + "}\0\0", bytes(16)), "is not JSON"),
    "nested-100000-deep": (header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "is nested too deep"),
    "nan": (
        header('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
        "found NaN",
    ),
    "infinity": (header('{"a":-Infinity}'), "found -Infinity"),
    "1e400": (header('{"a":1e400}'), "found 1e400, beyond the range of a double"),
    "5000-digits": (header('{"a":' + "9" * 5000 + "}"), "is not usable"),
    "tensor-twice": (header("{" + GOOD + "," + GOOD + "}", bytes(16)), 'key "a" is given twice'),
    "field-twice": (header("{" + GOOD[:-1] + ',"dtype":"F16"}}', bytes(16)), 'key "dtype" is given twice'),
    "notes-not-text": (header('{"__metadata__":{"n":1},' + GOOD + "}", bytes(16)), "is not an object of strings"),
    "notes-a-list": (header('{"__metadata__":[],' + GOOD + "}", bytes(16)), "is not an object of strings"),
    # L30
    "hole-at-start": (one(20, data_offsets=[4, 20]), "begins at 4 and leaves a hole before it, which ends at 0"),
    "hole-between": (two((0, 16), (20, 36), data=36), "begins at 20 and leaves a hole"),
    "overlap": (two((0, 16), (8, 24), data=24), "begins at 8 and overlaps"),
    "same-bytes": (two((0, 16), (0, 16), data=16), "begins at 0 and overlaps"),
    "end-before-begin": (one(data_offsets=[16, 0]), "begin <= end"),
    "offset-negative": (one(data_offsets=[-16, 0]), "begin <= end"),
    "offset-float": (one(data_offsets=[0, 16.0]), "begin <= end"),
    "offset-text": (one(data_offsets=["0", "16"]), "begin <= end"),
    "offset-bool": (one(4, shape=[1], data_offsets=[False, 4]), "begin <= end"),
    "offset-2^64": (one(data_offsets=[0, 1 << 64]), "begin <= end"),
    "three-offsets": (one(data_offsets=[0, 8, 16]), "begin <= end"),
    "trailing-bytes": (one(17), "1 bytes follow the last tensor; allowed: 0"),
    "data-cut": (one(15), "bytes, need"),
    "data-missing": (one(0), "incomplete download? have"),
    # L31
    "shape-and-bytes-differ": (one(shape=[2, 3]), "found 16 bytes of data; F32 [2, 3] takes 24"),
    "shape-0-by-2^62": (one(shape=[0, 1 << 62]), "found 16 bytes of data"),
    "shape-product-wraps": (one(shape=[1 << 32, 1 << 32]), "takes 73786976294838206464"),
    "shape-2^64": (one(shape=[1 << 64]), "its shape is not a list"),
    "shape-negative": (one(shape=[-2, -2]), "its shape is not a list"),
    "shape-of-9-axes": (one(shape=[1] * 9), "its shape is not a list of at most 8"),
    "shape-a-number": (one(shape=4), "its shape is not a list"),
    "shape-text": (one(shape=["2", "2"]), "its shape is not a list"),
    # L32
    "dtype-unknown": (one(dtype="F13"), "found dtype F13; known are F32, F16, BF16"),
    "dtype-a-list": (one(dtype=["F32"]), "found dtype list"),
    "dtype-lowercase": (one(dtype="f32"), "found dtype f32"),
    "dtype-missing": (one(dtype=None), "needs dtype, shape and data_offsets"),
    "field-extra": (one(quant="x"), "and nothing else"),
    "tensor-a-number": (lambda m: m.safetensors({"a": 1}), "needs dtype, shape and data_offsets"),
    "name-empty": (lambda m: m.safetensors({"": m.tensor()}, bytes(16)), "has an empty or unprintable name"),
    "name-newline": (lambda m: m.safetensors({"a\nb": m.tensor()}, bytes(16)), r'tensor "a\nb"'),
    "name-escape": (lambda m: m.safetensors({"\x1b[2J": m.tensor()}, bytes(16)), r'tensor "\x1b[2J"'),
}


@pytest.mark.parametrize("name", SHARD)
def test_shard_refused(name: str, make: SimpleNamespace, tmp_path: Path) -> None:
    build, decisive = SHARD[name]
    path = single(make, tmp_path, build(make))
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        open_model(path)
    assert time.process_time() - start < RUNAWAY
    message = str(caught.value)
    assert decisive in message
    assert message.isprintable()
    assert len(message) < 700
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


A_ELSEWHERE = {"a": "../m-1.safetensors"}
INDEX: dict[str, tuple[dict[str, Any], str]] = {
    # L33
    "parent-folder": ({"weight_map": A_ELSEWHERE}, 'found "../m-1.safetensors"; allowed: a plain name'),
    "absolute-path": ({"weight_map": {"a": "/etc/x.safetensors"}}, 'found "/etc/x.safetensors"'),
    "sub-folder": ({"weight_map": {"a": "sub/x.safetensors"}}, 'found "sub/x.safetensors"'),
    "backslash": ({"weight_map": {"a": "..\\x.safetensors"}}, "allowed: a plain name"),
    "hidden": ({"weight_map": {"a": ".x.safetensors"}}, "allowed: a plain name"),
    "nul-in-name": ({"weight_map": {"a": "x\0.safetensors"}}, r'found "x\x00.safetensors"'),
    "newline-after-name": ({"weight_map": {"a": "x.safetensors\n"}}, "allowed: a plain name"),
    "name-too-long": ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "allowed: a plain name"),
    "pickle-named": ({"weight_map": {"a": "pytorch_model.bin"}}, "ends in .safetensors"),
    "shard-a-number": ({"weight_map": {"a": 1}}, 'found "1"'),
    "map-a-list": ({"weight_map": ["m-1.safetensors"]}, "weight_map: found an array of 1 values; allowed: an object"),
    "map-empty": ({"weight_map": {}}, "names 0 files; allowed: 1 to 4096"),
    "map-of-5000-files": ({"weight_map": {f"{i}": f"{i}.safetensors" for i in range(5000)}}, "names 5000 files"),
    "shard-missing": ({"m__2_safetensors": None}, "1 of 2 files are missing: m-2.safetensors"),
    "tensor-in-other-shard": (
        {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}},
        "1 tensors are not in the file it names: b",
    ),
    "tensor-nowhere": (
        {"weight_map": {"x": "m-1.safetensors", "c": "m-2.safetensors"}},
        "1 tensors are not in the file it names: x",
    ),
    "index-not-json": ({"model_safetensors_index_json": b"weights"}, "is not JSON"),
    "index-a-list": ({"model_safetensors_index_json": b"[]"}, "is a JSON list"),
    "index-key-twice": (
        {"model_safetensors_index_json": b'{"a":1,"a":2}'},
        'key "a" is given twice',
    ),
    "config-missing": ({"config_json": None}, "config.json is missing"),
    "config-not-json": ({"config_json": b"model_type: llama"}, "is not JSON"),
    "config-empty": ({"config_json": b""}, "is not JSON"),
    "config-nan": ({"config_json": b'{"x": NaN}'}, "found NaN"),
    "config-a-list": ({"config_json": b"[]"}, "is a JSON list; an object is needed"),
}


@pytest.mark.parametrize("name", INDEX)
def test_folder_refused(name: str, make: SimpleNamespace, tmp_path: Path) -> None:
    changes, decisive = INDEX[name]
    path = sharded(make, tmp_path, **changes)
    with pytest.raises(ModelFormatError) as caught:
        open_model(path)
    message = str(caught.value)
    assert decisive in message
    assert message.isprintable()
    assert len(message) < 1000


def test_a_tensor_in_two_shards(make: SimpleNamespace, tmp_path: Path) -> None:
    double = make.safetensors({"a": make.tensor(), "c": make.tensor(offsets=(16, 32))}, bytes(32))
    with pytest.raises(ModelFormatError, match=r'm-2.safetensors: tensor "a": is also in m-1.safetensors'):
        open_model(sharded(make, tmp_path, m__2_safetensors=double))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"total_size": 47}, "total_size: found 47; the files hold 48 bytes"),
        ({"total_size": "48"}, "total_size: found 48"),
        ({"weight_map": {"a": "m-1.safetensors", "c": "m-2.safetensors"}}, "1 tensors of the files are not listed: b"),
    ],
    ids=["total-wrong", "total-text", "unlisted"],
)
def test_harmless_contradictions_are_warnings_or_refused(
    changes: dict[str, Any], expected: str, make: SimpleNamespace, tmp_path: Path
) -> None:
    path = sharded(make, tmp_path, **changes)
    (warning,) = open_model(path).warnings
    assert expected in warning
    with pytest.raises(ModelFormatError, match=expected):
        open_model(path, strict=True)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "needs config.json and model.safetensors"),
        (["config.json"], "model.safetensors is missing"),
        (
            ["config.json", "pytorch_model.bin"],
            "are pickles, which are never opened: convert pytorch_model.bin",
        ),
        (["config.json", "consolidated.00.pth"], "pickles, which are never opened"),
        (["a.gguf", "b.gguf"], "name one of its GGUF files instead: a.gguf, b.gguf"),
        (["config.json", "adapter_model.safetensors"], "it has adapter_model.safetensors"),
    ],
    ids=["nothing", "only-config", "pytorch-bin", "meta-pth", "ggufs", "adapter"],
)
def test_folders_that_are_not_models(files: list[str], expected: str, make: SimpleNamespace, tmp_path: Path) -> None:
    path = make.folder(tmp_path, dict.fromkeys(files, b"{}"))
    with pytest.raises(ModelFormatError, match=expected):
        open_model(path)


def test_pickles_beside_safetensors_are_not_touched(make: SimpleNamespace, tmp_path: Path) -> None:
    path = single(make, tmp_path, make.safetensors({"a": make.tensor()}, bytes(16)))
    (path / "pytorch_model.bin").mkdir()  # to open it would fail
    assert list(open_model(path).weights) == ["a"]


def test_missing_and_denied(tmp_path: Path, make: SimpleNamespace) -> None:
    with pytest.raises(ModelFormatError, match="does not exist"):
        open_model(tmp_path / "none")
    with pytest.raises(ModelFormatError, match="folder: does not exist"):
        HfFolder.open(tmp_path / "none")
    path = single(make, tmp_path / "m", make.safetensors({"a": make.tensor()}, bytes(16)))
    with pytest.raises(ModelFormatError, match="cannot be listed: Not a directory"):
        HfFolder.open(path / "config.json")
    with pytest.raises(ModelFormatError, match=r"name the folder that also holds its config.json"):
        open_model(path / "model.safetensors")
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    with pytest.raises(ModelFormatError, match="is a folder; a regular file is needed"):
        open_model(path)


def test_truncation_at_every_byte(make: SimpleNamespace, tmp_path: Path) -> None:
    whole = make.safetensors({"a": make.tensor(), "b": make.tensor(offsets=(16, 32))}, bytes(32))
    path = single(make, tmp_path, whole)
    assert len(open_model(path).weights) == 2
    for cut in range(len(whole)):
        (path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError):
            open_model(path)


def test_mutants_are_read_or_refused_never_worse(make: SimpleNamespace, tmp_path: Path) -> None:
    rng = random.Random(77)
    tensors = {"a": make.tensor(), "b": make.tensor("BF16", (8,), (16, 32)), "__metadata__": {"format": "pt"}}
    whole = make.safetensors(tensors, bytes(32))
    path = single(make, tmp_path, whole)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        mutant = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(mutant))
            kind = rng.randrange(4)
            if kind == 0:
                mutant[at] = rng.choice(b'0123456789"[]{},:-. \0\xff')
            elif kind == 1:
                del mutant[at : at + rng.randrange(1, 4)]
            elif kind == 2:
                mutant[at:at] = rng.choice((b"9" * 30, b"[[[[", b'"a":', b"1e999", b"-"))
            else:
                mutant[:8] = struct.pack("<Q", rng.choice((0, 1, 2, len(mutant), 1 << 63, rng.randrange(300))))
        (path / "model.safetensors").write_bytes(mutant)
        start = time.process_time()
        try:
            model = open_model(path)
            for name in model.weights:
                with suppress(UnsupportedModelError):
                    to_float(model.weights[name])
            outcomes["read"] += 1
        except ThermoclineError:
            outcomes["refused"] += 1
        assert time.process_time() - start < RUNAWAY, bytes(mutant)
    assert outcomes["refused"] > 800
    assert outcomes["read"] > 20


@pytest.mark.parametrize("kind", ["tensors", "nested-lists", "long-shape", "long-name"])
def test_headers_of_a_megabyte_cost_a_second_and_64_megabytes_at_most(
    kind: str, make: SimpleNamespace, tmp_path: Path
) -> None:
    content = {
        "tensors": lambda: make.safetensors({f"{i:x}": make.tensor(shape=[0], offsets=[0, 0]) for i in range(17_000)}),
        "nested-lists": lambda: make.safetensors({"a": [[]] * 300_000}),
        "long-shape": lambda: make.safetensors({"a": make.tensor(shape=[1] * 300_000, offsets=[0, 4])}, bytes(4)),
        "long-name": lambda: make.safetensors({"n" * 1_000_000: make.tensor()}, bytes(16)),
    }[kind]()
    path = single(make, tmp_path, content)
    start = time.process_time()
    with suppress(ModelFormatError):
        open_model(path)
    assert time.process_time() - start < RUNAWAY
    tracemalloc.start()
    with suppress(ModelFormatError):
        open_model(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= (64 << 20) + 2 * len(content)
