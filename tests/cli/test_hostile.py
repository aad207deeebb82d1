"""Wrong input: each case ends with its exit code, one line on standard error, and nothing on standard output."""

from __future__ import annotations

from pathlib import Path

import pytest

from thermocline.hardware.memory import Memory

M = "{model}"
RUN = ["run", "-m", M, "-p", "x"]

USAGE = {
    "unknown verb": (["rum"], "Did you mean \"run\"?"),
    "unknown flag": ([*RUN, "--nonsense", "1"], "Unknown option: --nonsense"),
    "typo in a flag": ([*RUN, "--tempp", "1"], "Did you mean --temp?"),
    "stray argument": ([*RUN, "stray"], "unexpected argument 'stray'; a prompt is given with -p"),
    "stray model": (["plan", "stray"], "unexpected argument 'stray'; a model is given with -m"),
    "stray nothing": (["doctor", "stray"], "unexpected argument 'stray'; 'thermocline doctor --help' tells"),
    "flag without its value": ([*RUN, "--top-k"], "--top-k requires an argument"),
    "flag given twice": ([*RUN, "-s", "1", "-s", "2"], "specified multiple times"),
    "temperature not a number": ([*RUN, "--temp", "warm"], 'unable to convert "warm" into float'),
    "temperature NaN": ([*RUN, "--temp", "nan"], "temperature is nan; allowed: a finite number"),
    "temperature infinite": ([*RUN, "--temp", "inf"], "temperature is inf; allowed: a finite number"),
    "temperature overflows": ([*RUN, "--temp", "1e400"], "temperature is inf"),
    "temperature negative": ([*RUN, "--temp", "-1"], "temperature is -1.0; allowed: 0 to 100"),
    "temperature above its range": ([*RUN, "--temp", "100.1"], "temperature is 100.1; allowed: 0 to 100"),
    "top-k negative": ([*RUN, "--top-k", "-1"], "top_k is -1; allowed: 0 (all) to"),
    "top-k a fraction": ([*RUN, "--top-k", "1.5"], "--top-k is 1.5; allowed: whole numbers"),
    "top-k in hexadecimal": ([*RUN, "--top-k", "0x10"], "--top-k is 0x10; allowed: whole numbers"),
    "seed in words": ([*RUN, "-s", "seven"], "-s is seven; allowed: whole numbers"),
    "bench of half a token": (["bench", "-m", M, "-n", "0.5"], "-n is 0.5; allowed: whole numbers"),
    "top-k beyond 32 bits": ([*RUN, "--top-k", "2147483648"], "top_k is 2147483648"),
    "top-p zero": ([*RUN, "--top-p", "0"], "top_p is 0.0; allowed: more than 0, at most 1"),
    "top-p above 1": ([*RUN, "--top-p", "1.01"], "top_p is 1.01"),
    "min-p negative": ([*RUN, "--min-p", "-0.1"], "min_p is -0.1; allowed: 0 to 1"),
    "min-p NaN": ([*RUN, "--min-p", "nan"], "min_p is nan"),
    "repeat penalty zero": ([*RUN, "--repeat-penalty", "0"], "repeat_penalty is 0.0; allowed: more than 0"),
    "presence penalty infinite": ([*RUN, "--presence-penalty", "-inf"], "presence_penalty is -inf"),
    "frequency penalty NaN": ([*RUN, "--frequency-penalty", "nan"], "frequency_penalty is nan"),
    "repeat window below -1": ([*RUN, "--repeat-last-n", "-2"], "repeat_last_n is -2"),
    "seed below -1": ([*RUN, "-s", "-2"], "seed is -2"),
    "seed beyond 63 bits": ([*RUN, "-s", str(2**63)], f"seed is {2**63}"),
    "no tokens": ([*RUN, "-n", "0"], "max_tokens is 0; allowed: -1 (until a stop) or 1 to"),
    "tokens below -1": ([*RUN, "-n", "-7"], "max_tokens is -7"),
    "tokens beyond 64 bits": ([*RUN, "-n", str(2**70)], f"max_tokens is {2**70}"),
    "too many logprobs": ([*RUN, "--logprobs", "21"], "logprobs is 21; allowed: 0 to 20"),
    "empty stop string": ([*RUN, "--stop", ""], "stop is"),
    "17 stop strings": ([*RUN, *(["--stop", "a"] * 17)], "at most 16 strings"),
    "huge stop string": ([*RUN, "--stop", "a" * 1001], "of 1 to 1000 characters"),
    "bias without a sign": ([*RUN, "-l", "15"], "wanted a token id, a sign and a number, such as 15043+1"),
    "bias without a token": ([*RUN, "-l", "+5"], "wanted a token id"),
    "bias of words": ([*RUN, "-l", "hello+1"], "wanted a token id"),
    "bias of a negative token": ([*RUN, "-l", "-1+5"], "logit_bias is -1; allowed: token ids from 0"),
    "bias NaN": ([*RUN, "-l", "1+nan"], "logit_bias of token 1 is nan"),
    "bias infinite": ([*RUN, "-l", "1+inf"], "logit_bias of token 1 is inf"),
    "bias huge": ([*RUN, "-l", "1+1e30"], "logit_bias of token 1 is 1e+30; allowed: -1000000 to 1000000, or -inf"),
    "bias outside the vocabulary": ([*RUN, "-l", "260+1"], "token 260; this model has tokens 0 to 259"),
    "bias that would wrap": ([*RUN, "-l", f"{2**32 + 5}+1"], f"token {2**32 + 5}; this model has tokens 0 to 259"),
    "bias that forbids everything": (
        [*RUN, *(part for i in range(260) for part in ("-l", f"{i}-inf"))],
        "forbids every token",
    ),
    "context negative": ([*RUN, "-c", "-1"], "ctx-size is -1"),
    "context huge": ([*RUN, "-c", str(2**40)], f"ctx-size is {2**40}"),
    "threads negative": ([*RUN, "-t", "-1"], "threads is -1; allowed: 0 (physical cores) to 1024"),
    "threads huge": ([*RUN, "-t", "1025"], "threads is 1025"),
    "batch zero": ([*RUN, "-ub", "0"], "ubatch-size is 0; allowed: 1 to 65536"),
    "cache type unknown": ([*RUN, "-ctk", "q3"], "-ctk"),
    "mode unknown": ([*RUN, "--mode", "fast"], "--mode is fast; allowed: auto, dense, exact"),
    "ops unknown": ([*RUN, "--ops", "abacus"], "--ops"),
    "instruction set unknown": ([*RUN, "--isa", "z80"], "isa is 'z80'; allowed: auto, baseline"),
    "no prompt": (["run", "-m", M], "there is no prompt; give one with -p TEXT, -p - or -f FILE"),
    "empty prompt": (["run", "-m", M, "-p", ""], "the prompt is empty"),
    "prompt and file": ([*RUN, "-f", "prompt.txt"], "with -p or with -f, not with both"),
    "prompt file missing": (["run", "-m", M, "-f", "none.txt"], "none.txt cannot be read: No such file"),
    "prompt file a folder": (["run", "-m", M, "-f", "."], "cannot be read: Is a directory"),
    "prompt file not UTF-8": (["run", "-m", M, "-f", "latin1.txt"], "latin1.txt is not UTF-8: byte 2 is 0xe4"),
    "prompt argument not UTF-8": (["run", "-m", M, "-p", "ab\udce4"], "the prompt is not UTF-8: byte 2 is 0xe4"),
    "prompt as long as the context": (["run", "-m", M, "-p", "x" * 128], "129 tokens do not fit a context of 128"),
    "prompt far beyond the context": (["run", "-m", M, "-p", "x" * 5000], "5001 tokens do not fit a context of 128"),
    "prompt longer than a chosen context": (
        ["run", "-m", M, "-p", "x" * 32, "-c", "32"],
        "33 tokens do not fit a context of 32; shorten the prompt",
    ),
    "exact mode without zeros": (["run", "-m", "{silu}", "-p", "x", "--mode", "exact"], "silu gives none"),
    "GPU layers": ([*RUN, "-ngl", "99"], "--n-gpu-layers is not available: neurons are placed, not layers"),
    "GPU layers below zero": ([*RUN, "-ngl", "-1"], "--n-gpu-layers is not available"),
    "tensors by name": ([*RUN, "-ot", "exps=CPU"], "give --vram-budget and --ram-budget"),
    "conversation": ([*RUN, "-cnv"], "--conversation is not available: 'thermocline run' completes a text"),
    "no conversation": ([*RUN, "-no-cnv"], "--conversation is not available"),
    "sequences": ([*RUN, "-np", "2"], "--parallel is not available: one sequence is computed at a time"),
    "reverse prompt": ([*RUN, "-r", "User:"], "--reverse-prompt is not available: --stop ends the text"),
    "escapes": ([*RUN, "-e"], "--escape is not available: a prompt is taken as it is"),
    "colors": ([*RUN, "--color"], "--color is not available"),
    "mirostat": ([*RUN, "--mirostat", "2"], "--mirostat is not available: the samplers are --temp"),
    "temperature with one hyphen": ([*RUN, "-temp", "0"], "-temp is not available: write it with two hyphens"),
    "flash attention without a value": ([*RUN, "-fa"], "--flash-attn is not available: there is one"),
    "download without a value": (["run", "-hf"], "--hf-repo is not available"),
    "schema before another flag": (["run", "-j", "-p", "x", "-m", M], "--json-schema is not available"),
    "bench of prompt and answer": (["bench", "-m", M, "-pg", "16,4"], "-pg is not available: 'thermocline bench'"),
    "bench that counts": (["bench", "-m", M, "--count-activity", "a"], "of runs that generate: bench has no use"),
    "log probabilities without JSON": ([*RUN, "--logprobs", "3"], "--logprobs is told in JSON only: add --json"),
    "log probabilities of a chat": (["chat", "-m", M, "--logprobs", "3"], "a chat tells no --logprobs"),
    "instruction set of the reference": ([*RUN, "--ops", "reference", "--isa", "avx2"], "isa is avx2, and"),
    "threads of the reference": ([*RUN, "--ops", "reference", "-t", "2"], "threads is 2, and the reference has one"),
    "a model of no name": (["run", "-m", "", "-p", "x"], "model is ''; allowed: a file or a folder"),
    "show of two models": (["show", M, "-m", "other.gguf"], "and with -m other.gguf; leave one of them out"),
    "VRAM budget": ([*RUN, "--vram-budget", "8GiB"], "none is used: add --device cuda, or --device emulated"),
    "Hugging Face download": (["run", "-hf", "a/b:Q4_K_M", "-p", "x"], "--hf-repo is not available: download"),
    "adapter": ([*RUN, "--lora", "x.gguf"], "--lora is not available"),
    "draft model": ([*RUN, "-md", "x.gguf"], "--model-draft is not available"),
    "logical batch": ([*RUN, "-b", "2048"], "--ubatch-size (-ub)"),
    "bench of nothing": (["bench", "-m", M, "-p", "0", "-n", "0"], "nothing to measure"),
    "bench beyond the context": (["bench", "-m", M, "-p", "4096"], "-p is 4096; allowed: 0 to 127; raise --ctx-size"),
    "bench without repetitions": (["bench", "-m", M, "-r", "0"], "-r is 0"),
    "bench with sampling": (["bench", "-m", M, "--top-k", "1"], "Unknown option: --top-k"),
}  # fmt: skip

