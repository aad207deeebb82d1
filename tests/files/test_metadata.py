"""The getters of metadata: what they take, and what they say when they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thermocline.errors import ModelFormatError
from thermocline.files.metadata import Metadata

VALUES: dict[str, Any] = {
    "seven": 7, "half": 0.5, "three": 3.0, "nan": float("nan"), "inf": float("inf"), "yes": True, "no": False,
    "null": None, "text": "hello", "digits": "7", "ints": np.array([1, 2], np.uint8), "list": [1, 2],
    "floats": np.array([0.5], np.float32), "mixed": [1, 0.5], "bools": [True, False], "words": ["a", "b"],
    "odd-words": ["a", 1], "object": {"inner": 3, "deep": {"x": "y"}}, "huge": 1 << 300, "empty": [],
    "long": "x" * 100, "wide": [1 << 63],
}  # fmt: skip


@pytest.fixture
def meta() -> Metadata:
    return Metadata("m.gguf", VALUES)


def test_values_that_are_allowed(meta: Metadata) -> None:
    assert meta.integer("seven", 7, 7) == 7
    assert meta.number("half", 0, 1) == 0.5
    assert isinstance(meta.number("seven", 0, 10), float)
    assert meta.boolean("yes") is True
    assert meta.boolean("no") is False
    assert meta.text("text", limit=5) == "hello"
    assert meta.array("ints", "integer", length=2).dtype == np.uint8
    assert meta.array("list", "integer").tolist() == [1, 2]
    assert meta.array("floats", "float").tolist() == [0.5]
    assert meta.array("mixed", "float").tolist() == [1.0, 0.5]
    assert meta.array("empty", "integer", length=0).tolist() == []
    assert meta.strings("words", length=2) == ["a", "b"]
    assert meta.section("object").integer("inner", 0, 9) == 3
    assert meta.section("object").section("deep").text("x") == "y"
    assert dict(meta) == VALUES
    assert "seven" in meta
    assert meta.get("absent") is None


@pytest.mark.parametrize("key", ["absent", "null"])
def test_absent_values_take_the_default(key: str, meta: Metadata) -> None:
    assert meta.integer(key, 0, 1, None) is None
    assert meta.integer(key, 0, 1, 99) == 99
    assert meta.number(key, 0, 1, 0.25) == 0.25
    assert meta.boolean(key, default=False) is False
    assert meta.text(key, "x") == "x"
    assert meta.array(key, "float", default=None) is None
    assert meta.strings(key, default=()) == ()
    assert dict(meta.section(key)) == {}


REFUSED: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "integer-low": (lambda m: m.integer("seven", 8, 9), "m.gguf: seven: found 7; allowed: a whole number in 8 to 9"),
    "integer-high": (lambda m: m.integer("seven", 0, 6), "found 7; allowed: a whole number in 0 to 6"),
    "integer-float": (lambda m: m.integer("three", 0, 9), "found 3.0; allowed: a whole number"),
    "integer-bool": (lambda m: m.integer("yes", 0, 9), "found true; allowed: a whole number"),
    "integer-text": (lambda m: m.integer("digits", 0, 9), 'found the string "7"; allowed: a whole number'),
    "integer-huge": (lambda m: m.integer("huge", 0, 9), "found a huge number"),
    "integer-array": (lambda m: m.integer("ints", 0, 9), "found an array of 2 uint8"),
    "integer-absent": (lambda m: m.integer("absent", 1, 9), "absent: is missing; needed: a whole number in 1 to 9"),
    "number-nan": (lambda m: m.number("nan", 0, 9), "found nan; allowed: a finite number in 0 to 9"),
    "number-inf": (lambda m: m.number("inf", 0, float("inf")), "found inf; allowed: a finite number"),
    "number-text": (lambda m: m.number("text", 0, 9), 'found the string "hello"'),
    "number-bool": (lambda m: m.number("yes", 0, 9), "found true"),
    "number-huge": (lambda m: m.number("huge", 0, 9), "found a huge number"),
    "number-absent": (lambda m: m.number("absent", 0, 9), "is missing"),
    "boolean-number": (lambda m: m.boolean("seven"), "found 7; allowed: true or false"),
    "text-number": (lambda m: m.text("seven"), "found 7; allowed: a string"),
    "text-long": (lambda m: m.text("long", limit=99), "found a string of 100 characters"),
    "text-absent": (lambda m: m.text("null"), "is missing; needed: a string"),
    "array-length": (
        lambda m: m.array("ints", "integer", length=3),
        "2 uint8; allowed: an array of 3",
    ),
    "array-kind": (lambda m: m.array("ints", "float"), "allowed: an array of any number of floats"),
    "array-floats": (lambda m: m.array("floats", "integer"), "found an array of 1 float32"),
    "array-mixed": (lambda m: m.array("mixed", "integer"), "found an array of 2 values"),
    "array-bools": (lambda m: m.array("bools", "integer"), "found an array of 2 values"),
    "array-wide": (lambda m: m.array("wide", "integer"), "found an array of 1 values"),
    "array-scalar": (lambda m: m.array("seven", "integer"), "found 7"),
    "array-strings": (lambda m: m.array("words", "float"), "found an array of 2 values"),
    "strings-odd": (
        lambda m: m.strings("odd-words"),
        "2 values; allowed: an array of any number",
    ),
    "strings-length": (lambda m: m.strings("words", length=1), "allowed: an array of 1 strings"),
    "strings-text": (lambda m: m.strings("text"), 'found the string "hello"'),
    "section-number": (lambda m: m.section("seven"), "found 7; allowed: an object"),
    "inner-key": (
        lambda m: m.section("object").section("deep").integer("x", 0, 1),
        "object.deep.x: found the string",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, meta: Metadata) -> None:
    act, decisive = REFUSED[name]
    with pytest.raises(ModelFormatError) as caught:
        act(meta)
    assert decisive in str(caught.value)


def test_messages_are_one_printable_line() -> None:
    meta = Metadata("m\x1b[2J.gguf", {"k\n": "a\tb\u202e"})
    with pytest.raises(ModelFormatError) as caught:
        meta.integer("k\n", 0, 1)
    assert str(caught.value) == r'm\x1b[2J.gguf: k\n: found the string "a\tb\u202e"; allowed: a whole number in 0 to 1'
