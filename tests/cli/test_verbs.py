"""What each verb does when all is well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thermocline import LLM
from thermocline.cli.run import PROMPT, TOKENS
from thermocline.runtime.engine import Engine

GREEDY = ("--temp", "0", "--ignore-eos", "-t", "1")


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth over a small buffer: what is tested is the words around it."""
    for name, value in (("BUFFER", 1 << 20), ("MOST", 1 << 20)):
        monkeypatch.setattr(f"thermocline.hardware.bandwidth.{name}", value)
    monkeypatch.setattr("thermocline.hardware.bandwidth.measure_bandwidth.__defaults__", (0, 0.01))


def completion(model: Path, prompt: str, tokens: int) -> str:
    with LLM.load(model, threads=1) as llm:
        text = llm.generate(prompt, temperature=0, ignore_eos=True, max_tokens=tokens).text
    return text if text.endswith("\n") else text + "\n"


def test_run_writes_the_completion_and_nothing_else(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "the cat", "-n", 12, *GREEDY)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == completion(tiny_model, "the cat", 12)


def test_verbose_tells_notices_and_the_closing_line(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "the cat", "-n", 12, *GREEDY, "-v")
    *notes, closing = outcome.err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert closing.startswith("prompt 6 tokens at ")
    for words in ("first token after", "12 tokens at", "of FFN neurons active", "GB/s"):
        assert words in closing


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["-p", "-"], b"the cat"),
        (["-f", "prompt.txt"], b""),
        (["--prompt=the cat"], b""),
        (["--file", "prompt.txt"], b""),
    ],
)
def test_the_prompt_comes_from_where_it_is_said(command, tiny_model, tmp_path, arguments, stdin) -> None:
    (tmp_path / "prompt.txt").write_text("the cat")
    outcome = command("run", "-m", tiny_model, "-n", 5, *GREEDY, *arguments, stdin=stdin)
    assert outcome.out == completion(tiny_model, "the cat", 5)


def test_a_prompt_may_begin_with_a_hyphen(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "--the cat", "-n", 5, *GREEDY)
    assert outcome.out == completion(tiny_model, "--the cat", 5)


def test_json_holds_text_tokens_and_measurements(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "the cat", "-n", 5, *GREEDY, "--json", "--logprobs", 2)
    record = json.loads(outcome.out)
    assert record["finish_reason"] == "length"
    assert len(record["tokens"]) == len(record["logprobs"]) == len(record["top_logprobs"]) == 5
    assert record["top_logprobs"][0][0] == [record["tokens"][0], record["logprobs"][0]]
    assert record["report"]["prompt_tokens"] == 6
    assert record["mode"] == "exact"


def test_aliases_and_environment_mean_the_same(command, tiny_model) -> None:
    wanted = completion(tiny_model, "x", 4)
    base = ("run", "-m", tiny_model, "-p", "x")
    assert command(*base, "--max-tokens", 4, "--temperature", 0, "--ignore-eos").out == wanted
    assert command(*base, "--n-predict=4", *GREEDY).out == wanted
    names = {"N_PREDICT": "4", "TEMPERATURE": "0", "IGNORE_EOS": "1", "THREADS": "1"}
    environment = {f"THERMOCLINE_{name}": value for name, value in names.items()}
    assert command(*base, env=environment).out == wanted
    assert command("run", "-p", "x", env={**environment, "THERMOCLINE_MODEL": str(tiny_model)}).out == wanted


def test_an_empty_variable_is_none(command, tiny_model) -> None:
    empty = {f"THERMOCLINE_{name}": "" for name in ("MODEL", "FILE", "CTX_SIZE", "N_PREDICT", "IGNORE_EOS", "SEED")}
    outcome = command("run", "-m", tiny_model, "-p", "x", "-n", 3, *GREEDY, env=empty)
    assert (outcome.code, outcome.out, outcome.err) == (0, completion(tiny_model, "x", 3), "")


def test_the_command_line_comes_before_the_environment(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "x", "-n", 3, *GREEDY, env={"THERMOCLINE_N_PREDICT": "9"})
    assert outcome.out == completion(tiny_model, "x", 3)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (("--mode", "dense"), "dense"),
        (("--sparsity", "off"), "dense"),
        (("--sparsity", "exact"), "exact"),
        (("--mode", "auto"), "exact"),
    ],
)
def test_modes_and_their_alias(command, tiny_model, flags, mode) -> None:
    record = json.loads(command("run", "-m", tiny_model, "-p", "x", "-n", 2, "--json", *flags).out)
    assert record["mode"] == mode


