"""Folders of one file a layer, named by number."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from thermocline.errors import ModelFormatError, printable

_MAX_LAYERS = 1 << 12
_SHOWN = 5


def layer_files(
    folder: Path, stem: str, *, n_layer: int | None, known: Collection[str] = ()
) -> tuple[list[Path], tuple[str, ...]]:
    """The files `{stem}_0.pt`, `{stem}_1.pt` and so on, in the order of their numbers, and warnings on other files.

    Sorting such names as texts puts layer 10 before layer 2, and gives every layer the contents of another.
    `n_layer` is how many there must be, `known` are the names of other files that belong to the folder.

    Raises:
        ModelFormatError: the folder cannot be listed; a layer is missing or there twice; there are too many or
            too few; or a file looks like a layer's but is not named like one.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be listed: {error.strerror}"
        raise ModelFormatError(folder, "folder", reason) from error
    numbered: dict[int, str] = {}
    others = []
    for name in names:
        match = re.fullmatch(re.escape(stem) + r"_(\d{1,9})\.pt", name, re.ASCII)
        if match is None:
            others.append(name)
            continue
        number = int(match[1])
        if number in numbered:
            problem = f"{numbered[number]} and {name} are both layer {number}; remove one"
            raise ModelFormatError(folder, "files", problem)
        numbered[number] = name
    _require_names(folder, stem, numbered, others)
    _require_all(folder, stem, numbered, n_layer)
    strange = [name for name in others if name not in known]
    warning = f"{printable(str(folder))}: not read: {_listed(strange)}"
    return [folder / numbered[i] for i in range(len(numbered))], (warning,) if strange else ()


def _require_names(folder: Path, stem: str, numbered: dict[int, str], others: list[str]) -> None:
    """Refuse what PowerInfer would pass over in silence: a layer's file under another name."""
    alike = [name for name in others if name.endswith(".pt")]
    alike += [name for number, name in numbered.items() if name != f"{stem}_{number}.pt"]
    if alike:
        problem = f"found {_listed(alike)}; allowed: {stem}_0.pt, {stem}_1.pt and so on, without leading zeros"
        raise ModelFormatError(folder, "files", problem)


def _require_all(folder: Path, stem: str, numbered: dict[int, str], n_layer: int | None) -> None:
    last = max(numbered, default=-1)
    if not numbered or last >= _MAX_LAYERS:
        problem = f"holds layer {last}; allowed: at most {_MAX_LAYERS - 1}" if numbered else f"has no {stem}_0.pt"
        raise ModelFormatError(folder, "files", problem)
    missing = [f"{stem}_{i}.pt" for i in range(last + 1) if i not in numbered]
    if missing:
        raise ModelFormatError(folder, "files", f"{len(missing)} of {last + 1} layers are missing: {_listed(missing)}")
    if n_layer is not None and len(numbered) != n_layer:
        raise ModelFormatError(folder, "files", f"{len(numbered)} layers; the model has {n_layer}")


def _listed(names: list[str]) -> str:
    return ", ".join(printable(name, 80) for name in names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
