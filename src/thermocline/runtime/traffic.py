"""How many bytes a decode step reads from memory: the figure that limits its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thermocline.config import CacheType
from thermocline.files.weight import Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import kv_bytes_per_token
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import record_format
from thermocline.ops.contract import FfnWork
from thermocline.placement.plan import Plan

FFN_PARTS = ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one token reads. `trunk` are the bytes of everything but FFN neurons, KV cache and predictor.

    `gate_row`, `up_row` and `down_row` are a neuron's bytes, averaged over the layers; `kv_position` is what
    one cached position takes in one layer, and `windows` how many positions each layer looks back (0: all).
    `hot_trunk` is the part of `trunk` and `predictor` in VRAM, and `hot_layers` says which layers' caches are there.
    """

    trunk: int
    gate_row: float
    up_row: float
    down_row: float
    kv_position: float
    windows: tuple[int, ...]
    neurons: int
    predictor: int = 0
    hot_trunk: int = 0
    hot_layers: tuple[bool, ...] = ()

    def hot(self, work: FfnWork, position: int) -> float:
        """Bytes of those that are in VRAM, given what the FFNs did there."""
        ffn = work.gate_rows * self.gate_row + work.up_rows * self.up_row + work.down_rows * self.down_row
        seen = position + 1
        windows = (window for window, hot in zip(self.windows, self.hot_layers, strict=False) if hot)
        positions = sum(min(seen, window) if window else seen for window in windows)
        return self.hot_trunk + ffn + positions * self.kv_position

    def step(self, work: FfnWork, position: int) -> float:
        """Bytes that a step of one token at `position` (counted from 0) reads, given what its FFNs did."""
        ffn = work.gate_rows * self.gate_row + work.up_rows * self.up_row + work.down_rows * self.down_row
        seen = position + 1
        positions = sum(min(seen, window) if window else seen for window in self.windows)
        return self.trunk + self.predictor + ffn + positions * self.kv_position


def traffic_of(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    type_k: CacheType,
    type_v: CacheType,
    predictor: int = 0,
    plan: Plan | None = None,
) -> Traffic:
    """The traffic of a network with these weights, by canonical names, as the loader places them.

    `predictor` is the bytes of the predictor that every token is scored with, 0 without one. `plan` says what is in
    VRAM.
    """
    rows = spec.n_layer * spec.n_ff
    ffn = dict.fromkeys(FFN_PARTS, 0)
    trunk = 0
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in ffn:
            ffn[part] += _record_bytes(weight) if part == "ffn_down" and spec.ffn.sparse else weight.nbytes
        elif name == "position_embd.weight" or (name == "token_embd.weight" and not spec.tied_embeddings):
            trunk += weight.format.row_bytes(weight.columns)
        else:
            trunk += weight.nbytes
    return Traffic(
        trunk=trunk,
        gate_row=ffn["ffn_gate"] / rows,
        up_row=ffn["ffn_up"] / rows,
        down_row=(ffn["ffn_down"] + ffn["ffn_down_t"]) / rows,
        kv_position=kv_bytes_per_token(spec, type_k, type_v) / spec.n_layer,
        windows=spec.windows,
        neurons=rows,
        predictor=predictor,
        hot_trunk=0 if plan is None else _hot_trunk(spec, weights, plan, predictor),
        hot_layers=() if plan is None else tuple(layer.home is Tier.VRAM for layer in plan.layers),
    )


def _hot_trunk(spec: ModelSpec, weights: Mapping[str, Weight], plan: Plan, predictor: int) -> int:
    """Bytes of trunk and predictor that a token reads from VRAM."""
    total = 0
    for index, layer in enumerate(plan.layers):
        if layer.home is Tier.VRAM:
            names = (n for n in weights if n.startswith(f"blk.{index}.") and n.split(".")[-2] not in FFN_PARTS)
            total += sum(weights[name].nbytes for name in names)
        if layer.predictor is Tier.VRAM:
            total += predictor // spec.n_layer
    if plan.head is Tier.VRAM:
        total += weights["token_embd.weight" if spec.tied_embeddings else "output.weight"].nbytes
    return total


def _record_bytes(down: Weight) -> int:
    """Bytes of a down projection once it is transposed into neuron records."""
    return down.columns * record_format(down).row_bytes(down.rows)
