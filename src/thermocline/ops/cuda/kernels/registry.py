"""Every kernel, so that each can be compiled ahead of time for a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import triton

KERNELS: Final[dict[str, Any]] = {}
"""The kernels by name."""


def kernel(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function with Triton, and list it.

    `counts` names its whole numbers that vary while a model runs. Triton compiles anew where others become 1 or a
    multiple of 16, which takes a second in the middle of an answer.
    """

    def listed(function: Callable[..., Any]) -> Any:
        compiled = triton.jit(function, do_not_specialize=counts)
        KERNELS[function.__name__] = compiled
        return compiled

    return listed
