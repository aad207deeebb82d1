"""Every kernel, so that each can be compiled ahead of time for a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import triton

KERNELS: Final[dict[str, Any]] = {}
"""The kernels by name."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` with Triton, and list it."""
    compiled = triton.jit(function)
    KERNELS[function.__name__] = compiled
    return compiled
