"""Commands that write files, killed before any call that changes the disk, and on a disk that is really full: the old
file or none is left, and a second start ends as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from thermocline import api
from thermocline.activity.predictor import save_predictor
from thermocline.config import LoadSettings
from thermocline.files.open import open_model
from thermocline.files.sidecar import read_sidecar

TEXT = "def first(n):\n    return n + 1\n\n\nclass Second:\n    value = 3\n"

SERVER = """
import json, os, signal, sys
import thermocline.api, thermocline.cli.main
from thermocline.activity import capture, fit_state
from thermocline.files import atomic, resumable

CHANGES = ("open", "write", "fsync", "ftruncate", "replace", "rename", "unlink", "mkdir", "rmdir", "fchmod")

def arm(last, calls):
    def wrapped(name, real):
        def call(*given, **named):
            if name == "open" and not given[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return real(*given, **named)
            calls.append(name)
            if len(calls) == last:
                if name == "write":
                    real(given[0], bytes(given[1])[: len(given[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)
        return call
    for name in CHANGES:
        setattr(os, name, wrapped(name, getattr(os, name)))

def child(task, told):
    os.chdir(task["folder"])
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    capture.SAVE_SECONDS = fit_state.SAVE_SECONDS = resumable.SAVE_SECONDS = task["save_seconds"]
    if task["blind"]:  # as if the room had been taken after it was looked for
        atomic.require_space = resumable.require_space = lambda path, size: None
    calls = []
    arm(task["last"], calls)
    code = thermocline.cli.main.main(task["line"])
    sys.stdout.flush()
    os.write(told, str(len(calls)).encode())
    os._exit(code)

for line in sys.stdin:
    task = json.loads(line)
    if "torch" in task["needs"]:
        import torch
    ours, told = os.pipe()
    pid = os.fork()
    if not pid:
        child(task, told)
    os.close(told)
    count = os.read(ours, 64)
    os.close(ours)
    status = os.waitpid(pid, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), int(count or 0)]), flush=True)
"""


@dataclass
class Killer:
    """Runs command lines in children of a process that has imported all there is to import."""

    server: subprocess.Popen[str]
    log: Path

    def run(
        self, folder: Path, line: list[str], last: int = 0, save_seconds: float = 20.0, *, blind: bool = False
    ) -> tuple[int, int]:
        """The exit code (-9: killed before its call number `last`) and how many calls changed the disk."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        needs = ["torch"] if line[0] == "train-predictor" else []
        task = {
            "folder": str(folder),
            "line": line,
            "last": last,
            "save_seconds": save_seconds,
            "needs": needs,
            "blind": blind,
        }
        self.log.write_text("")
        print(json.dumps({**task, "log": str(self.log)}), file=self.server.stdin, flush=True)
        code, calls = json.loads(self.server.stdout.readline())
        return code, calls

    def said(self) -> str:
        """What the last run said."""
        return self.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    log = tmp_path_factory.mktemp("log") / "log"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    yield Killer(server, log)
    server.communicate()


@pytest.fixture(scope="module")
def start(tiny_model: Path, oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read; beside it no other file."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copy(tiny_model, folder / "m.gguf")
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.py").write_text(f"# {i}\n{TEXT}" * (i + 1))
    load = LoadSettings(ctx_size=64, threads=1)
    api.profile(folder / "m.gguf", [folder / "text"], folder / "a.safetensors", load)
    api.profile(folder / "m.gguf", [folder / "text" / "0.py"], folder / "b.safetensors", load)
    with open_model(folder / "m.gguf") as source:
        save_predictor(oracle(source, 0.25), folder / "p.safetensors", source.fingerprint, model_name="tiny")
    api.export_activity(folder / "a.safetensors", folder / "activation")
    api.export_predictor(folder / "p.safetensors", folder / "predictors")
    return folder


def content(path: Path) -> Any:
    """What two runs of a command have in common: all of a model, a page or a folder, and of sidecars the tensors."""
    if not path.exists():
        return None
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    if path.suffix != ".safetensors":
        return path.read_bytes()
    sidecar = read_sidecar(path)
    audit = sidecar.info.get("audit")
    tensors = {name: array.tobytes() for name, array in sidecar.arrays.items()}
    weights = {name: weight.data.tobytes() for name, weight in sidecar.weights.items()}
    return sidecar.kind, sidecar.model_fingerprint, tensors | weights, audit and audit["passed"]


@dataclass
class Command:
    """A command line, the file or folder it makes, and the command that made an old one there before."""

    line: list[str]
    output: str = "out.gguf"
    before: list[list[str]] = field(default_factory=list)


SMALL = ["-c", "64", "-t", "1"]
CONVERT = ["convert", "m.gguf", "--activity", "a.safetensors", "-o", "out.gguf"]
TRAIN = [
    "train-predictor", "-m", "m.gguf", "--text", "text", "-o", "out.predictor.safetensors", "--epochs", "1",
    "--train-on", "cpu", "--rank", "32", "--max-share", "0", "--batch", "128", *SMALL,
]  # fmt: skip
COMMANDS = {
    "convert": Command([*CONVERT, "--outtype", "f16"]),
    "convert over an old one": Command([*CONVERT, "--outtype", "f16", "--force"], before=[CONVERT]),
    "quantize": Command(["quantize", "m.gguf", "out.gguf", "Q4_0"]),
    "profile": Command(
        ["profile", "-m", "m.gguf", "--text", "text", "-o", "out.activity.safetensors", *SMALL],
        "out.activity.safetensors",
    ),
    "profile added": Command(
        ["profile", "-m", "m.gguf", "--text", "text", "-o", "out.activity.safetensors", "--merge", *SMALL],
        "out.activity.safetensors",
        before=[["profile", "-m", "m.gguf", "--text", "text/0.py", "-o", "out.activity.safetensors", *SMALL]],
    ),
    "train-predictor": Command(TRAIN, "out.predictor.safetensors"),
    "train-predictor over an old one": Command(
        [*TRAIN, "--overwrite"],
        "out.predictor.safetensors",
        before=[["predictor", "import", "predictors", "-m", "m.gguf", "-o", "out.predictor.safetensors"]],
    ),
    "audit": Command(
        ["audit", "-m", "m.gguf", "--text", "text", "--tokens", "100", "--predictor", "out.predictor.safetensors",
         "--mode", "predicted", *SMALL],
        "out.predictor.safetensors",
        before=[["predictor", "import", "predictors", "-m", "m.gguf", "-o", "out.predictor.safetensors"]],
    ),
    "merge": Command(
        ["activity", "merge", "a.safetensors", "b.safetensors", "-o", "out.activity.safetensors"],
        "out.activity.safetensors",
    ),
    "order": Command(["activity", "order", "a.safetensors", "-o", "out.order.safetensors"], "out.order.safetensors"),
    "export": Command(["activity", "export", "a.safetensors", "-o", "out"], "out"),
    "export predictor": Command(["predictor", "export", "p.safetensors", "-o", "out"], "out"),
    "report": Command(["report", "a.safetensors", "-o", "out.html"], "out.html"),
}  # fmt: skip


@pytest.fixture
def fresh(start: Path, tmp_path: Path, killer: Killer) -> Callable[[Command, str], Path]:
    """`fresh(command, name)`: a new folder in which the command can be given."""

    def make(command: Command, name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(start, folder)
        for line in command.before:
            assert killer.run(folder, line)[0] == 0
        return folder

    return make


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "out/" not in str(path)}


def each_call(
    command: Command, fresh: Callable[[Command, str], Path], killer: Killer, few: int | None, save_seconds: float = 20.0
) -> None:
    """Kill it before its calls, `few` of them spread over all and as many of the last ones (None: every call)."""
    whole = fresh(command, "whole")
    old = content(whole / command.output)
    allowed = (0, 1) if command.line[0] == "audit" else (0,)  # not to pass is no failure of the command
    code, total = killer.run(whole, command.line, save_seconds=save_seconds)
    assert code in allowed, killer.said()
    new, kept = content(whole / command.output), names(whole)
    assert total > 4
    calls = range(1, total + 1)
    chosen = calls if few is None else sorted({*calls[:: -(-total // few)], *calls[-few:]})
    for last in chosen:
        folder = fresh(command, f"killed{last}")
        assert killer.run(folder, command.line, last, save_seconds)[0] == -9
        left = content(folder / command.output)
        assert left in (old, new), last
        code, _ = killer.run(folder, command.line, save_seconds=save_seconds)
        # What was killed when all was done may find its own file there.
        assert code in allowed or (code in (1, 2) and left == new and "is there already" in killer.said()), last
        assert content(folder / command.output) == new, last
        assert names(folder) == kept, last
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["convert over an old one", "profile added"])
def test_killed_before_a_call(name: str, fresh: Callable[[Command, str], Path], killer: Killer) -> None:
    each_call(COMMANDS[name], fresh, killer, few=4)


@pytest.mark.slow
@pytest.mark.parametrize("save_seconds", [20.0, 0.0])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_before_every_call(
    name: str, fresh: Callable[[Command, str], Path], killer: Killer, save_seconds: float
) -> None:
    each_call(COMMANDS[name], fresh, killer, None, save_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "convert over an old one", "quantize", "profile added", "train-predictor"])
def test_killed_again_and_again(name: str, fresh: Callable[[Command, str], Path], killer: Killer) -> None:
    """The first start is killed before its first call, the second before its second, until one comes through."""
    command = COMMANDS[name]
    whole, folder = fresh(command, "whole"), fresh(command, "killed")
    old = content(whole / command.output)
    assert killer.run(whole, command.line)[0] == 0
    new = content(whole / command.output)
    for last in range(1, 10_000):
        code, _ = killer.run(folder, command.line, last, save_seconds=0.0)
        assert content(folder / command.output) in (old, new), last
        if code != -9:
            break
    assert code == 0 or "is there already" in killer.said()
    assert content(folder / command.output) == new
    assert names(folder) == names(whole)


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int | None], Path]]:
    """`disk(spare)`: a file system of its own with so many bytes left (None: 64 MiB in all)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)

    def resize(spare: int | None) -> Path:
        seen = os.statvfs(folder)
        size = 64 << 20 if spare is None else (seen.f_blocks - seen.f_bfree) * seen.f_frsize + spare
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
        return folder

    yield resize
    subprocess.run(["umount", folder], check=True)


PAGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 384, 512)
"""Of 4,096 bytes each: what is left on the disk."""


@pytest.mark.root
@pytest.mark.parametrize("blind", [False, True], ids=["checked", "blind"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full(
    name: str,
    fresh: Callable[[Command, str], Path],
    killer: Killer,
    disk: Callable[[int | None], Path],
    *,
    blind: bool,
) -> None:
    command = COMMANDS[name]
    whole, made = fresh(command, "whole"), fresh(command, "made")
    allowed = (0, 1) if command.line[0] == "audit" else (0,)
    old, before = content(made / command.output), names(made)
    assert killer.run(whole, command.line)[0] in allowed
    new, kept = content(whole / command.output), names(whole)
    failed = 0
    for pages in PAGES:
        folder = disk(None)
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(made, folder, dirs_exist_ok=True)
        code, _ = killer.run(disk(4096 * pages), command.line, blind=blind)
        told = killer.said()
        if content(folder / command.output) == new != old:
            assert code in allowed
            break
        failed += 1
        assert code == 1, told
        assert content(folder / command.output) == old, pages
        assert "Traceback" not in told
        error = next(line for line in told.splitlines() if line.startswith("error: "))
        assert re.search(r"No space left on device|[\d,]+ are free on its disk", error)
        if " is kept in " not in error:
            assert names(folder) == before, error
        disk(None)
        code, _ = killer.run(folder, command.line)
        assert code in allowed, killer.said()
        assert content(folder / command.output) == new, pages
        assert names(folder) == kept, pages
    else:
        pytest.fail("no disk was large enough")
    assert failed
