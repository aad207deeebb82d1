"""Streams of items: text, stops, limits, cancelling, measurements."""

from __future__ import annotations

import re

import numpy as np
import pytest

from thermocline.config import SamplingSettings
from thermocline.errors import ContextError, NumericalError, SamplingError, UsageError
from thermocline.runtime.engine import Engine
from thermocline.runtime.generation import FinishReason, Stream
from thermocline.text.tokenizer import Tokenizer

GREEDY = {"temperature": 0.0}


def stream(engine: Engine, tokenizer: Tokenizer, *, prompt: tuple[int, ...] = (65,), reuse=False, **settings) -> Stream:
    return Stream(engine, tokenizer, prompt, SamplingSettings(**{**GREEDY, **settings}), reuse=reuse)


def test_text_comes_token_by_token(saying, tokenizer) -> None:
    engine, _ = saying("hello")
    items = list(stream(engine, tokenizer, max_tokens=5))
    assert [item.text for item in items] == ["h", "e", "l", "l", "o"]
    assert [item.token for item in items] == list(b"hello")
    assert [item.finish_reason for item in items] == [None] * 4 + [FinishReason.LENGTH]
    assert all(item.seconds > 0 and item.logprob <= 0 for item in items)


def test_max_tokens_is_clamped_to_what_the_context_leaves(saying, tokenizer) -> None:
    engine, _ = saying("x", n_ctx=10)
    generation = stream(engine, tokenizer, prompt=(65,) * 7, max_tokens=1000).collect()
    assert generation.text == "xxx"
    assert generation.finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(("length", "tokens"), [(8, 2), (9, 1)])
def test_the_context_may_be_filled_to_the_last_token(saying, tokenizer, length: int, tokens: int) -> None:
    engine, fake = saying("x", n_ctx=10)
    assert len(stream(engine, tokenizer, prompt=(65,) * length).collect().tokens) == tokens
    assert len(fake.cells) <= 10


def test_a_prompt_as_long_as_the_context_is_refused_before_any_work(saying, tokenizer) -> None:
    engine, fake = saying("x", n_ctx=10)
    with pytest.raises(ContextError, match="11 tokens do not fit a context of 10"):
        stream(engine, tokenizer, prompt=(65,) * 10)
    assert fake.steps == []


def test_end_of_sequence_ends_and_has_no_text(saying, tokenizer) -> None:
    end = next(iter(tokenizer.eos_ids))
    engine, _ = saying([*b"ab", end])
    generation = stream(engine, tokenizer).collect()
    assert (generation.text, generation.tokens) == ("ab", (*b"ab", end))
    assert generation.finish_reason == FinishReason.STOP


def test_end_of_sequence_can_be_ignored(saying, tokenizer) -> None:
    end = next(iter(tokenizer.eos_ids))
    engine, _ = saying([97, end, 98, end, 99])
    generation = stream(engine, tokenizer, ignore_eos=True, max_tokens=5).collect()
    assert (generation.text, generation.finish_reason) == ("abc", FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        ("one. two", (". ",), "one"),
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("stop", ("stop",), ""),
        ("first second", ("second", "st s"), "fir"),
        ("käse", ("ä",), "k"),
        ("a→b", ("→b", "x"), "a"),
    ],
)
def test_a_stop_string_over_several_tokens_ends_the_text(saying, tokenizer, answer, stop, text) -> None:
    engine, _ = saying(answer)
    generation = stream(engine, tokenizer, stop=stop, max_tokens=40).collect()
    assert (generation.text, generation.finish_reason) == (text, FinishReason.STOP)


def test_half_a_stop_string_is_shown_when_nothing_follows(saying, tokenizer) -> None:
    engine, _ = saying("one STO")
    items = list(stream(engine, tokenizer, stop=("STOP",), max_tokens=7))
    assert "".join(item.text for item in items) == "one STO"
    assert [item.text for item in items][4:] == ["", "", "STO"]


def test_half_a_stop_string_is_shown_before_end_of_sequence(saying, tokenizer) -> None:
    engine, _ = saying([*b"one STO", next(iter(tokenizer.eos_ids))])
    assert stream(engine, tokenizer, stop=("STOP",)).collect().text == "one STO"


@pytest.mark.parametrize("text", ["é", "→", "🜁", "a🜁b"])
def test_characters_split_over_tokens_come_whole(saying, tokenizer, text: str) -> None:
    engine, _ = saying(text)
    items = list(stream(engine, tokenizer, max_tokens=len(text.encode())))
    assert "".join(item.text for item in items) == text
    assert all("\ufffd" not in item.text for item in items)


def test_a_character_cut_by_the_limit_becomes_a_replacement(saying, tokenizer) -> None:
    engine, _ = saying("🜁")
    items = list(stream(engine, tokenizer, max_tokens=2))
    assert [item.text for item in items] == ["", "\ufffd"]


