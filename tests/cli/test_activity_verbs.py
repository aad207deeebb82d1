"""`profile`, `activity` and `report` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thermocline import read_activity
from thermocline.activity.order import load_order
from thermocline.cli.tables import size_of

TEXT = "def first(n):\n    return n + 1\n" * 20
CALL = ("-c", 64, "-t", 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(TEXT)
    (tmp_path / "more.txt").write_text("pack my box\n" * 9)
    return tmp_path / "code.py"


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n")


def test_profile_writes_what_activity_shows(command, tiny_model, text, tmp_path) -> None:
    made = command("profile", "-m", tiny_model, "--text", text, tmp_path / "more.txt", "-o", "x", *CALL)
    assert (made.code, made.err) == (0, "")
    shown = command("activity", "show", "x")
    assert (shown.code, shown.out) == (0, made.out)
    words = shown.out.split()
    activity = read_activity("x")
    assert f"{activity.tokens:,}" in words
    assert f"{activity.active_share.mean():.1%}" in words
    for value in activity.coverage(0.8)[0]:
        assert f"{value:.1%}" in words
    record = json.loads(command("activity", "show", "x", "--json").out)
    assert record == json.loads(json.dumps(activity.summary()))


def test_profile_tells_a_machine_and_a_person(command, tiny_model, text, tmp_path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xfe\0")
    call = ("profile", "-m", tiny_model, "--text", tmp_path / "picture", "--text", text, *CALL)
    record = json.loads(command(*call, "-o", "x", "--json").out)
    tokens = record["tokens"]
    assert (record["files"], len(record["skipped"])) == (1, 1)
    assert record["activity"]["tokens"] == tokens > 100
    part = json.loads(command(*call, "-n", 100, "-o", "z", "--json").out)
    assert (part["tokens"], part["files"]) == (100, 1)
    told = command(*call, "-o", "y", "--verbose").err
    assert "1 file was skipped, being no UTF-8 text or none that the vocabulary spells: picture\n" in told
    assert f"{tokens} tokens of 1 file, " in told


def test_merging_by_flag_and_by_verb_is_the_same(command, tiny_model, text, tmp_path) -> None:
    base = ("profile", "-m", tiny_model, *CALL, "--text")
    for path, output in ((text, "a"), (text, "c"), (tmp_path / "more.txt", "b")):
        assert command(*base, path, "-o", output).code == 0
    assert command(*base, tmp_path / "more.txt", "-o", "c", "--merge").code == 0
    assert command("activity", "merge", "a", "b", "-o", "d").code == 0
    c, d = read_activity("c"), read_activity("d")
    assert (c.fired == d.fired).all()
    assert c.tokens == d.tokens == read_activity("a").tokens + read_activity("b").tokens
    twice = command("activity", "merge", "a", "d", "-o", "e")
    assert twice.code == 2
    assert "d cannot be merged: " in twice.err
    assert "is in both activities" in twice.err
    assert one_line(twice.err)


def test_report_writes_a_page_and_pictures(command, tiny_model, text) -> None:
    command("profile", "-m", tiny_model, "--text", text, "-o", "x", *CALL)
    done = command("report", "x", "-o", "r.html", "--pictures", "pictures")
    assert (done.code, done.err) == (0, "")
    written = done.out.split()
    assert written[0] == "r.html"
    assert len(written) == 7
    assert all(Path(path).stat().st_size > 1000 for path in written)
    assert json.loads(command("report", "x", "-o", "r.html", "--json").out) == {"written": ["r.html"]}


def test_an_order_is_that_of_its_activity(command, tiny_model, text) -> None:
    command("profile", "-m", tiny_model, "--text", text, "-o", "x", *CALL)
    done = command("activity", "order", "x", "-o", "o")
    assert (done.code, done.err) == (0, "")
    assert "2 layers of 96, by frequency" in done.out
    assert (load_order("o").order == read_activity("x").order).all()
    record = json.loads(command("activity", "order", "x", "-o", "o", "--by", "contribution", "--json").out)
    tokens = read_activity("x").tokens
    assert record == {"output": "o", "by": "contribution", "n_layer": 2, "n_ff": 96, "tokens": tokens}
    assert (load_order("o").order != read_activity("x").order).any()


def test_perplexity_tells_a_person_and_a_machine(command, tiny_model, text) -> None:
    call = ("perplexity", "-m", tiny_model, "--text", text, "-c", 64, "-t", 1)
    record = json.loads(command(*call, "--json").out)
    done = command(*call, "--chunks", 1000)
    assert (done.code, done.err) == (0, "")
    assert f"{record['perplexity']:.4f} +/- {record['error']:.4f}" in done.out
    assert f"{record['tokens']} tokens in {record['chunks']} chunks of 64 tokens, second half scored" in done.out
    assert " tokens in 1 chunk of 64 tokens" in command(*call, "--chunks", 1).out
    assert "every token scored once" in command(*call, "--stride", 32).out


def test_a_predictor_is_trained_audited_and_drawn(command, tiny_model, text, tmp_path, monkeypatch) -> None:
    pytest.importorskip("torch")
    model = tmp_path / "m.gguf"
    model.write_bytes(tiny_model.read_bytes())
    predictor = "m.predictor.safetensors"
    command("profile", "-m", model, "--text", text, "-o", "x", *CALL)
    train = ("train-predictor", "-m", model, "--activity", "x", "--text", text, "-c", 16, "-t", 1, "--max-share", 0,
             "--epochs", 1, "--energy-recall", 0.9, "--train-on", "cpu", "-o", predictor)  # fmt: skip
    done = command(*train)
    assert (done.code, done.err) == (0, "")
    again = command(*train, "--overwrite", "--json", "--verbose")
    assert "not needed" not in again.err  # what is no use for placing is of use here
    record = json.loads(again.out)
    for layer in record["layers"]:
        assert f"{layer['energy_recall']:.2%}" in done.out
        assert layer["energy_recall"] >= 0.9
    assert f"{record['share_of_parameters']:.2%} of the model's numbers" in done.out
    mean = {name: sum(layer[name] for layer in record["layers"]) / 2 for name in ("selected", "active")}
    assert f"{mean['selected']:.1%} of the neurons; {mean['active']:.1%} fire" in done.out
    read = record["bytes_a_token"]
    assert f"{size_of(read['predicted'])} to find these; {size_of(read['exact'])} in mode exact" in done.out
    assert record["saves"] is (read["predicted"] < read["exact"])
    assert ("it would read more bytes than it saves" in done.out) is not record["saves"]
    monkeypatch.setattr("thermocline.activity.audit.MIN_TOKENS", 50)
    short = command("audit", "-m", model, "--text", text, "-n", 49, "-c", 32, "-t", 1)
    assert short.code == 1
    assert "not noted: it read too little to judge by" in short.out
    audited = command("audit", "-m", model, "--text", text, "-n", 50, "-c", 32, "-t", 1)
    assert audited.code == 1
    assert "noted: mode auto goes by it" in audited.out
    assert audited.err == ""
    assert "FAILED: " in audited.out
    assert audited.out.count("FAILED") >= 2
    record = json.loads(command("audit", "-m", model, "--text", text, "-n", 50, "-c", 32, "-t", 1, "--json").out)
    assert (record["passed"], record["stored"], record["exact"]["max_kl"]) == (False, True, 0.0)
    assert "audit failed (" in command("show", model).out
    drawn = command("report", "x", "--predictor", predictor, "--pictures", "pictures").out.split()
    names = {Path(path).stem for path in drawn}
    assert {"predictor", "predictor_rank", "predictor_curve", "predictor_audit"} <= names


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["profile", "-o", "y"], 2, "--text"),
        (["profile", "--text", "code.py"], 2, "--output"),
        (["profile", "--text", "nowhere", "-o", "y"], 2, "nowhere cannot be read"),
        (["profile", "--text", "code.py", "-o", "y", "-n", "1.5"], 2, "whole numbers"),
        (["profile", "--text", "code.py", "-o", "y", "-n", "-1"], 2, "tokens is -1"),
        (["profile", "--text", "code.py", "-o", "y", "--merge", "--overwrite"], 2, "not both"),
        (["profile", "--text", "code.py", "-o", "x"], 2, "--merge adds to it"),
        (["profile", "--text", "code.py", "-o", "no/y"], 2, "make it first"),
        (["profile", "--text", "code.py", "-o", "y", "-ngl", "9"], 2, "neurons are placed, not layers"),
        (["activity"], 0, ""),
        (["activity", "show", "code.py"], 1, "header length"),
        (["activity", "show", "nowhere"], 1, "does not exist"),
        (["activity", "merge", "x", "-o", "y"], 2, "two files or more"),
        (["activity", "order", "x", "-o", "y", "--by", "luck"], 2, "allowed: frequency, contribution"),
        (["activity", "order", "code.py", "-o", "y"], 1, "header length"),
        (["perplexity", "--text", "nowhere"], 2, "nowhere cannot be read"),
        (["perplexity", "--text", "code.py", "-c", "100000"], 2, "give more text or a smaller -c"),
        (["audit", "--text", "code.py"], 2, "train one"),
        (["audit", "--text", "code.py", "--mode", "dense"], 2, "predicts nothing"),
        (["train-predictor", "--text", "code.py", "-o", "no/y"], 2, "make it first"),
        (["train-predictor", "--text", "code.py", "-o", "y", "--rank", "33"], 2, "a multiple of 32"),
        (["train-predictor", "--text", "code.py", "-o", "y", "--max-share", "0.01"], 2, "allow more"),
        (["train-predictor", "--text", "code.py", "-o", "y", "--activity", "code.py"], 1, "header length"),
        (["report", "x"], 2, "nothing to write"),
        (["report", "nowhere", "-o", "y"], 1, "does not exist"),
        (["report", "x", "-o", "no/y"], 1, "No such file"),
        (["report", "x", "-o", "y", "--predictor", "x"], 1, "kind predictor"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(command, tiny_model, text, arguments, code, problem) -> None:
    command("profile", "-m", tiny_model, "--text", text, "-o", "x", *CALL)
    if arguments[0] in ("profile", "audit", "train-predictor"):
        arguments = [arguments[0], "-m", tiny_model, *CALL, *arguments[1:]]
    outcome = command(*arguments)
    assert outcome.code == code
    assert problem in outcome.err
    assert code == 0 or one_line(outcome.err)
    assert not Path("y").exists()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["activity", "order", "x"], "order"),
        (["activity", "merge", "x", "z"], "activity"),
        (["report", "x"], "page of HTML"),
        (["profile", "-m", "m.gguf", "--text", "code.py", "--overwrite", *CALL], "activity"),
        (["plan", "-m", "m.gguf", "--machine", "pc-high"], "plan"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else "",
)
def test_a_model_or_an_input_is_not_replaced(command, tiny_model, text, tmp_path, arguments, kind) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny_model.read_bytes())
    for output, path in (("x", text), ("z", tmp_path / "more.txt")):
        command("profile", "-m", tiny_model, "--text", path, "-o", output, *CALL)
    for victim in ("m.gguf", "code.py"):
        content = Path(victim).read_bytes()
        refused = command(*arguments, "-o", victim)
        assert refused.code == 2
        assert f"{victim} is there and is no {kind}: name another file with -o, or remove it first" in refused.err
        assert one_line(refused.err)
        assert Path(victim).read_bytes() == content
    again = [command(*arguments, "-o", "y").code for _ in range(2)]
    assert again == [0, 0]


@pytest.mark.parametrize("verb", ["profile", "train-predictor", "perplexity", "audit"])
def test_weights_that_are_not_finite_stop_a_long_run_before_it_begins(
    command, tiny_model, text, with_predictor, broken, verb
) -> None:
    model = with_predictor(broken(tiny_model))
    output = ["-o", "out"] if verb in ("profile", "train-predictor") else []
    done = command(verb, "-m", model, "--text", text, *output, *CALL)
    assert done.code == 1
    assert "tensor blk.0.attn_q.weight holds NaN or infinity" in done.err
    assert one_line(done.err)
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("verb", ["profile", "train-predictor", "perplexity", "audit"])
def test_a_text_that_is_none_is_told_by_name(
    command, tiny_model: Path, tmp_path: Path, with_predictor, verb: str
) -> None:
    model = with_predictor(tiny_model)
    (tmp_path / "picture").write_bytes(bytes(range(256)))
    output = {"profile": ["-o", "out"], "train-predictor": ["-o", "out", "--max-share", 0]}.get(verb, [])
    done = command(verb, "-m", model, "--text", "picture", *output, *CALL)
    assert (done.code, done.out) == (2, "")
    assert "1 file was skipped, being no UTF-8 text or none that the vocabulary spells: picture" in done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("verb", ["profile", "train-predictor"])
def test_a_folder_in_the_place_of_the_output_is_told_before_any_work(
    command, tiny_model: Path, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "text").write_text("def first(n):\n    return n + 1\n" * 20)
    (tmp_path / "out").mkdir()
    for more in (["--overwrite"], []):
        done = command(verb, "-m", tiny_model, "--text", "text", "-o", "out", *more, *CALL)
        assert done.code == 1
        assert done.err == "error: out: is a folder; name a file to write\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]
