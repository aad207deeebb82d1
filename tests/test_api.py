"""The public surface, on a whole file."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import thermocline
from thermocline import LLM, LoadSettings, SamplingSettings
from thermocline.errors import (
    BudgetError,
    ChatTemplateError,
    ContextError,
    HardwareError,
    ModelFormatError,
    SamplingError,
    ThermoclineError,
    UsageError,
)
from thermocline.text.tokenizer import Tokenizer

GREEDY = SamplingSettings(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path):
    with LLM.load(tiny_model, threads=1) as loaded:
        yield loaded


def test_generate_and_stream_agree(llm: LLM) -> None:
    generation = llm.generate("the cat", GREEDY)
    with llm.stream("the cat", GREEDY) as stream:
        items = list(stream)
    assert "".join(item.text for item in items) == generation.text
    assert tuple(item.token for item in items) == generation.tokens
    assert len(generation.tokens) == 24
    assert generation.report.load_seconds == llm.load_seconds > 0


def test_exact_and_dense_give_the_same_tokens_and_exact_reads_less(tiny_model: Path, llm: LLM) -> None:
    with LLM.load(tiny_model, mode="dense", threads=1) as dense:
        assert (dense.mode, llm.mode) == ("dense", "exact")
        left, right = dense.generate("abc", GREEDY), llm.generate("abc", GREEDY)
    assert left.tokens == right.tokens
    assert left.logprobs == right.logprobs
    assert right.report.bytes_per_token < left.report.bytes_per_token
    assert 0.2 < right.report.active_share < 0.8
    assert right.report.active_share == left.report.active_share


def test_threads_do_not_change_the_tokens(tiny_model: Path, llm: LLM) -> None:
    with LLM.load(tiny_model, threads=2) as two:
        assert two.threads == 2
        assert two.generate("abc", GREEDY).logprobs == llm.generate("abc", GREEDY).logprobs


def test_the_native_kernels_agree_with_the_reference(tiny_model: Path, llm: LLM) -> None:
    """Native Q8_0 products round activations to 8 bits, which reference does not: logprobs differ by about 1 %."""
    with LLM.load(tiny_model, ops="reference") as reference:
        assert reference.ops == "reference"
        left, right = (model.generate("abc", GREEDY, max_tokens=1) for model in (reference, llm))
    assert left.logprobs == pytest.approx(right.logprobs, abs=0.1)


@pytest.mark.parametrize("ubatch", [1, 3, 512])
def test_the_size_of_a_pass_does_not_change_the_tokens(tiny_model: Path, llm: LLM, ubatch: int) -> None:
    with LLM.load(tiny_model, ubatch=ubatch, threads=1) as other:
        prompt = "a prompt of some length, cut here and there"
        assert other.generate(prompt, GREEDY).tokens == llm.generate(prompt, GREEDY).tokens


def test_the_same_seed_gives_the_same_text_and_the_report_tells_it(llm: LLM) -> None:
    first = llm.generate("x", max_tokens=20)
    again = llm.generate("x", max_tokens=20, seed=first.report.seed)
    assert first.tokens == again.tokens


def test_overrides_go_on_top_of_settings(llm: LLM) -> None:
    assert len(llm.generate("x", GREEDY, max_tokens=3).tokens) == 3


def test_tokens_are_accepted_as_a_prompt(llm: LLM) -> None:
    tokens = llm.tokenize("the cat")
    assert llm.detokenize(tokens) == "the cat"
    assert llm.generate(tokens, GREEDY).tokens == llm.generate("the cat", GREEDY).tokens


def test_special_tokens_of_a_text_are_only_read_when_asked_for(llm: LLM) -> None:
    assert len(llm.tokenize("<|im_end|>")) == 10
    assert len(llm.tokenize("<|im_end|>", parse_special=True)) == 1


def test_logprobs_are_sorted_and_contain_the_greedy_token(llm: LLM) -> None:
    for item in llm.stream("x", GREEDY, logprobs=4):
        values = [p for _, p in item.top]
        assert values == sorted(values, reverse=True)
        assert item.top[0] == (item.token, item.logprob)


def test_a_chat_reuses_what_it_computed(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    first = llm.chat(messages, temperature=0, max_tokens=4)
    again = llm.chat(messages, temperature=0, max_tokens=4)
    assert first.tokens == again.tokens
    assert again.report.cached_tokens == again.report.prompt_tokens - 1


def test_generate_after_a_chat_starts_afresh(llm: LLM) -> None:
    llm.chat([{"role": "user", "content": "hi"}], max_tokens=2)
    assert llm.generate("hi", max_tokens=1).report.cached_tokens == 0


def test_a_text_that_goes_on_is_not_computed_again_where_that_is_asked_for(llm: LLM) -> None:
    begun = llm.generate("hello there", temperature=0, max_tokens=4)
    text = f"hello there{begun.text}\nhello"
    first = llm.generate(text, temperature=0, max_tokens=4, cache_prompt=True)
    assert begun.report.prompt_tokens - 1 <= first.report.cached_tokens < first.report.prompt_tokens
    afresh = llm.generate(text, temperature=0, max_tokens=4)
    assert afresh.report.cached_tokens == 0
    assert afresh.tokens == first.tokens


def test_spec_and_settings_are_told(llm: LLM, tiny_model: Path) -> None:
    assert (llm.spec.family, llm.spec.n_layer, llm.n_ctx, llm.threads) == ("arcee", 2, 128, 1)
    assert llm.ops.startswith("cpu/")
    assert llm.has_chat_template
    assert any("down projections were transposed" in notice for notice in llm.notices)
    assert llm.weight_bytes == pytest.approx(tiny_model.stat().st_size, rel=0.3)


def test_a_longer_context_than_trained_is_told(tiny_model: Path) -> None:
    with LLM.load(tiny_model, ctx_size=200) as loaded:
        assert loaded.n_ctx == 200
        assert any("longer than the 128" in notice for notice in loaded.notices)


def test_auto_is_dense_where_no_neuron_is_zero(tiny_silu: Path) -> None:
    with LLM.load(tiny_silu) as loaded:
        assert loaded.mode == "dense"
        assert loaded.generate("x", GREEDY).report.active_share == 1.0


def test_a_closed_model_says_so(tiny_model: Path) -> None:
    loaded = LLM.load(tiny_model)
    loaded.close()
    loaded.close()
    with pytest.raises(UsageError, match="closed"):
        loaded.generate("x")


@pytest.mark.parametrize("begun", [True, False])
def test_a_closed_model_ends_its_streams_and_lets_go_of_its_memory(tiny_model: Path, begun: bool) -> None:
    loaded = LLM.load(tiny_model)
    stream = loaded.stream("x", GREEDY)
    if begun:
        next(stream)
    network = weakref.ref(loaded._loaded.engine._sequence)
    loaded.close()
    gc.collect()
    assert network() is None
    with pytest.raises(UsageError, match="this model is closed; load it again"):
        next(stream)
    assert list(stream) == []
    assert stream.report.generated_tokens == begun


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"mode": "exact"}, UsageError, "silu gives none"),
        ({"mode": "fast"}, UsageError, "mode is fast; allowed: auto, dense, exact"),
        ({"threads": -1}, UsageError, "threads is -1"),
        ({"isa": "sse9"}, UsageError, "isa is 'sse9'"),
        ({"ctx_size": 1.5}, UsageError, "ctx_size is 1.5; allowed: a whole number"),
        ({"colour": "red"}, UsageError, "colour is no setting"),
        ({"cache_type_k": "q4_1"}, UsageError, "cache_type_k is q4_1; allowed: f16, f32, q8_0"),
    ],
)
def test_bad_loads_are_refused(tiny_silu: Path, changes, error, words) -> None:
    with pytest.raises(error, match=words):
        LLM.load(tiny_silu, **changes)


def test_a_cache_beyond_the_memory_is_refused_with_a_size_that_fits(tiny_model: Path, monkeypatch) -> None:
    small = thermocline.examine(measure=False).memory
    monkeypatch.setattr(
        "thermocline.runtime.loading.find_memory", lambda: type(small)(1 << 30, 1 << 20, None, 4096, "never")
    )
    with pytest.raises(BudgetError, match=r"use --ctx-size \d+ or less") as caught:
        LLM.load(tiny_model, ctx_size=16384)
    fits = int(re.search(r"--ctx-size (\d+)", str(caught.value))[1])
    with LLM.load(tiny_model, ctx_size=fits) as loaded:
        assert loaded.n_ctx == fits > 1000
    with pytest.raises(BudgetError):
        LLM.load(tiny_model, ctx_size=fits + 1)


def test_a_context_left_to_us_shrinks_to_the_memory_and_says_so(tiny_model: Path, monkeypatch) -> None:
    small = thermocline.examine(measure=False).memory
    monkeypatch.setattr(
        "thermocline.runtime.loading.find_memory", lambda: type(small)(1 << 30, 1 << 20, None, 4096, "never")
    )
    monkeypatch.setattr("thermocline.runtime.loading.CACHE_SHARE", 0.01)
    with LLM.load(tiny_model) as loaded:
        assert 0 < loaded.n_ctx < 128
        assert any(f"using {loaded.n_ctx} tokens" in notice for notice in loaded.notices)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": "many"}, "top_k is 'many'"),
        ({"logit_bias": {300: 1.0}}, "token 300; this model has tokens 0 to 259"),
        ({"stop": [""]}, "stop is"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"logprobs": 21}, "logprobs is 21"),
    ],
)
def test_bad_sampling_is_refused(llm: LLM, settings, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        llm.generate("x", **settings)


def test_a_prompt_beyond_the_context_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(ContextError, match="129 tokens do not fit a context of 128"):
        llm.stream("x" * 128)
    assert len(llm.generate("x" * 127, GREEDY).tokens) == 1


def test_a_prompt_far_beyond_the_context_is_not_even_encoded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "x" * 1_000_000
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("the text was encoded"))
    for start in (lambda: llm.stream(text), lambda: llm.stream_chat([{"role": "user", "content": text}])):
        with pytest.raises(ContextError, match=r"^at least \d+ tokens do not fit a context of 128; shorten") as caught:
            start()
        assert 128 < caught.value.needed <= 1_000_100


def test_a_model_without_template_refuses_to_chat(tiny_plain: Path) -> None:
    with LLM.load(tiny_plain) as loaded:
        assert not loaded.has_chat_template
        with pytest.raises(ChatTemplateError, match="no chat template"):
            loaded.chat([{"role": "user", "content": "x"}])


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError):
        LLM.load(tmp_path / "none.gguf")


def test_without_a_shipped_model_one_must_be_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("thermocline.tasks.SHIPPED", tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="name one with -m"):
        LLM.load()


def test_describe_tells_without_loading(tiny_model: Path, tiny_plain: Path) -> None:
    info = thermocline.describe(tiny_model)
    assert info.spec is not None
    assert (info.kind, info.name, info.tensors, info.problems) == ("gguf", "tiny", 19, ())
    assert {t.format: t.tensors for t in info.types} == {"Q8_0": 14, "F32": 5}
    assert info.chat_template is not None
    assert thermocline.describe(tiny_plain).chat_template is None
    assert info.as_dict()["parameters"] == info.spec.parameters


def test_describe_goes_as_far_as_it_can(tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "unknown.gguf"
    broken.write_bytes(tiny_model.read_bytes().replace(b"arcee", b"qwert"))
    info = thermocline.describe(broken)
    assert info.spec is None
    assert info.tensors == 19
    assert "family qwert is not implemented" in info.problems[0]


def test_bench_measures(llm: LLM) -> None:
    rows = list(llm.bench(prompt=16, generate=8, repetitions=2))
    assert [row.test for row in rows] == ["pp16", "tg8"]
    assert all(row.mean > 0 for row in rows)


def test_settings_objects_are_taken_as_they_are(tiny_model: Path) -> None:
    with LLM.load(tiny_model, LoadSettings(ctx_size=64), threads=1) as loaded:
        assert (loaded.n_ctx, loaded.threads) == (64, 1)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, thermocline; print({'numpy', 'rich', 'tokenizers', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_every_public_name_is_there() -> None:
    for name in thermocline.__all__:
        assert getattr(thermocline, name) is not None
    with pytest.raises(AttributeError):
        thermocline.nothing  # noqa: B018
    assert issubclass(HardwareError, ThermoclineError)
