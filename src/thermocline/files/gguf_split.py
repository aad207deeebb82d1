"""GGUF models in parts, named `NAME-00001-of-00003.gguf` and so on (the convention of ggml's gguf-split)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from thermocline.errors import ModelFormatError
from thermocline.files.gguf_header import Header
from thermocline.files.metadata import Metadata

MAX_PARTS: Final = 999
_PART_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_paths(path: Path, header: Header) -> list[Path]:
    """The parts after the first, none if the file is not split.

    Their names are made from `path`, never from anything the file says.

    Raises:
        ModelFormatError: the file is another part than the first, says another number of parts than its
            name, or a part is missing.
    """
    meta = Metadata(path, header.values)
    count = meta.integer("split.count", 0, MAX_PARTS, 1)
    if count <= 1:
        return []
    name = _PART_NAME.fullmatch(path.name)
    if name is None:
        raise ModelFormatError(path, "split.count", f"is part of {count}, but not named NAME-00001-of-{count:05}.gguf")
    if int(name["count"]) != count:
        raise ModelFormatError(path, "split.count", f"found {count}; allowed: {int(name['count'])}, as its name says")
    names = [f"{name['stem']}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    if int(name["part"]) != 1:
        raise ModelFormatError(path, "split.no", f"is part {int(name['part'])} of {count}; open the first: {names[0]}")
    paths = [path.with_name(part) for part in names[1:]]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ModelFormatError(path, "split.count", f"{len(missing)} of {count} parts are missing: {listed}")
    return paths


def require_one_model(path: Path, paths: Sequence[Path], headers: Sequence[Header]) -> None:
    """Refuse parts that do not number, count and name their tensors as parts of one model.

    Raises:
        ModelFormatError: a part's number or count is wrong, it repeats a tensor or contradicts the first's
            metadata, or the parts do not add up to the tensors that the first promises.
    """
    if len(paths) == 1:
        return
    first = headers[0]
    seen: dict[str, Path] = {}
    for number, (part, header) in enumerate(zip(paths, headers, strict=True)):
        meta = Metadata(part, header.values)
        meta.integer("split.no", number, number)
        meta.integer("split.count", len(paths), len(paths))
        for key in ("general.architecture", "general.name"):
            if key in header.values and header.values[key] != first.values.get(key):
                raise meta.wrong(key, f"the same as in {paths[0].name}: is it a part of another model?")
        for name in header.tensors:
            if name in seen:
                raise ModelFormatError(part, f'tensor "{name}"', f"is also in {seen[name].name}")
            seen[name] = part
    total = Metadata(path, first.values).integer("split.tensors.count", 0, 1 << 31, len(seen))
    if total != len(seen):
        raise ModelFormatError(path, "split.tensors.count", f"found {total}; the parts hold {len(seen)} tensors")
