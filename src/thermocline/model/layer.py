"""What a layer of a network is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from thermocline.hardware.machine import Tier
from thermocline.model.feed_forward import FeedForward
from thermocline.ops.contract import Array, Matrix
from thermocline.ops.device import Device


@dataclass(frozen=True, slots=True)
class LayerPredictor:
    """A layer's placed predictor: `Ops.predict` scores the residual stream before the FFN's norm.

    Where attention and FFN are parallel, this is the layer's input.

    It is used in steps of up to `tokens` tokens; in longer ones it would cost more than it saves.
    """

    device: Device
    fc1: Matrix
    fc2: Matrix
    threshold: float
    tokens: int


class Norm(NamedTuple):
    """LayerNorm where there is a bias, else RMSNorm."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights on its home `device`. `qkv` share their input; norms and biases are float32 vectors.

    `home` is where the attention's matrices are: the device's tier, or disk, from where every step reads them.
    `rope` is the table of rotations on that device, None for a network without. `ffn_norm` is None where the FFN shares
    the norm of attention; `down_bias` is added once, after all of the FFN.
    """

    device: Device
    home: Tier
    rope: Array | None
    attn_norm: Norm
    qkv: tuple[Matrix, Matrix, Matrix]
    qkv_bias: tuple[Array, Array, Array] | None
    q_norm: Array | None
    k_norm: Array | None
    out: tuple[Matrix]
    out_bias: tuple[Array] | None
    ffn_norm: Norm | None
    ffn: FeedForward
    down_bias: Array | None
    window: int
    predictor: LayerPredictor | None = None
