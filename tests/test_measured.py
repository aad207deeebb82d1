"""What the README says was measured is what the kept results say."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.perplexity import judge

MACHINE = {"processor": "a processor", "threads": 2, "kernels": "avx512", "caches": ["L2 1024 KiB", "L3 32768 KiB"]}


def turn(seconds: float, size: float = 0.0) -> dict[str, float]:
    return {"tokens": 10, "seconds": seconds, "bytes": size, "bandwidth": 40.0}


def keep(folder: Path, test: str, **result: Any) -> None:
    about = {"model": "tiny.q8_0", "parameters": 5e6, "description": "random", "machine": MACHINE}
    about |= {"peer": {"version": "llama-cpp-python 1"}, "count": 10, "operations_per_token": 4e9}
    (folder / "side_by_side").mkdir(exist_ok=True)
    (folder / f"side_by_side/tiny.q8_0-{test}.json").write_text(json.dumps(about | result))


def test_the_readme_is_made_from_the_kept_results() -> None:
    readme = report.README.read_text()
    assert report.with_block(readme, report.block()) == readme, "run python -m benchmarks.report"


def test_rates_are_medians_and_ratios_are_of_the_same_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [
        {"dense": turn(2, 40e9), "exact": turn(1), "only reading": turn(1.5), "llama.cpp": turn(2)},
        {"dense": turn(4, 80e9), "exact": turn(4), "only reading": turn(3), "llama.cpp": turn(8)},
        {"dense": turn(5, 100e9), "exact": turn(2), "only reading": turn(4), "llama.cpp": turn(2)},
    ]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    keep(tmp_path, "decode", rounds=rounds)
    # 10 tokens in 2, 4, 5 and in 1, 4, 2 seconds; 20 GB/s of 40; 1.5 of 2, 3 of 4 and 4 of 5 seconds.
    row = "| Q8_0 | 5.0 | 2.5 (1.00×, 0.40 to 2.00) | 5.0 (2.00×, 1.00 to 2.00) |  | 50% | 75% |"
    assert row in report.block()


def test_another_machine_has_tables_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"dense": turn(2, 40e9), "only reading": turn(1), "llama.cpp": turn(2)}
    second = {"dense": turn(4, 80e9), "predicted": turn(1), "only reading": turn(2), "only reading rows": turn(0.8)}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "other").mkdir()
    keep(tmp_path, "decode", rounds=[first])
    keep(tmp_path / "other", "decode", rounds=[second | {"llama.cpp": turn(2)}], machine=MACHINE | {"threads": 16})
    one, other = report.block().split("On a processor, ")[1:]
    assert one.startswith("2 threads")
    assert "| Q8_0 | 5.0 | 5.0 (1.00×, 1.00 to 1.00) |  |  | 50% | 50% |\n" in one
    assert "predicted, of only reading" not in one
    assert other.startswith("16 threads")
    assert "| Q8_0 | 5.0 | 2.5 (0.50×, 0.50 to 0.50) |  | 10.0 (2.00×, 2.00 to 2.00) | 50% | 50% | 80% |\n" in other
    assert "dense, of only reading | predicted, of only reading |" in other


def test_prefill_counts_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    keep(tmp_path, "prefill", rounds=[{"thermocline": turn(2), "llama.cpp": turn(4)}])
    keep(tmp_path, "prompt", rounds=[{"thermocline": turn(5), "llama.cpp": turn(5)}], count=4096)
    found = report.block()
    assert "| Q8_0, 10 tokens | 2.5 | 5.0 (2.00×, 2.00 to 2.00) | 20 |" in found
    assert "| Q8_0, 4,096 tokens | 2.0 | 2.0 (1.00×, 1.00 to 1.00) | 8 |" in found


def test_depths_are_held_to_what_the_cache_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    depths = [
        {"cache": "f16", "depth": depth, "cache_bytes": size, "rounds": [{"thermocline": turn(seconds)}]}
        for depth, size, seconds in ((0, 0, 0.2), (8192, 4e8, 0.4))
    ]
    keep(tmp_path, "context", depths=depths)
    # 20 ms, and 0.4 GB at 40 GB/s.
    assert "| Q8_0, cache F16, 8,192 tokens | 40.0 | 30.0 |  |" in report.block()


def test_attention_is_told_by_heads_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "ops").mkdir()
    cases = (("F16", "16/16", 512, 0.5), ("F16", "16/16", 8192, 0.9), ("Q8_0", "16/2", 8192, 0.25))
    ops = [
        {"op": "attention", "format": fmt, "size": f"{heads} heads, {keys} keys", "share": share}
        for fmt, heads, keys, share in cases
    ]
    (tmp_path / "ops/attention.json").write_text(json.dumps({"peaks": None, "ops": ops}))
    assert "| 16/16 heads, F16 | 50% | 90% |\n| 16/2 heads, Q8_0 |  | 25% |" in report.block()


def test_an_audit_is_told_with_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    found = {"mean_kl": 5e-6, "max_kl": 1e-5, "top1": 0.985, "perplexity_ratio": 1.0002}
    layers = [{"energy_recall": 0.999}, {"energy_recall": 0.9712}]
    distances = {"predicted": found, "exact": {"max_kl": 0.0}, "oracle": {"max_kl": 2e-9}}
    kept = {"model": "m", "tokens": 2048, "passed": True, "layers": layers, **distances}
    (tmp_path / "audit.json").write_text(json.dumps(kept))
    said = report.block()
    assert (
        "predictor of m, 2,048 tokens: passed. Predicted against dense: mean KL divergence 5.0e-06, top-1 98.5%" in said
    )
    assert "energy recall of the worst layer 0.971; exact and the oracle mask at most 2e-09 from dense." in said


def test_engines_at_rest_and_together_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rounds = 2 * [{"alone": 10.0, "in turns": 9.0, "at once": 8.0, "beside a busy program": 5.0}]
    result = {"model": "m", "machine": {"cores": 4}, "idle_seconds": 0.0002, "rounds": rounds}
    (tmp_path / "pool.json").write_text(json.dumps(result))
    assert "used 0.2 ms of processor time in a second." in report.block()
    assert "90% of one's rate by turns, 80% in sum at once." in report.block()
    assert "Beside a program that keeps one of 4 cores busy: 50%." in report.block()


def test_perplexities_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    measured = {
        name: {"perplexity": value, "error": 0.25, "tokens": 1000}
        for name, value in (("llama.cpp", 9.5), ("dense", 9.4), ("predicted", 9.447))
    }
    (tmp_path / "perplexity.json").write_text(
        json.dumps({"model": "m", "chunks": 4, "n_ctx": 512, "measured": measured})
    )
    said = "llama.cpp 9.5000 ± 0.2500, dense 9.4000 ± 0.2500, predicted 9.4470 ± 0.2500 (1.0050 of dense)."
    assert f"(1,000 tokens): {said}" in report.block()


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"dense": 9.4}, ""),
        ({"dense": 9.2}, "dense is 0.3000 from llama.cpp, more than its error 0.2500"),
        ({"dense": 9.8}, "dense is 0.3000 from"),
        ({"dense": 9.4, "predicted": 9.49}, ""),
        ({"dense": 9.4, "predicted": 9.5}, "predicted is 1.0106 times dense, more than 1.01"),
        ({"predicted": 99.0}, ""),
    ],
)
def test_perplexities_that_are_too_far_apart_end_the_benchmark(found: dict[str, float], wrong: str) -> None:
    with pytest.raises(SystemExit, match=wrong) if wrong else nullcontext():
        judge({"llama.cpp": 9.5, **found}, 0.25)


def test_the_disk_tier_is_told_with_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    reads = {"neurons": {"megabytes_a_token": 80.0, "requests_a_token": 5000.0}, "matrices": {}}
    ours = {"budget": "1GiB", "tokens": [1, 2], "tokens_per_second": 3.0, "rates": [2.0, 3.0, 4.0], "VmHWM": 1e9}
    ours |= {"reads": reads, "hit_rate": 0.6, "of_allowed": 0.8}
    result = {"model": "m", "mode": "predicted", "limited_by": "a group", "without": {"tokens": [1, 2]}, "with": ours}
    result["llama"] = {"tokens_per_second": 1.0, "rates": [1.0, 1.0, 1.0]}
    (tmp_path / "disk_tier.json").write_text(json.dumps(result))
    said = report.block()
    assert "the same tokens as without a budget, 3.00 tokens/s (median of 3, 2.00 to 4.00), 1000 MB resident" in said
    assert "reads 80 MB in 5,000 reads" in said
    assert "1.00 tokens/s, so 3.0× (2.0 to 4.0 by rounds)." in said
    ours["tokens"] = [1, 3]
    (tmp_path / "disk_tier.json").write_text(json.dumps(result))
    assert "OTHER TOKENS than without" in report.block()


def test_drift_is_told_of_the_last_turn_after_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def turns(*shares: float) -> dict[str, Any]:
        kinds = ("code", "prose", "prose", "code")
        each = [{"kind": k, "hot_share": s, "tokens_per_second": 100 * s} for k, s in zip(kinds, shares, strict=True)]
        return {"turns": [turn | {"hit_rate": None} for turn in each]}

    result = {"model": "m", "vram_budget": "10MB", "exact": {"plain": turns(0.9, 0.5, 0.5, 0.9)}}
    result["exact"]["drift"] = turns(0.9, 0.5, 0.7, 0.9)  # type: ignore[index]
    (tmp_path / "drift.json").write_text(json.dumps(result))
    assert "exact: 50% of what fires hot without, 70% with it, 50.0 and 70.0 tokens/s." in report.block()


def test_published_figures_stand_beside_predicted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    row = {"model": "M F16", "computer": "pc", "published": 8.0, "predicted": 7.5, "hybrid tok/s": "-"}
    row |= {"predicted ": 10.0, "baseline tok/s": "-", "predicted  ": 1.25}
    (tmp_path / "placement_paper.json").write_text(json.dumps({"rows": [row]}))
    theirs = {"model": "M F16", "computer": "pc", "theirs, ms": 12.0, "over budget, GiB": 0.5, "ours, ms": 10.0}
    theirs |= {"faster": 1.2, "with their bytes": 1.25, "gap": "0.10%"}
    (tmp_path / "placement_powerinfer.json").write_text(json.dumps({"rows": [theirs]}))
    said = report.block()
    assert "| M F16, pc | 8.00 | 7.50 | - | 10.00 | - | 1.25 |" in said
    assert "| M F16, pc | 12.0 | 0.50 | 10.0 | 1.20 | 1.25 | 0.10% |" in said


def test_a_text_without_the_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.with_block("no marks", "x")