def test_a_flag_on_the_command_line_comes_before_the_variable_of_its_rival(command, tiny_model, tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("the cat")
    base, named = ("run", "-m", tiny_model, "-n", 3, *GREEDY), {"THERMOCLINE_FILE": "none.txt"}
    assert command(*base, "-p", "x", env=named).out == completion(tiny_model, "x", 3)
    assert command(*base, "-f", "prompt.txt", env={"THERMOCLINE_PROMPT": "x"}).out == completion(
        tiny_model, "the cat", 3
    )
    assert "not with both" in command(*base, env={**named, "THERMOCLINE_PROMPT": "x"}).err
    for arguments in ((tiny_model,), ("-m", tiny_model)):
        outcome = command("show", *arguments, env={"THERMOCLINE_MODEL": "none.gguf"})
        assert (outcome.code, outcome.err) == (0, "")


def test_variables_that_are_no_flag_of_any_verb_are_told(command, tiny_model) -> None:
    base = ("run", "-m", tiny_model, "-p", "x", "-n", 3, *GREEDY)
    outcome = command(*base, env={"THERMOCLINE_TEMPRATURE": "1", "THERMOCLINE_ZZZ": "1", "THERMOCLINE_EPOCHS": "x"})
    assert (outcome.code, outcome.out) == (0, completion(tiny_model, "x", 3))
    assert outcome.err.splitlines() == [
        "WARNING: THERMOCLINE_TEMPRATURE is no flag of any verb and does nothing; "
        "did you mean THERMOCLINE_TEMPERATURE?",
        "WARNING: THERMOCLINE_ZZZ is no flag of any verb and does nothing",
    ]


def test_no_flag_is_suggested_that_would_be_refused(command, tiny_model) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "x", "--loraa", "a")
    assert "Unknown option: --loraa." in outcome.err
    assert "--lora?" not in outcome.err


