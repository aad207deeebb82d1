"""`plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PC = ("--machine", "rtx-3060+i5-12400")


def test_a_plan_is_printed_written_and_compared(command, tiny_model) -> None:
    made = command("plan", "-m", tiny_model, *PC, "--vram-budget", "1GiB", "-o", "a.json", "--explain")
    assert made.code == 0
    for words in ("placement by layer", "bytes by tier", "predicted speed", "what would help", "1 GiB more VRAM",
                  "10 GB/s more RAM bandwidth", "tokens/s", "written: a.json"):  # fmt: skip
        assert words in made.out
    assert "\x1b" not in made.out
    record = json.loads(command("plan", "-m", tiny_model, *PC, "--vram-budget", "450MiB", "-o", "b.json", "--json").out)
    assert record["plan"]["budgets"]["vram"] == 450 << 20
    assert len(record["gains"]) == 3
    assert json.loads(Path("a.json").read_text())["machine"]["name"] == "rtx-3060+i5-12400"
    compared = command("plan", "diff", "a.json", "b.json")
    assert compared.code == 0
    assert "budget of vram" in compared.out
    rows = json.loads(command("plan", "diff", "a.json", "b.json", "--json").out)["differences"]
    assert {"what": "budget of vram", "first": 1 << 30, "second": 450 << 20} in rows
    assert command("plan", "diff", "a.json", "a.json").out == "the plans are the same\n"


def test_a_gpu_index_replaces_a_gpu_index_alone(command, tiny_model, tmp_path) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny_model.read_bytes())
    call = ("plan", "-m", "m.gguf", *PC, "--vram-budget", "450MiB", "--export-gpuidx")
    assert [command(*call, "x.gpuidx").code for _ in range(2)] == [0, 0]
    refused = command(*call, "m.gguf")
    assert refused.code == 2
    assert "m.gguf is there and is no GPU index: name another file with --export-gpuidx" in refused.err
    assert (tmp_path / "m.gguf").read_bytes() == tiny_model.read_bytes()


def test_the_ratio_shares_the_tokens(command, tiny_model) -> None:
    call = ("plan", "-m", tiny_model, *PC, "--prompt-tokens", 50, "--output-tokens", 50, "--json")
    assert json.loads(command(*call, "--ratio", "4:1").out)["plan"]["workload"]["prompt"] == 80
    assert command(*call, "--ratio", "1:0.5").code == 2
    assert json.loads(command(*call, "--ratio", "0:1").out)["plan"]["workload"]["prompt"] == 0


def test_machines_are_listed(command) -> None:
    assert "rtx-4090" in command("plan", "--list-machines").out
    assert "pc-high" in json.loads(command("plan", "--list-machines", "--json").out)["computers"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--vram-budget", "-3"), 2, "vram-budget"),
        (("--ram-budget", "nan"), 2, "ram-budget"),
        (("--ratio", "4"), 2, "--ratio"),
        (("--ratio", "1:0"), 2, "--ratio"),
        (("--device", "toaster"), 2, "--device"),
        (("--device", "cuda:1"), 2, "catalogue"),
        (("--device", "CUDA:1"), 2, "catalogue"),
        (("--device", "cpu"), 2, "catalogue"),
        (("--mode", "sideways"), 2, "--mode is sideways; allowed: auto, dense"),
        (("--device", "cuda:"), 2, "gpu is ''"),
        (("--device", "cuda:1", "--gpu", "1"), 2, "leave one of them out"),
        (("--device", "emulated", "--gpu", "1"), 2, "--device cuda"),
        (("--method", "magic"), 2, "method"),
        (("--latency-target", "-1"), 2, "--latency-target is -1"),
        (("--latency-target", "nan"), 2, "--latency-target is nan"),
        (("-np", "0"), 2, "--parallel is 0; allowed: 1 to 1024"),
        (("--output-tokens", "0"), 2, "--output-tokens is 0"),
        (("--prompt-tokens", "-1"), 2, "--prompt-tokens is -1"),
        (("--prompt-tokens", "200", "--ctx-size", "100"), 2, "use --ctx-size 456 or more"),
        (("--ctx-size", "1.5"), 2, "whole"),
        (("--ctx-size", "-1"), 2, "ctx-size"),
        (("--ram-budget", "1MiB", "--vram-budget", "1MiB"), 1, "raise --ram-budget"),
        (("--activity", "none.safetensors"), 1, "none.safetensors"),
        (("--import-gpuidx", "x.gpuidx"), 2, "-o"),
        (("-o", "no/such/folder/plan.json"), 1, "plan.json"),
    ],
)
def test_what_is_wrong_is_one_error(command, tiny_model, arguments, code, words) -> None:
    outcome = command("plan", "-m", tiny_model, *PC, *arguments)
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_an_index_of_no_gpu_is_not_written(command, tiny_model) -> None:
    outcome = command("plan", "-m", tiny_model, "--machine", "i5-12400", "--export-gpuidx", "x.gpuidx")
    assert outcome.code == 2
    assert "there is none" in outcome.err
    assert not Path("x.gpuidx").exists()


def test_a_damaged_plan_is_one_error(command, tiny_model) -> None:
    Path("bad.json").write_text("{}")
    outcome = command("plan", "diff", "bad.json", "bad.json")
    assert outcome.code == 1
    assert "bad.json" in outcome.err
    Path("bad.json").write_text('{"format"')
    outcome = command("plan", "diff", "bad.json", "bad.json")
    assert outcome.err.startswith("error: bad.json: json: at byte 9: is not JSON")
    assert outcome.err.count("bad.json") == 1
