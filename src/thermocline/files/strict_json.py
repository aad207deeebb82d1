"""JSON from files that are not trusted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from thermocline.errors import ModelFormatError, printable


def parse_object(raw: bytes, path: Path | str, field: str) -> dict[str, Any]:
    """The JSON object in `raw`, stricter than Python's own parser.

    Refused are: bytes that are not UTF-8, duplicate keys, NaN and Infinity, numbers beyond a double or of
    thousands of digits, nesting deeper than the parser's stack, and anything but an object at the top.

    Raises:
        ModelFormatError: one of the above; `path` and `field` say where.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _RefusedError(f'key "{printable(twice, 80)}" is given twice')
        return found

    try:
        found = json.loads(
            raw.decode(),
            object_pairs_hook=unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except _RefusedError as error:
        raise ModelFormatError(path, field, str(error)) from error
    except UnicodeDecodeError as error:
        raise ModelFormatError(path, field, "is not UTF-8", offset=error.start) from error
    except json.JSONDecodeError as error:
        raise ModelFormatError(path, field, f"is not JSON: {printable(error.msg)}", offset=error.pos) from error
    except (RecursionError, ValueError) as error:
        problem = "is nested too deep" if isinstance(error, RecursionError) else f"is not usable: {error}"
        raise ModelFormatError(path, field, problem) from error
    if not isinstance(found, dict):
        raise ModelFormatError(path, field, f"is a JSON {type(found).__name__}; an object is needed")
    return found


class _RefusedError(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"found {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"found {printable(text, 40)}, beyond the range of a double")
    return value