def test_more_threads_than_processors_are_told(command, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    base = ("run", "-m", tiny_model, "-p", "x", "-n", 3, "--temp", 0, "--ignore-eos")
    outcome = command(*base, "-t", 3)
    assert outcome.out == completion(tiny_model, "x", 3)
    assert outcome.err == "WARNING: of 3 threads 1 can run at once, and the others wait: --threads 1 is faster\n"
    assert command(*base, "-t", 1).err == ""


def test_several_biases_and_stops_are_taken(command, tiny_model) -> None:
    flags = ("-l", "97+900", "-l", "98-inf", "--stop", "q", "--stop", "aaa")
    assert command("run", "-m", tiny_model, "-p", "x", "-n", 9, *GREEDY, *flags).out == "\n"
    assert command("run", "-m", tiny_model, "-p", "x", "-n", 3, *GREEDY, *flags[:4]).out == "aaa\n"


def test_a_system_prompt_makes_it_a_chat(command, tiny_model) -> None:
    with LLM.load(tiny_model, threads=1) as llm:
        messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
        wanted = llm.chat(messages, temperature=0, ignore_eos=True, max_tokens=4).tokens
    outcome = command("run", "-m", tiny_model, "-p", "hi", "-sys", "short", "-n", 4, *GREEDY, "--json")
    assert tuple(json.loads(outcome.out)["tokens"]) == wanted


def test_an_empty_system_prompt_is_a_chat_without_one(command, tiny_model) -> None:
    with LLM.load(tiny_model, threads=1) as llm:
        wanted = llm.chat([{"role": "user", "content": "hi"}], temperature=0, ignore_eos=True, max_tokens=4)
    outcome = command("run", "-m", tiny_model, "-p", "hi", "-sys", "", "-n", 4, *GREEDY, "--json")
    assert tuple(json.loads(outcome.out)["tokens"]) == wanted.tokens
    assert command("chat", "-m", tiny_model, "-sys", "", "-n", 4, *GREEDY, stdin=b"hi\n").out == f"{wanted.text}\n"


def test_a_plain_chat_with_an_empty_system_prompt_begins_with_the_first_line(command, tiny_plain) -> None:
    outcome = command("chat", "-m", tiny_plain, "--plain", "-sys", "", "-n", 4, *GREEDY, stdin=b"the cat\n")
    assert outcome.out == completion(tiny_plain, "the cat\n", 4)


def test_an_interrupt_leaves_the_json_of_what_was_there(command, tiny_model, monkeypatch) -> None:
    steps, step = iter(range(4)), Engine.step

    def interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(Engine, "step", interrupted)
    outcome = command("run", "-m", tiny_model, "-p", "the cat", "-n", 12, *GREEDY, "--json")
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    record = json.loads(outcome.out)
    assert record["finish_reason"] == "interrupted"
    assert len(record["tokens"]) == record["report"]["generated_tokens"] == 5
    monkeypatch.undo()
    assert record["text"] == completion(tiny_model, "the cat", 5).removesuffix("\n")


def test_without_model_and_prompt_the_shipped_model_shows_what_it_can(command, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("thermocline.tasks.SHIPPED", tiny_model)
    outcome = command("run", "-s", 1, "-v", "--json", "--ignore-eos")
    record = json.loads(outcome.out)
    assert record["report"]["prompt_tokens"] == len(PROMPT) - PROMPT.count("he")
    assert record["report"]["generated_tokens"] == min(TOKENS, 128 - record["report"]["prompt_tokens"])
    assert "choose your own with -p" in outcome.err


def test_without_a_shipped_model_one_is_asked_for(command, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("thermocline.tasks.SHIPPED", tmp_path / "none.gguf")
    outcome = command("run")
    assert (outcome.code, outcome.out) == (2, "")
    assert "-m/--model" in outcome.err


def test_show_tells_family_types_tokenizer_and_template(command, tiny_model) -> None:
    outcome = command("show", tiny_model)
    assert outcome.code == 0
    for words in (
        "arcee",
        "82,752",
        "relu2, no gate",
        "Q8_0",
        "87,584",
        "byte-level BPE",
        "<|im_start|>",
        "128 tokens",
    ):
        assert words in outcome.out
    assert command("show", "-m", tiny_model).out == outcome.out


def test_show_json(command, tiny_model) -> None:
    record = json.loads(command("show", tiny_model, "--json").out)
    assert record["spec"]["n_layer"] == 2
    assert record["types"][0] == {"format": "Q8_0", "tensors": 14, "bytes": 87584}


def test_show_says_why_a_model_cannot_be_run(command, tiny_model, tmp_path) -> None:
    (tmp_path / "odd.gguf").write_bytes(tiny_model.read_bytes().replace(b"arcee", b"qwert"))
    outcome = command("show", "odd.gguf")
    assert outcome.code == 0
    assert "cannot be run" in outcome.out
    assert "family qwert" in outcome.out


def test_show_escapes_what_a_hostile_file_says(command, tiny_model, tmp_path) -> None:
    hostile = tiny_model.read_bytes().replace(b"assistant\n", b"\x1b]0;boom\x07\x1b")
    (tmp_path / "odd.gguf").write_bytes(hostile)
    outcome = command("show", "odd.gguf")
    assert "\x1b" not in outcome.out
    assert r"\x1b]0;boo" in outcome.out


def test_bench_prints_rows(command, tiny_model) -> None:
    outcome = command("bench", "-m", tiny_model, "-p", 16, "-n", 8, "-r", 2)
    assert outcome.code == 0
    for words in ("pp16", "tg8", "±", "neurons active", "at best in this run", "mode exact"):
        assert words in outcome.out
    assert ", 1 thread, mode" in command("bench", "-m", tiny_model, "-p", 4, "-n", 0, "-r", 1, "-t", 1).out


def test_bench_json_and_a_small_context(command, tiny_model) -> None:
    outcome = command("bench", "-m", tiny_model, "-r", 1, "--json", "-v")
    record = json.loads(outcome.out)
    assert [row["test"] for row in record["rows"]] == ["pp127", "tg127"]
    assert "measuring pp127" in outcome.err
    row = record["rows"][1]
    assert row["mean"] == pytest.approx(1e9 * row["gigabytes_per_second"] / row["bytes_per_token"])
    assert 0 < row["active_share"] < 1
    assert record["peak_gigabytes_per_second"] > 0


def test_doctor(command, monkeypatch) -> None:
    monkeypatch.setattr("thermocline.hardware.probe.SECONDS", 0.005)
    monkeypatch.setattr("thermocline.hardware.disk.SCRATCH", 2 << 20)
    outcome = command("doctor")
    assert outcome.code == 0
    for words in ("processor", "threads", "kernels", "memory", "GB/s with 1 thread", "in flight", "hand-over", "GPU"):
        assert words in outcome.out
    record = json.loads(command("doctor", "--json").out)
    assert record["kernels"] in record["isa"]
    assert record["probe"]["memory"]["by_threads"][0][1] > 0
    again = json.loads(command("doctor", "--json").out)
    assert again["probe"] == record["probe"]
    refreshed = json.loads(command("doctor", "--json", "--refresh").out)
    assert refreshed["probe"]["measured"] > record["probe"]["measured"]
    assert command("doctor", "--disk", "none.gguf").code == 2


def test_chat_takes_turns_and_commands(command, tiny_model) -> None:
    lines = b"hello\n\n/what\n/help\nagain\n/clear\nhello\n/exit\nnever\n"
    outcome = command("chat", "-m", tiny_model, "-n", 4, *GREEDY, "-v", stdin=lines)
    assert outcome.code == 0
    closings = [line for line in outcome.err.splitlines() if line.startswith("prompt ")]
    assert len(closings) == 3
    assert "from cache" in closings[1]
    assert closings[0].split()[1] == closings[2].split()[1]
    assert "unknown command" in outcome.err
    assert "/clear forgets" in outcome.err


def test_chat_remembers_what_was_said(command, tiny_model) -> None:
    with LLM.load(tiny_model, threads=1) as llm:
        settings = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
        first = llm.chat(messages, **settings).text
        second = llm.chat(
            [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": "b"}], **settings
        )
    outcome = command("chat", "-m", tiny_model, "-n", 4, *GREEDY, "-sys", "s", stdin=b"a\nb\n")
    assert outcome.out == f"{first}\n{second.text}\n"


def test_a_conversation_longer_than_the_context_is_refused_and_goes_on(command, tiny_model) -> None:
    outcome = command("chat", "-m", tiny_model, "-n", 2, *GREEDY, stdin=b"x" * 200 + b"\nhi\n")
    assert outcome.code == 1
    assert "do not fit a context of 128" in outcome.err
    assert "/clear" in outcome.err
    assert outcome.out


@pytest.mark.parametrize("line", [b"x" * 200, b"ab\xe4"], ids=["too long", "not UTF-8"])
def test_a_script_is_told_of_a_turn_that_failed(command, tiny_model, line: bytes) -> None:
    outcome = command("chat", "-m", tiny_model, "-n", 2, *GREEDY, stdin=line + b"\n")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    both = command("chat", "-m", tiny_model, "-n", 2, *GREEDY, stdin=line + b"\nhi\n")
    assert both.code == 1
    assert both.out == command("chat", "-m", tiny_model, "-n", 2, *GREEDY, stdin=b"hi\n").out != ""


def test_plain_turns_need_no_template(command, tiny_plain) -> None:
    outcome = command("chat", "-m", tiny_plain, "--plain", "-n", 4, *GREEDY, stdin=b"the cat\n")
    assert outcome.out == completion(tiny_plain, "the cat\n", 4)
    two = command("chat", "-m", tiny_plain, "--plain", "-n", 4, *GREEDY, "-v", stdin=b"the cat\nthe dog\n")
    assert two.out.startswith(outcome.out)
    assert " from cache)" in two.err  # what was said before is not computed again


DEVICES = [
    *((verb, *more, "--device") for verb, more in {
        "run": ("-p", "x"), "chat": (), "bench": (), "profile": ("--text", "x.txt", "-o", "a"),
        "perplexity": ("--text", "x.txt"), "plan": (), "audit": ("--text", "x.txt", "--predictor", "p"),
    }.items()),
    ("train-predictor", "--text", "x.txt", "-o", "p", "--train-on"),
]  # fmt: skip


@pytest.mark.parametrize("verb", DEVICES, ids=lambda verb: verb[0])
def test_a_gpu_by_number_is_refused_where_there_is_none(command, tiny_model, monkeypatch, verb) -> None:
    monkeypatch.setattr("thermocline.hardware.gpu_choice.find_gpus", lambda: ())
    Path("x.txt").write_text("x" * 100)
    outcome = command(*verb, "cuda:1", "-m", tiny_model)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: no GPU is called 1; there are none that a driver tells of\n"


@pytest.mark.parametrize("value", ["cuda:", "toaster", "cpu:0"])
@pytest.mark.parametrize("verb", ["run", "train-predictor"])
def test_a_device_that_is_none_is_one_error(command, tiny_model, verb, value) -> None:
    flag = ("--device",) if verb == "run" else ("--text", "x", "-o", "p", "--train-on")
    outcome = command(verb, *flag, value, "-m", tiny_model)
    assert outcome.code == 2
    assert "allowed: " in outcome.err
