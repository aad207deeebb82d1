"""Prefill, decode, the reuse of the cache, and the account of bytes."""

from __future__ import annotations

import pytest

from thermocline.errors import ContextError, UsageError


def test_a_prompt_runs_in_passes_and_only_the_last_makes_logits(saying) -> None:
    engine, fake = saying("a", skip=20)
    engine.begin()
    engine.prefill(list(range(20)), reuse=False)
    assert fake.steps == [(0, 8, False), (8, 8, False), (16, 4, True)]
    assert fake.cells == list(range(20))


@pytest.mark.parametrize(
    ("second", "cached"),
    [
        ([1, 2, 3, 4, 5], 3),
        ([1, 2, 9], 2),
        ([1, 2, 3], 2),
        ([1], 0),
        ([9, 2, 3], 0),
    ],
)
def test_a_common_prefix_is_computed_once(saying, second: list[int], cached: int) -> None:
    engine, fake = saying("a", skip=1)
    engine.begin()
    engine.prefill([1, 2, 3], reuse=True)
    fake.steps.clear()
    _, found = engine.prefill(second, reuse=True)
    assert found == cached
    assert fake.steps == [(cached, len(second) - cached, True)]
    assert fake.cells == second


def test_generated_tokens_are_part_of_the_prefix(saying) -> None:
    engine, fake = saying("a", skip=1)
    ticket = engine.begin()
    engine.prefill([1, 2], reuse=True)
    engine.step(3, ticket)
    assert engine.prefill([1, 2, 3, 4], reuse=True)[1] == 3
    assert fake.cells == [1, 2, 3, 4]


def test_without_reuse_everything_is_computed_again(saying) -> None:
    engine, fake = saying("a", skip=1)
    for _ in range(2):
        engine.begin()
        fake.steps.clear()
        assert engine.prefill([1, 2, 3], reuse=False)[1] == 0
        assert fake.steps == [(0, 3, True)]


def test_forgetting_computes_everything_again_but_only_for_its_owner(saying) -> None:
    engine, _ = saying("a", skip=1)
    old = engine.begin()
    new = engine.begin()
    engine.prefill([1, 2, 3], reuse=True)
    engine.forget(old)
    assert engine.prefill([1, 2, 3, 4], reuse=True)[1] == 3
    engine.forget(new)
    assert engine.prefill([1, 2, 3, 4], reuse=True)[1] == 0


@pytest.mark.parametrize(("length", "room"), [(1, 63), (62, 2), (63, 1)])
def test_the_context_leaves_room(saying, length: int, room: int) -> None:
    engine, _ = saying("a", n_ctx=64)
    assert engine.room([1] * length) == room
    assert engine.room([1] * length, 2) == min(room, 2)


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_beyond_the_context_is_refused_with_numbers(saying, length: int) -> None:
    engine, fake = saying("a", n_ctx=64)
    with pytest.raises(ContextError, match=f"{length + 1} tokens do not fit a context of 64") as caught:
        engine.room([1] * length)
    assert (caught.value.needed, caught.value.available) == (length + 1, 64)
    assert fake.steps == []


def test_an_empty_prompt_is_refused(saying) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        saying("a")[0].room([])


def test_bytes_and_firing_neurons_are_counted_by_step(saying) -> None:
    """Trunk 1000, 50 up rows of 10, 5 down rows of 20; at position 4 the layers look back 5 and 3 positions of 2."""
    engine, _ = saying("a", skip=1)
    ticket = engine.begin()
    engine.prefill([1, 2, 3, 4], reuse=False)
    assert engine.bytes_read == 0
    engine.step(5, ticket)
    assert engine.bytes_read == 1000 + 500 + 100 + 2 * (5 + 3)
    assert engine.fired == 4
    engine.step(5, ticket)
    assert engine.bytes_read == 2 * 1600 + 2 * (5 + 3) + 2 * (6 + 3)
    engine.begin()
    assert (engine.bytes_read, engine.fired) == (0, 0)


def test_padding_of_the_vocabulary_is_never_seen(saying) -> None:
    engine, fake = saying("a", skip=1)
    engine.width = 10
    engine.begin()
    logits, _ = engine.prefill([1], reuse=False)
    assert len(logits) == 10 < fake.n_vocab
