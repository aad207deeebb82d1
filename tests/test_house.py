"""The house keeps its order: a room imports only from rooms above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "thermocline"
ROOMS = [
    "errors", "config", "hardware", "files", "text", "ops", "model", "activity", "placement", "memory",
    "runtime", "tasks", "api",
]  # fmt: skip
FACES = {"__main__": {"cli"}, "cli": {"api", "config", "errors", "cli"}, "serve": {"api", "config", "errors", "serve"}}
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py" or p.parent != SOURCE)


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [
                f"{node.module}.{a.name}" if node.module == "thermocline" else node.module or "" for a in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("thermocline.")}
    return rooms - {"_native", "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_flow_down(path: Path) -> None:
    room = room_of(path)
    allowed = FACES.get(room) or set(ROOMS[: ROOMS.index(room) + 1])
    assert imported_rooms(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_ops_room_touches_native_code(path: Path) -> None:
    if room_of(path) not in {"ops", "hardware"}:
        assert "_native" not in path.read_text(encoding="utf-8")
