"""The command line as a process: imports, pipes, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from thermocline import __version__

HEAVY = {"numpy", "jinja2", "tokenizers", "psutil", "safetensors", "thermocline._native", "thermocline.api"}
VERBS = ["run", "chat", "show", "bench", "profile", "activity", "report", "plan", "doctor"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=str)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from thermocline.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}), code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: [] 0"
    assert done.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples(verb: str) -> None:
    call = [sys.executable, "-m", "thermocline", verb, "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert f"thermocline {verb}" in done.stdout.partition("For example:")[2]


def test_help_lists_the_verbs_and_the_version_is_told(spawn) -> None:
    out, _ = spawn("--help").communicate(timeout=30)
    assert all(verb in out.decode() for verb in VERBS)
    out, _ = spawn("--version").communicate(timeout=30)
    assert out.decode().strip() == __version__


def test_a_reader_that_stops_reading_ends_it_quietly(spawn, tiny_model: Path) -> None:
    running = spawn("run", "-m", tiny_model, "-p", "x", "-c", 16000, "--ignore-eos", "-t", 1)
    assert running.stdout.read(1)
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(timeout=30) == 141


def test_a_closed_standard_output_is_told(tiny_model: Path) -> None:
    line = f"{sys.executable} -m thermocline run -m {tiny_model} -p x >&-"
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: standard output is closed; nothing could be shown\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["run", "-p", "x", "-n", "3", "-m"], ["show"], ["show", "--json"]], ids=str)
def test_a_full_disk_is_told(spawn, tiny_model: Path, arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        running = spawn(*arguments, tiny_model, stdout=full)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 1
    assert err.decode().startswith("error: ")
    assert "No space left on device" in err.decode()
    assert err.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_stops_cleanly(spawn, tiny_model: Path, arguments: list[str]) -> None:
    """The context is so long that the text would go on for minutes."""
    running = spawn("run", "-m", tiny_model, "-p", "x", "-c", 200000, "--ignore-eos", "-t", 1, "-v", *arguments)
    assert running.stderr.readline().startswith(b"note:")
    if not arguments:
        assert running.stdout.read(1)
    else:
        wait_for_work(running.pid)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"Traceback" not in err
    if arguments:
        assert (json.loads(out)["finish_reason"], err.splitlines()[-1]) == ("interrupted", b"interrupted")
    else:
        assert out.endswith(b"\n")
        assert err.splitlines()[-1].startswith(b"prompt 1 tokens")


def wait_for_work(pid: int) -> None:
    """Until a process that says nothing has computed for so long that tokens came."""
    process = psutil.Process(pid)
    before = process.cpu_times().user
    while process.cpu_times().user < before + 0.5:
        time.sleep(0.05)


@pytest.mark.parametrize("verb", [["run", "-p", "x", "-c", "200000", "--ignore-eos"], ["chat"]], ids=lambda v: v[0])
def test_being_terminated_ends_it_cleanly(spawn, tiny_model: Path, verb: list[str]) -> None:
    running = spawn(*verb, "-m", tiny_model, "-t", 1, "-v", stdin=subprocess.PIPE)
    assert running.stderr.readline().startswith(b"note:")
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 143
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"terminated"


def test_ctrl_c_in_a_piped_chat_ends_it(spawn, tiny_model: Path) -> None:
    running = spawn("chat", "-m", tiny_model, "-t", 1, "-v", stdin=subprocess.PIPE)
    assert running.stderr.readline().startswith(b"note:")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"Traceback" not in err


def test_it_is_a_module_and_a_script(tiny_model: Path) -> None:
    script = Path(sys.executable).with_name("thermocline")
    if not script.exists():
        pytest.skip("thermocline is not installed as a script here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == __version__


INTERRUPTED_AT_IMPORT = """
import os, signal, sys
import thermocline.__main__
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "thermocline.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["--version"]
sys.exit(thermocline.__main__.main())
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_during_the_start_says_nothing(ignored: bool) -> None:
    """A shell's background job ignores it, and goes on doing so."""
    before = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if ignored else ""
    done = subprocess.run([sys.executable, "-c", before + INTERRUPTED_AT_IMPORT], capture_output=True, text=True)
    assert done.stderr == ""
    assert (done.returncode, done.stdout.strip()) == ((0, __version__) if ignored else (-signal.SIGINT, ""))