def test_cancelling_leaves_the_engine_usable(saying, tokenizer) -> None:
    engine, _ = saying("hello")
    first = stream(engine, tokenizer)
    assert next(first).text == "h"
    first.close()
    assert list(first) == []
    assert first.report.generated_tokens == 1
    assert stream(engine, tokenizer, max_tokens=5).collect().text == "hello"


def test_leaving_a_with_block_cancels(saying, tokenizer) -> None:
    engine, fake = saying("hello")
    with stream(engine, tokenizer) as running:
        next(running)
    assert list(running) == []
    assert len(fake.steps) == 1


def test_a_newer_stream_ends_an_older_one_and_is_not_disturbed(saying, tokenizer) -> None:
    engine, _ = saying("hello")
    old = stream(engine, tokenizer)
    next(old)
    new = stream(engine, tokenizer, max_tokens=5)
    text = next(new).text
    with pytest.raises(UsageError, match="another generation was started"):
        next(old)
    assert text + "".join(item.text for item in new) == "hello"


def test_logits_that_are_not_finite_fail_the_run_and_are_not_reused(saying, tokenizer) -> None:
    engine, fake = saying("hello")
    good = fake.choose
    fake.choose = lambda cells: np.full(fake.n_vocab, np.nan) if len(cells) == 3 else good(cells)
    running = stream(engine, tokenizer, reuse=True)
    assert [next(running).text, next(running).text] == ["h", "e"]
    with pytest.raises(NumericalError, match="260 of 260 logits are not finite"):
        next(running)
    fake.choose = good
    again = stream(engine, tokenizer, prompt=(65, 104, 101), reuse=True, max_tokens=1)
    again.collect()
    assert again.report.cached_tokens == 0


def test_a_bias_outside_the_vocabulary_is_refused_before_any_work(saying, tokenizer) -> None:
    engine, fake = saying("x")
    with pytest.raises(SamplingError, match="token 260"):
        stream(engine, tokenizer, logit_bias={260: 1.0})
    assert fake.steps == []


def test_penalties_see_the_prompt(saying, tokenizer) -> None:
    engine, fake = saying("x")
    logits = np.zeros(fake.n_vocab, np.float32)
    logits[65], logits[66] = 2.0, 1.0
    fake.choose = lambda cells: logits
    assert stream(engine, tokenizer, max_tokens=1).collect().text == "A"
    assert stream(engine, tokenizer, max_tokens=1, presence_penalty=1.5).collect().text == "B"


def test_the_seed_decides_the_text(saying, tokenizer) -> None:
    engine, fake = saying("x")
    fake.choose = lambda cells: np.zeros(fake.n_vocab, np.float32)
    settings = {"temperature": 1.0, "top_k": 0, "max_tokens": 20, "ignore_eos": True}
    texts = [stream(engine, tokenizer, seed=seed, **settings).collect().tokens for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_the_report_counts(saying, tokenizer) -> None:
    engine, _ = saying("hello")
    generation = stream(engine, tokenizer, prompt=(65, 66), max_tokens=5).collect()
    report = generation.report
    assert (report.prompt_tokens, report.generated_tokens, report.decode_tokens) == (2, 5, 4)
    assert report.active_share == pytest.approx(4 / 50)
    assert report.bytes_per_token == pytest.approx(1600 + 2 * np.mean([min(p, 9) + 3 for p in (3, 4, 5, 6)]))
    assert report.prompt_rate > 0 < report.decode_rate
    assert report.first_token_seconds >= report.prompt_seconds > 0
    assert report.as_dict()["decode_rate"] == report.decode_rate
    assert re.search(
        r"prompt 2 tokens .* 5 tokens at .* tok/s · 8\.0% of FFN neurons active \(mode exact\) · .* GB/s", report.line()
    )


def test_the_consumer_does_not_slow_the_figures_down(saying, tokenizer, monkeypatch) -> None:
    """The clock moves by one second at each look; what passes between two items belongs to the consumer."""
    now = [0.0]

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("thermocline.runtime.generation.time.perf_counter", tick)
    engine, _ = saying("hello")
    running = stream(engine, tokenizer, max_tokens=3)
    for _ in running:
        now[0] += 1000.0
    assert running.report.decode_seconds == 2.0
    assert running.report.first_token_seconds == 2.0


def test_a_run_of_one_token_has_no_decode_rate(saying, tokenizer) -> None:
    engine, _ = saying("x")
    report = stream(engine, tokenizer, max_tokens=1).collect().report
    assert (report.decode_tokens, report.decode_rate, report.active_share) == (0, 0.0, 0.0)
    assert "FFN" not in report.line()
