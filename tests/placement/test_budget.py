"""Budgets as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.errors import UsageError
from thermocline.placement.budget import GIB, parse_budget, setting_text, size_text, spare


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB), ("8gib", 8 * GIB), ("8G", 8 * GIB), ("8GB", 8 * 10**9), (" 512 MiB ", 512 << 20),
        ("1.5GiB", 3 << 29), (".5", GIB // 2), ("0", 0), (8, 8 * GIB), (0.25, GIB // 4), ("100B", 100), ("1k", 1024),
        ("1TiB", 1 << 40), ("0.1GiB", 107374182), (1e-05, 10737),
    ],
)  # fmt: skip
def test_sizes(text: str | float, size: int) -> None:
    assert parse_budget(text).resolve("budget", 1 << 50, 0) == size


def test_shares_and_auto() -> None:
    assert parse_budget("80%").resolve("budget", 1000, 10) == 800
    assert parse_budget("12.5%").resolve("budget", 1001, 10) == 125
    assert parse_budget("auto").resolve("budget", 1000, 600, 100) == 500
    assert parse_budget("AUTO").resolve("budget", 1000, 5000, 100) == 900


@pytest.mark.parametrize(
    "value",
    ["-1", "-8GiB", "nan", "inf", "-inf", "1e9", "", " ", "GiB", "%", "8 Gibs", "8GiBs", "0x10", "1,5", "--", "8GiB8",
     "101%", "-1%", "nan%", "2PiB", "2000TiB", "1025TiB", "1" * 25, "٣", "8\nGiB", True, False, math.nan, math.inf, -1,
     -0.5, 1e300],
)  # fmt: skip
def test_refused(value: str | float) -> None:
    with pytest.raises(UsageError, match="allowed"):
        parse_budget(value)


def test_more_than_there_is_is_refused_with_the_number() -> None:
    with pytest.raises(UsageError, match=r"--vram-budget of 8,589,934,592 bytes .* 4\.00GiB"):
        parse_budget("8GiB").resolve("--vram-budget", 4 * GIB, 4 * GIB)


@given(st.integers(0, 1 << 60), st.integers(0, 1 << 60))
def test_free_memory_below_the_margin_never_wraps(free: int, margin: int) -> None:
    left = parse_budget("auto").resolve("budget", 1 << 60, free, margin)
    assert left == spare(free, margin)
    assert 0 <= left <= free
    assert left + margin >= free


@given(st.text(max_size=12))
def test_any_text_gives_a_budget_or_a_refusal(text: str) -> None:
    try:
        budget = parse_budget(text)
    except UsageError:
        return
    assert 0 <= budget.amount <= 1 << 50


@given(st.integers(0, 1 << 20), st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_whole_numbers_are_exact(number: int, unit: str) -> None:
    size = number << {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30}[unit]
    if size <= 1 << 50:
        assert parse_budget(f"{number}{unit}").resolve("budget", 1 << 50, 0) == size


@given(st.integers(0, 1 << 50), st.fractions(0, 1))
def test_a_share_never_exceeds_the_whole(total: int, share) -> None:
    assert 0 <= parse_budget(f"{float(share * 100):.6f}%").resolve("budget", total, 0) <= total


@given(st.integers(0, 1 << 44))
def test_a_budget_that_is_named_holds_what_it_is_named_for(size: int) -> None:
    held = parse_budget(setting_text(size), "ram-budget").amount
    assert size <= held <= size * 1.01 + 11


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, 1 << 41)] == [
        "0 B", "1023 B", "1.50 KiB", "3.00 MiB", "5.00 GiB", "2.00 TiB",
    ]  # fmt: skip
