"""Roundings that the quantisers share, as ggml's reference does them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thermocline.errors import NumericalError

Floats = npt.NDArray[np.float32]


def half(values: Floats, source: Floats, name: str, *, finite: bool = False) -> npt.NDArray[np.float16]:
    """`values` in float16.

    Raises:
        NumericalError: a finite value overflows or, if `finite`, any is not finite; the message names the largest
            number of `source` and the format `name`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float16)
    bad = ~np.isfinite(rounded)
    if not finite:
        bad &= np.isfinite(values)
    if bad.any():
        raise _cannot_store(source, name)
    return rounded


def require_finite(x: Floats, name: str) -> None:
    """Refuse NaN and infinity, which the format `name` has no place for.

    Raises:
        NumericalError: the message names the largest number.
    """
    if not np.isfinite(x).all():
        raise _cannot_store(x, name)


def _cannot_store(source: Floats, name: str) -> NumericalError:
    worst = source[np.unravel_index(np.abs(source).argmax(), source.shape)]
    return NumericalError(f"found {worst:g}, which {name} cannot store: use F32 or BF16")


def reciprocal(scale: Floats) -> Floats:
    """1 / scale, and 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: Floats = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def round_away(x: Floats) -> Floats:
    """Round half away from zero, as C's roundf does and numpy's rint does not."""
    whole = np.floor(np.abs(x))
    rounded: Floats = np.copysign(whole + np.floor(2 * (np.abs(x) - whole)), x)
    return rounded
