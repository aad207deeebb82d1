"""What is looked up in the weights of a model before they are placed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from thermocline.files.quantize import all_finite
from thermocline.files.weight import Weight
from thermocline.memory.reblock import not_finite
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Matrix, Ops


@runtime_checkable
class FiniteChecker(Protocol):
    """An implementation of ops that looks for NaN and infinity natively."""

    def check_finite(self, matrix: Matrix) -> int:
        """The first row that holds one, or -1."""


def check_finite(weights: Mapping[str, Weight], ops: Ops) -> None:
    """Look at every weight (of block formats, at every scale).

    Raises:
        NumericalError: one is NaN or infinite; the tensor is named.
    """
    for name, weight in weights.items():
        finite = ops.check_finite(ops.place(weight)) < 0 if isinstance(ops, FiniteChecker) else all_finite(weight)
        if not finite:
            raise not_finite(name)


def first_bytes(spec: ModelSpec, weights: Mapping[str, Weight]) -> tuple[int, ...]:
    """Bytes of each layer's matrix that tells which neurons are zero: the gate, or up where there is none."""
    name = "ffn_gate" if spec.ffn.gated else "ffn_up"
    return tuple(weights[f"blk.{layer}.{name}.weight"].nbytes for layer in range(spec.n_layer))