FAILURE = {
    "model missing": (["run", "-m", "none.gguf", "-p", "x"], "none.gguf: file: does not exist"),
    "model a folder": (["run", "-m", "empty", "-p", "x"], "empty: folder"),
    "model empty": (["run", "-m", "empty.gguf", "-p", "x"], "empty.gguf"),
    "model a text": (["run", "-m", "latin1.txt", "-p", "x"], "latin1.txt: magic at byte 0: is not a GGUF file"),
    "model cut short": (["run", "-m", "cut.gguf", "-p", "x"], "cut.gguf"),
    "model of an unknown family": (["run", "-m", "qwert.gguf", "-p", "x"], "family qwert is not implemented"),
    "show of a missing model": (["show", "none.gguf"], "none.gguf: file: does not exist"),
    "show of a text": (["show", "latin1.txt"], "is not a GGUF file"),
    "bench of a missing model": (["bench", "-m", "none.gguf"], "does not exist"),
    "chat without a template": (["chat", "-m", "{plain}"], "has no chat template"),
    "system prompt without a template": (["run", "-m", "{plain}", "-p", "x", "-sys", "y"], "no chat template"),
    "context beyond the memory": (["run", "-m", M, "-p", "x", "-c", "16777216", "-ctk", "f32"], "use --ctx-size"),
    "model name with control characters": (["run", "-m", "a\x1b[31mb\nc", "-p", "x"], r"a\x1b[31mb\nc: file"),
}  # fmt: skip

