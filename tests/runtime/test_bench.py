"""What the benchmark runs and how it counts."""

from __future__ import annotations

import pytest

from thermocline.errors import UsageError
from thermocline.runtime.bench import BenchRow, run_bench


def test_rows_are_named_and_repeated_after_a_warm_up(saying) -> None:
    engine, fake = saying("a", n_ctx=64)
    prefill, decode = run_bench(engine, prompt=20, generate=6, repetitions=3)
    assert (prefill.test, decode.test) == ("pp20", "tg6")
    assert len(prefill.rates) == len(decode.rates) == 3
    assert prefill.active_share is None
    assert decode.active_share == pytest.approx(4 / 50)
    assert decode.bytes_per_token == pytest.approx(1600 + 2 * sum(p + 3 for p in (2, 3, 4, 5, 6, 7)) / 6 - 2 / 6)
    prompts = [step for step in fake.steps if step[0] == 0 and step[1] == 8]
    assert len(prompts) == 4
    assert sum(step[1] == 1 and step[0] > 0 for step in fake.steps) == 4 * 6


def test_mean_and_deviation() -> None:
    row = BenchRow(test="pp1", tokens=1, rates=(1.0, 2.0, 3.0))
    assert (row.mean, row.deviation) == (2.0, 1.0)
    assert BenchRow(test="pp1", tokens=1, rates=(5.0,)).deviation == 0.0
    assert row.as_dict()["mean"] == 2.0


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"prompt": 64}, "-p is 64; allowed: 0 to 63; raise --ctx-size"),
        ({"prompt": -1}, "-p is -1; allowed: 0 to 63"),
        ({"generate": 64}, "-n is 64; allowed: 0 to 63; raise --ctx-size"),
        ({"repetitions": 0}, "-r is 0; allowed: 1 to 1000"),
        ({"prompt": 0, "generate": 0}, "nothing to measure"),
    ],
)
def test_impossible_numbers_are_refused(saying, numbers: dict[str, int], words: str) -> None:
    engine, _ = saying("a", n_ctx=64)
    with pytest.raises(UsageError, match=words):
        run_bench(engine, **{"prompt": 8, "generate": 8, "repetitions": 1, **numbers})


@pytest.mark.parametrize(("numbers", "names"), [({"prompt": 0}, ["tg8"]), ({"generate": 0}, ["pp8"])])
def test_zero_leaves_a_test_out(saying, numbers: dict[str, int], names: list[str]) -> None:
    engine, _ = saying("a", n_ctx=64)
    rows = run_bench(engine, **{"prompt": 8, "generate": 8, "repetitions": 1, **numbers})
    assert [row.test for row in rows] == names
