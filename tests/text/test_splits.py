"""Words as each rule cuts them, worked out by hand from the models' own tokenizers."""

from __future__ import annotations

import pytest

from thermocline.errors import UnsupportedModelError
from thermocline.text.splits import SPLIT_RULES, split_rule
from thermocline.text.tokenizer import BYTE_OF_CHARACTER

CASES = {
    "default": ("a 1234=5", ["a", " ", "123", "4", "=", "5"]),
    "gpt-2": ("it's  12345\n\nx", ["it", "'s", " ", " 12345", "\n", "\n", "x"]),
    "llama-bpe": ("It'S 12345 (a)\n\n b", ["It", "'S", " ", "123", "45", " (", "a", ")\n\n", " b"]),
    "dbrx": ("x1234", ["x", "123", "4"]),
    "minicpm5": ("x 1234", ["x", " ", "123", "4"]),
    "qwen2": ("it's 123 (a)", ["it", "'s", " ", "1", "2", "3", " (", "a", ")"]),
    "qwen35": ("e\u0301t\u0301 1", ["e\u0301t\u0301", " ", "1"]),
    "starcoder": ("x 123 it's", ["x", " ", "1", "2", "3", " it", "'s"]),
    "falcon": ("a=b 1234", ["a", "=", "b", " ", "123", "4"]),
    "deepseek-llm": ("a 12\n湖水b", ["a", " ", "12", "\n", "湖水", "b"]),
    "deepseek-coder": ("a 12\nb;c", ["a", " ", "1", "2", "\n", "b", ";", "c"]),
    "deepseek-v3": ("x.foo 1234湖", ["x", ".foo", " ", "123", "4", "湖"]),
    "tekken": ("HTTPServer 12 a/b//", ["HTTPServer", " ", "1", "2", " a", "/b", "//"]),
    "gpt-4o": ("parseJSON's 1234", ["parse", "JSON's", " ", "123", "4"]),
    "bailingmoe": ("it'D 12\n\nx", ["it", "'D", " ", "1", "2", "\n\n", "x"]),
    "seed-coder": ("x; 12;\ny", ["x", ";", " ", "1", "2", ";", "\n", "y"]),
    "bloom": ("a b.c 123", ["a", " b", ".", "c", " 123"]),
    "viking": ("a 12", ["a", " ", "1", "2"]),
}


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES.keys())
def test_words(name: str, case: tuple[str, list[str]]) -> None:
    text, words = case
    cut = [word for word, _ in split_rule(name).pre_tokenizer().pre_tokenize_str(text)]
    assert [bytes(BYTE_OF_CHARACTER[c] for c in word).decode() for word in cut] == words


def test_every_rule_has_a_case() -> None:
    assert {id(split_rule(name)) for name in CASES} == {id(rule) for rule in SPLIT_RULES.values()}


@pytest.mark.parametrize("name", SPLIT_RULES)
def test_every_character_is_kept(name: str) -> None:
    text = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100), *range(0x3000, 0x3100), 0x1F600, 0x10400]))
    cut = "".join(word for word, _ in split_rule(name).pre_tokenizer().pre_tokenize_str(text))
    assert bytes(BYTE_OF_CHARACTER[c] for c in cut).decode() == text


@pytest.mark.parametrize("name", ["", "Llama-BPE", "gpt2", "qwen3\x1b[31m"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="not known; known: ") as caught:
        split_rule(name)
    assert "\x1b" not in str(caught.value)
