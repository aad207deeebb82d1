"""Predictors on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from thermocline.files.sidecar import update_info

AUDIT = {"passed": True, "summary": "KL 0.004"}
GREEDY = ("-p", "the cat", "-n", 6, "--temp", 0, "--ignore-eos", "-t", 1)


@pytest.fixture
def model(with_predictor: Any, tiny_model: Path) -> Path:
    return with_predictor(tiny_model, audit=AUDIT)


@pytest.fixture
def predictor(model: Path) -> Path:
    return model.with_name("tiny.predictor.safetensors")


def test_auto_says_in_one_line_that_it_predicts(command, model) -> None:
    outcome = command("run", "-m", model, *GREEDY, "-v")
    assert outcome.code == 0
    note, *_, closing = outcome.err.splitlines()
    assert note == "note: mode predicted by predictor tiny.predictor.safetensors: its audit passed (KL 0.004)"
    assert "selected (mode predicted)" in closing


@pytest.mark.parametrize(
    ("verb", "hidden"),
    [
        ("profile", ("--drift", "--count-activity", "--predictor", "--predictor-threshold")),
        ("train-predictor", ("--drift", "--count-activity", "--predictor-threshold")),
        ("audit", ("--drift", "--count-activity")),
        ("perplexity", ("--drift", "--count-activity")),
        ("run", ()),
    ],
)
def test_help_lists_what_a_verb_takes(command, verb: str, hidden: tuple[str, ...]) -> None:
    told = command(verb, "--help").out
    watched = {"--drift", "--count-activity", "--predictor-threshold"}
    assert {name for name in watched if name in told} == watched - set(hidden)
    assert ("predicted" in told.split("--mode")[-1].split("[default")[0]) is ("--predictor-threshold" not in hidden)
    assert "q8_0" in told
    assert "q8-0" not in told
    for name in hidden:  # refused in words all the same
        output = ("-o", "y") if verb in ("profile", "train-predictor") else ()
        refused = command(verb, "--text", __file__, *output, name, 1)
        assert (refused.code, name in refused.err) == (2, True)


@pytest.mark.parametrize("name", ["q8_0", "q8-0", "Q8_0"])
def test_formats_are_taken_however_they_are_written(command, model, name: str) -> None:
    refused = command("run", "-m", model, *GREEDY, "-ctk", name)  # not for the name: its heads are small
    assert "do not fit a KV cache in q8_0" in refused.err


def test_a_predictor_is_named_by_flag_and_by_environment(command, model, predictor, tmp_path) -> None:
    other = tmp_path / "elsewhere.safetensors"
    predictor.rename(other)
    base = ("run", "-m", model, *GREEDY, "--json")
    assert json.loads(command(*base).out)["mode"] == "exact"
    assert json.loads(command(*base, "--predictor", other).out)["mode"] == "predicted"
    assert json.loads(command(*base, env={"THERMOCLINE_PREDICTOR": str(other)}).out)["mode"] == "predicted"
    record = json.loads(command(*base, "--predictor", other, "--mode", "predicted").out)
    assert record["report"]["predictor_bytes"] > 0
    assert record["report"]["mode"] == "predicted"
    assert 0 < record["report"]["selected_share"] < 1


def test_a_predictor_that_was_named_and_is_not_used_is_told_of_even_where_nobody_watches(
    command, model, predictor
) -> None:
    update_info(predictor, {"audit": {"passed": False, "summary": "KL 0.4 > 0.01"}})
    assert command("run", "-m", model, *GREEDY).err == ""
    for flags in (("--predictor", predictor), ("--predictor-threshold", 0.5)):
        outcome = command("run", "-m", model, *GREEDY, *flags)
        assert outcome.code == 0
        assert outcome.err.startswith("WARNING: mode exact, for predictor tiny.predictor.safetensors")


@pytest.mark.parametrize(("value", "share"), [("-inf", 1), ("-1000", 1), ("inf", 0), ("1e9", 0)])
def test_thresholds_of_every_kind_are_taken(command, model, value, share) -> None:
    base = ("run", "-m", model, *GREEDY, "--json", "--mode", "predicted")
    record = json.loads(command(*base, "--predictor-threshold", value).out)
    assert record["report"]["selected_share"] == share
    record = json.loads(command(*base, env={"THERMOCLINE_PREDICTOR_THRESHOLD": value}).out)
    assert record["report"]["selected_share"] == share


def test_all_neurons_selected_is_the_text_of_exact_mode(command, model) -> None:
    base = ("run", "-m", model, *GREEDY)
    exact = command(*base, "--mode", "exact").out
    assert command(*base, "--mode", "predicted", "--predictor-threshold=-inf").out == exact


def test_show_lists_the_predictor(command, model, tiny_model) -> None:
    outcome = command("show", model)
    said = " ".join(outcome.out.split())
    assert "tiny.predictor.safetensors" in said
    for words in ("of the parameters", "rank 192", "audit passed (KL 0.004)"):
        assert words in said
    assert json.loads(command("show", model, "--json").out)["predictor"]["ranks"] == [192, 192]
    assert "predictor" not in command("show", tiny_model).out


def test_bench_names_the_mode(command, model, monkeypatch) -> None:
    for name, value in (("BUFFER", 1 << 20), ("MOST", 1 << 20)):
        monkeypatch.setattr(f"thermocline.hardware.bandwidth.{name}", value)
    monkeypatch.setattr("thermocline.hardware.bandwidth.measure_bandwidth.__defaults__", (0, 0.01))
    record = json.loads(command("bench", "-m", model, "-p", 0, "-n", 4, "-r", 1, "--json").out)
    assert record["mode"] == "predicted"
    assert record["predictor_bytes"] == 2 * 4 * (192 * 64 + 96 * 192)


USAGE = {
    "threshold NaN": (["--predictor-threshold", "nan"], "predictor-threshold is nan; allowed: a number, or -inf"),
    "threshold in words": (["--predictor-threshold", "much"], "--predictor-threshold"),
    "threshold in exact mode": (["--mode", "exact", "--predictor-threshold", "0"], "leave --predictor-threshold out"),
    "predictor in dense mode": (["--mode", "dense", "--predictor", "{predictor}"], "mode dense predicts nothing"),
    "empty predictor": (["--predictor", ""], "predictor is ''; allowed: a file"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_flags_are_told_in_one_line(command, model, predictor, case) -> None:
    flags, words = USAGE[case]
    flags = [flag.replace("{predictor}", str(predictor)) for flag in flags]
    outcome = command("run", "-m", model, *GREEDY, *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_no_predictor_anywhere(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, *GREEDY, "--mode", "predicted")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no tiny.predictor.safetensors beside it" in outcome.err


def test_wrong_files_are_told_in_one_line(command, model, predictor, tiny_plain, tmp_path) -> None:
    (tmp_path / "text.safetensors").write_text("not a sidecar")
    shutil.copy(tiny_plain, tmp_path / "plain.gguf")
    cases = [
        (model, tmp_path / "none.safetensors", "none.safetensors"),
        (model, tmp_path / "text.safetensors", "text.safetensors"),
        (model, tmp_path, str(tmp_path.name)),
        (model, model, "tiny.gguf"),
        (tmp_path / "plain.gguf", predictor, "belongs to the model tiny"),
    ]
    for given, file, words in cases:
        outcome = command("run", "-m", given, *GREEDY, "--predictor", file)
        assert (outcome.code, outcome.out) == (1, "")
        assert words in outcome.err
        assert outcome.err.count("\n") == 1
