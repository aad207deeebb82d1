"""What a program hands over and is of no use is refused in words, before any file is opened or anything computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import LLM, api
from thermocline.errors import UsageError
from thermocline.runtime.arguments import texts_of


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM.load(tiny_model, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "prompt is None; allowed: a text, or a list of token ids"),
        (7, "prompt is 7; allowed"),
        (b"abc", "prompt is b'abc'; allowed"),
        ({1: 2}, "allowed: a text, or a list of token ids"),
        ([2**70], "token id 1180591620717411303424 is outside the vocabulary; allowed: 0 to 259"),
        ([-1], "token id -1 is outside"),
        (["a"], "token id 'a' is not a whole number"),
        ([1.5], "token id 1.5 is not a whole number"),
        ([True], "token id True is not a whole number"),
        (np.zeros((2, 2), np.int32), "is not a whole number"),
        ([], "the prompt is empty"),
    ],
)
def test_a_prompt_is_a_text_or_ids(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        llm.generate(prompt, max_tokens=1)


def test_ids_come_in_any_sequence(llm: LLM) -> None:
    ids = [5, 9, 2]
    wanted = llm.generate(ids, temperature=0, max_tokens=4).tokens
    for same in (tuple(ids), np.array(ids, np.int32), iter(ids)):
        assert llm.generate(same, temperature=0, max_tokens=4).tokens == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, t: LLM.load(5), "model is 5; allowed: a file or a folder"),
        (lambda m, t: LLM.load(m, settings={}), r"settings are {}; allowed: LoadSettings\(...\), or single ones"),
        (lambda m, t: LLM.load(m, "dense"), r"settings are 'dense'; allowed: LoadSettings\(...\)"),
        (lambda m, t: api.plan(m, {}), r"settings are {}; allowed: PlanSettings\(...\)"),
        (lambda m, t: api.perplexity(m, [t], chunks="1"), "chunks is '1'; allowed: a whole number"),
        (lambda m, t: api.perplexity(m, [t], stride=True), "stride is True; allowed: a whole number"),
        (lambda m, t: api.perplexity(m, [t], {}), r"settings are {}; allowed: LoadSettings"),
        (lambda m, t: api.perplexity(m, None), "texts are None; allowed: files and folders"),
        (lambda m, t: api.perplexity(m, [3]), "a text is 3; allowed: a file or a folder"),
        (lambda m, t: api.profile(m, [t], "x", existing="foo"), "existing is foo; allowed: refuse, merge, overwrite"),
        (lambda m, t: api.profile(m, [t], "x", tokens=1.5), "tokens is 1.5; allowed: a whole number"),
        (lambda m, t: api.order(t, "x", by="foo"), "by is foo; allowed: frequency, contribution"),
    ],
)
def test_wrong_kinds_are_refused(tiny_model: Path, call: Callable[[Any, Any], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call(tiny_model, Path(__file__))


def test_sampling_is_of_its_kind(llm: LLM) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(UsageError, match=r"settings are {}; allowed: SamplingSettings"):
            call("x", {})  # type: ignore[operator]


def test_a_single_text_is_welcome(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat " * 40)
    one, many = (api.perplexity(tiny_model, texts, chunks=1) for texts in (str(text), [text]))
    assert one.nll == many.nll
    assert texts_of(text) == (text,)
    assert texts_of(["a", text]) == ("a", text)
