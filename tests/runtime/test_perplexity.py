"""Perplexity: llama.cpp's windows, counted by hand; the same in every mode that loses nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import _native, perplexity
from thermocline.activity.likelihood import Likelihood, log_probabilities
from thermocline.config import LoadSettings
from thermocline.errors import NumericalError, UsageError
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.open import open_model
from thermocline.runtime.loading import load_model
from thermocline.runtime.perplexity import Chunk, Scored, cut
from thermocline.text.tokenizer import Tokenizer

N_CTX = 32
LEVEL = [isa for isa in _native.isa_levels() if isa != "amx"][-1]
"""The best level at which a batch has the bits of single tokens."""
TEXT = "def first(n):\n    return n + 1\n\n\nclass Jug:\n    size = 'five dozen'\n" * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text(TEXT)
    return tmp_path / "a.py"


def settings(**changes: Any) -> LoadSettings:
    return LoadSettings(**{"ctx_size": N_CTX, "threads": 1, "ubatch": 7, **changes})


def with_bos(model: Path, copy: Path) -> Path:
    with GgufFile.open(model) as file:
        tensors = [NewTensor(t.name, t.format, t.shape, lambda t=t: t.data) for t in file.tensors.values()]
        write_gguf(copy, file.typed_metadata() | {"tokenizer.ggml.add_bos_token": True}, tensors)
    return copy


def by_hand(model: Path, text: str, bos: bool) -> list[float]:
    """Negative log likelihoods by llama.cpp's definition, token by token through the engine that generates text."""
    with open_model(model) as source:
        loaded = load_model(source, settings(mode="dense"))
        stream = loaded.tokenizer.encode(text)
        assert (stream[0] == loaded.tokenizer.bos_id) is bos
        found = []
        for start in range(0, len(stream) - N_CTX + 1, N_CTX):
            tokens = stream[start : start + N_CTX]
            targets = list(tokens)
            if bos:
                tokens[0] = loaded.tokenizer.bos_id
            engine = loaded.engine
            ticket = engine.begin()
            logits, _ = engine.prefill(tokens[:1], reuse=False)
            for i in range(N_CTX - 1):
                if i >= N_CTX // 2:
                    wide = logits.astype(np.float64)
                    found.append(math.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[targets[i + 1]])
                logits = engine.step(tokens[i + 1], ticket)
        return found


@pytest.mark.parametrize("bos", [False, True])
def test_it_is_llama_cpps_definition(tiny_model: Path, text: Path, tmp_path: Path, bos: bool) -> None:
    model = with_bos(tiny_model, tmp_path / "bos.gguf") if bos else tiny_model
    nll = np.array(by_hand(model, TEXT, bos))
    found = perplexity(model, [text], settings())
    assert (found.tokens, found.chunks) == (len(nll), len(nll) // 15)
    assert found.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    error = math.sqrt(((nll**2).mean() - nll.mean() ** 2) / (len(nll) - 1)) * math.exp(nll.mean())
    assert found.error == pytest.approx(error, rel=1e-6)


def test_batches_and_modes_that_lose_nothing_give_the_same(tiny_model: Path, text: Path, with_predictor: Any) -> None:
    model = with_predictor(tiny_model)
    found = [
        perplexity(model, [text], settings(isa=LEVEL, cache_type_k="f32", cache_type_v="f32", **changes))
        for changes in ({"mode": "dense"}, {"mode": "exact"}, {"ubatch": 512}, {"ubatch": 1}, {"mode": "predicted"})
    ]
    assert [f.nll for f in found[1:4]] == pytest.approx([found[0].nll] * 3, rel=1e-12)  # they differ in how they add up
    assert found[4].nll == pytest.approx(found[0].nll, rel=1e-4)  # the oracle is exact but for rounding near zero
    assert {f.tokens for f in found} == {90}
    assert [f.mode for f in found] == ["dense", "exact", "exact", "exact", "predicted"]


def test_what_a_predictor_misses_shows(tiny_model: Path, text: Path, with_predictor: Any) -> None:
    """In batches nothing would be predicted, and nothing missed."""
    model = with_predictor(tiny_model, 1e9)
    assert perplexity(model, [text], settings(mode="predicted")).nll != perplexity(model, [text], settings()).nll


def test_chunks_end_where_the_text_does() -> None:
    assert list(cut(31, 32)) == []
    assert list(cut(32, 32)) == [Chunk(0, 32, 16)]
    assert list(cut(95, 32)) == [Chunk(0, 32, 16), Chunk(32, 64, 16)]
    assert list(cut(9, 3)) == [Chunk(0, 3, 1), Chunk(3, 6, 1), Chunk(6, 9, 1)]


@pytest.mark.parametrize(("tokens", "stride"), [(32, 8), (33, 8), (40, 8), (41, 31), (100, 1), (100, 7)])
def test_strides_score_every_token_but_the_first_once(tokens: int, stride: int) -> None:
    scored = []
    for chunk in cut(tokens, 32, stride):
        assert 0 <= chunk.first < chunk.stop - chunk.start <= 32
        scored += range(chunk.start + chunk.first + 1, chunk.stop)
    assert scored == list(range(1, tokens))


def test_limits_strides_and_progress(tiny_model: Path, text: Path) -> None:
    seen: list[Scored] = []
    assert perplexity(tiny_model, [text], settings(), chunks=2, progress=seen.append).tokens == 2 * 15
    assert [(s.chunks, s.total) for s in seen] == [(1, 2), (2, 2)]
    found = perplexity(tiny_model, [text], settings(), stride=16)
    assert found.tokens == len(load_tokens(tiny_model)) - 1


def load_tokens(model: Path) -> list[int]:
    with open_model(model) as source:
        return load_model(source, settings()).tokenizer.encode(TEXT)


def test_several_files_are_one_stream_and_others_are_skipped(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    found = perplexity(tiny_model, [text, tmp_path / "b.bin", tmp_path], settings())
    assert [Path(path).name for path in found.skipped] == ["b.bin"]
    assert found.nll == perplexity(tiny_model, [text], settings()).nll


def test_a_file_that_the_vocabulary_cannot_spell_is_skipped(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode

    def refuse(self: Tokenizer, text: str, **flags: bool) -> list[int]:
        if "quartz" in text:
            raise UsageError("the text has the byte 0x71")
        return encode(self, text, **flags)

    monkeypatch.setattr(Tokenizer, "encode", refuse)
    (tmp_path / "odd.txt").write_text("a quartz\n")
    found = perplexity(tiny_model, [tmp_path / "odd.txt", text], settings())
    assert [Path(path).name for path in found.skipped] == ["odd.txt"]
    assert found.nll == perplexity(tiny_model, [text], settings()).nll
    with pytest.raises(UsageError, match=r"1 file was skipped, .*: odd\.txt"):
        perplexity(tiny_model, [tmp_path / "odd.txt"], settings())


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"ctx_size": 2}, {}, "4 or more"),
        ({}, {"stride": 32}, "a smaller stride"),
        ({}, {"stride": -1}, "0 or more"),
        ({}, {"chunks": -1}, "0 or more"),
        ({"ctx_size": 10_000}, {}, "give more text or a smaller -c"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_model: Path, text: Path, changes: Any, more: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        perplexity(tiny_model, [text], settings(**changes), **more)


def test_logits_that_are_not_finite_are_an_error() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(NumericalError):
            log_probabilities(np.array([[0.0, bad]], np.float32))
    assert math.isnan(Likelihood().mean)
    assert np.exp(log_probabilities(np.array([[3e38, -3e38, 3e38]], np.float32))).tolist() == [[0.5, 0.0, 0.5]]
