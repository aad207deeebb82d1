"""The FFN's formula as files name it.

In config.json it is `hidden_act`, with ProSparse's `hidden_act_param` as the threshold of `fatrelu`. GGUF has
no key of its own for most families; here `{arch}.hidden_activation` takes the same names, and
`{arch}.hidden_activation_threshold` is the threshold.
"""

from __future__ import annotations

from pathlib import Path

from thermocline.errors import UnsupportedModelError, printable
from thermocline.files.metadata import Metadata
from thermocline.model.spec import THRESHOLD_BOUNDS
from thermocline.ops.contract import Activation, FfnKind

ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "relu": Activation.RELU,
    "drelu": Activation.RELU,
    "fatrelu": Activation.RELU,
    "relu2": Activation.RELU2,
    "gelu": Activation.GELU,
}
"""`drelu` is ReLU on gate and up both, `fatrelu` ReLU with a threshold, `gelu` the exact one (not that of tanh)."""


def ffn_from_gguf(metadata: Metadata, prefix: str, default: str, *, gated: bool) -> FfnKind:
    """The formula from `{arch}.hidden_activation`, or `default` where the file says nothing."""
    name = metadata.text(prefix + "hidden_activation", default, limit=100)
    threshold = metadata.number(prefix + "hidden_activation_threshold", *THRESHOLD_BOUNDS, 0.0)
    return ffn_kind(metadata.path, name, threshold, gated=gated)


def ffn_from_hf(config: Metadata, default: str, *, gated: bool, key: str = "hidden_act") -> FfnKind:
    """The formula from `key`, or `default` where config.json says nothing."""
    name = config.text(key, default, limit=100)
    threshold = config.number("hidden_act_param", *THRESHOLD_BOUNDS) if name == "fatrelu" else 0.0
    return ffn_kind(config.path, name, threshold, gated=gated)


def ffn_kind(path: Path | str, name: str, threshold: float, *, gated: bool) -> FfnKind:
    """The formula with that name.

    Raises:
        UnsupportedModelError: the name is unknown, or asks for a gate that the family has not.
    """
    if name not in ACTIVATIONS or (name == "drelu" and not gated):
        known = ", ".join(n for n in ACTIVATIONS if gated or n != "drelu")
        raise UnsupportedModelError(
            f"{printable(str(path))}: activation {printable(name)} is not implemented; known are {known}"
        )
    activation = ACTIVATIONS[name]
    kind = FfnKind(activation, gated=gated, both=name == "drelu", threshold=threshold)
    if threshold and not kind.sparse:
        raise UnsupportedModelError(f"{printable(str(path))}: a threshold of {threshold} has no meaning for {name}")
    return kind


def activation_name(kind: FfnKind) -> str:
    """The name to write for a formula, the inverse of `ffn_kind` (the threshold is written beside it)."""
    return "drelu" if kind.both else str(kind.activation)
