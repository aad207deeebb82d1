"""The peer of the benchmarks behind its pipe, and turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.peer import Peer, PeerError


def interpreter(folder: Path, code: str) -> str:
    """A stand-in for the peer's interpreter that runs `code` in place of the worker."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_requests_are_answered_in_turn(tmp_path: Path) -> None:
    code = "for line in sys.stdin: print(json.dumps({'asked': json.loads(line), 'seconds': 2}), flush=True)"
    with Peer(interpreter(tmp_path, code)) as peer:
        assert peer.about["asked"] == {"do": "hello"}
        assert peer.ask("load", path="x", n_ctx=3)["asked"] == {"do": "load", "path": "x", "n_ctx": 3}
        assert peer.seconds("decode", tokens=[1]) == 2.0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(json.dumps({'error': 'there is no llama-cpp-python'}), flush=True)", "no llama-cpp-python; install it"),
        ("sys.exit(3)", "ended during 'hello' with exit code 3; install it"),
    ],
)
def test_an_environment_without_it_is_told_what_to_do(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        Peer(interpreter(tmp_path, code))


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot be started: No such file"):
        Peer(str(tmp_path / "nothing"))


def test_turns_alternate_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Readings:
        rates = iter(range(1000))

        def read(self, passes: int) -> float:
            return float(next(self.rates))

    monkeypatch.setattr(side_by_side, "PAUSE", 0)
    calls: list[str] = []

    def turn(name: str, seconds: float) -> side_by_side.Turn:
        return lambda: (calls.append(name) or 4, seconds, 8.0)  # type: ignore[func-returns-value]

    rounds = side_by_side.Rounds(Readings())  # type: ignore[arg-type]
    rounds.run({"a": turn("a", 1.0), "b": turn("b", 2.0)}, slices=2)
    assert calls == ["a", "b", "a", "b"]
    # Every other reading only wakes the threads: 1 before, then 3, 5, 7 and 9 after the turns.
    assert rounds.rows == [
        {
            "a": {"tokens": 8, "seconds": 2.0, "bytes": 16.0, "bandwidth": 4.0},
            "b": {"tokens": 8, "seconds": 4.0, "bytes": 16.0, "bandwidth": 6.0},
        }
    ]