CASES = {name: (2, *case) for name, case in USAGE.items()} | {name: (1, *case) for name, case in FAILURE.items()}


@pytest.fixture
def surroundings(tmp_path: Path, tiny_model: Path) -> None:
    """The files that the cases name."""
    (tmp_path / "prompt.txt").write_text("x")
    (tmp_path / "latin1.txt").write_bytes(b"ab\xe4" + b"\n" * 64)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.gguf").write_bytes(b"")
    whole = tiny_model.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "qwert.gguf").write_bytes(whole.replace(b"arcee", b"qwert"))


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(("code", "arguments", "words"), CASES.values(), ids=CASES)
def test_refused_in_one_line(command, tiny_model, tiny_plain, tiny_silu, tmp_path, monkeypatch, code, arguments, words):
    if "-ctk" in arguments and code == 1:
        monkeypatch.setattr("thermocline.runtime.loading.find_memory", lambda: _memory_of(1 << 30))
    before = sorted(path.name for path in tmp_path.iterdir())
    places = {"{model}": tiny_model, "{plain}": tiny_plain, "{silu}": tiny_silu}
    outcome = command(*(places.get(argument, argument) for argument in arguments))
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("THERMOCLINE_TOP_K", "many", "THERMOCLINE_TOP_K"),
        ("THERMOCLINE_TEMPERATURE", "nan", "temperature is nan"),
        ("THERMOCLINE_CTX_SIZE", "-5", "ctx-size is -5"),
        ("THERMOCLINE_N_PREDICT", "0", "max_tokens is 0"),
    ],
)
def test_bad_values_in_the_environment_are_refused(command, tiny_model, name: str, value: str, words: str) -> None:
    outcome = command("run", "-m", tiny_model, "-p", "x", env={name: value})
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def _memory_of(size: int) -> Memory:
    return Memory(size, size, None, 4096, "never")
