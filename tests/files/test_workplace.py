"""A folder of unfinished work: nothing in it passes for another run's, and what is kept is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thermocline.errors import NumericalError, OutputError, UsageError
from thermocline.files.workplace import Workplace


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """What a run of the identity {"a": 1} left."""
    place = Workplace(tmp_path / "x", {"a": 1})
    with place.occupied():
        place.write_state("done", {"so": "far"})
    return place.folder


def test_the_same_run_goes_on(kept: Path, tmp_path: Path) -> None:
    place = Workplace(tmp_path / "x", {"a": 1})
    with place.occupied(useless=lambda found: pytest.fail("it is the same")):
        assert place.read_state("done") == {"so": "far"}


def test_another_run_is_refused_unless_it_is_to_be_forgotten(kept: Path, tmp_path: Path) -> None:
    place = Workplace(tmp_path / "x", {"a": 2})
    with pytest.raises(UsageError, match="--restart"), place.occupied():
        pass
    assert (kept / "done.json").exists()
    with place.occupied(restart=True):
        assert place.read_state("done") == {}


@pytest.mark.parametrize("name", [".", "", "/"])
def test_an_output_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"which is a folder; name a file to write"):
        Workplace(Path(name), {})


@pytest.mark.parametrize(
    ("error", "who"), [(KeyboardInterrupt(), "the same command"), (NumericalError("x"), "one with other settings")]
)
def test_who_can_go_on_is_noted(kept: Path, tmp_path: Path, error: BaseException, who: str) -> None:
    with pytest.raises(type(error)) as told, Workplace(tmp_path / "x", {"a": 1}).kept(lambda: True, lambda: True):
        raise error
    assert told.value.__notes__ == [f"what was done is kept in {kept}: {who} goes on with it"]


def test_only_what_is_useless_is_removed(kept: Path, tmp_path: Path) -> None:
    (kept / "old").write_bytes(b"")
    place, heard = Workplace(tmp_path / "x", {"a": 2}), []

    def useless(found: Any) -> list[Path]:
        heard.append(found)
        return [kept / "old"]

    with place.occupied(useless=useless):
        assert place.read_state("done") == {"so": "far"}
    assert heard == [{"a": 1}]
    assert not (kept / "old").exists()
    with pytest.raises(UsageError, match="--restart"), Workplace(tmp_path / "x", {"a": 1}).occupied():
        pass


def test_a_disk_that_is_full_then_costs_nothing_that_is_kept(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Workplace, name: str, state: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(Workplace, "write_state", full)
    with pytest.raises(OutputError), Workplace(tmp_path / "x", {"a": 2}).occupied(useless=lambda found: []):
        pass
    assert (kept / "done.json").exists()
    with pytest.raises(OutputError), Workplace(tmp_path / "y", {"a": 2}).occupied():
        pass
    assert not (tmp_path / "y.work").exists()


def test_what_does_not_tell_whose_it_is_is_not_used(kept: Path, tmp_path: Path) -> None:
    (kept / "run.json").unlink()
    place = Workplace(tmp_path / "x", {"a": 1})
    with place.occupied():
        assert place.read_state("done") == {}


def test_what_tells_whose_it_is_goes_last(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        gone.append(self.name)
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    Workplace(tmp_path / "x", {"a": 1}).remove()
    assert gone == ["done.json", "run.json"]
    assert not kept.exists()
