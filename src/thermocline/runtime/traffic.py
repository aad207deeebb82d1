"""How many bytes a decode step reads from memory: the figure that limits its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thermocline.config import CacheType
from thermocline.files.weight import Weight
from thermocline.memory.kv_cache import kv_bytes_per_token
from thermocline.memory.reblock import record_format
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import FfnWork

FFN_PARTS = ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one token reads. `trunk` are the bytes of everything but FFN neurons, KV cache and predictor.

    `gate_row`, `up_row` and `down_row` are a neuron's bytes, averaged over the layers; `kv_position` is what
    one cached position takes in one layer, and `windows` how many positions each layer looks back (0: all).
    """

    trunk: int
    gate_row: float
    up_row: float
    down_row: float
    kv_position: float
    windows: tuple[int, ...]
    neurons: int
    predictor: int = 0

    def step(self, work: FfnWork, position: int) -> float:
        """Bytes that a step of one token at `position` (counted from 0) reads, given what its FFNs did."""
        ffn = work.gate_rows * self.gate_row + work.up_rows * self.up_row + work.down_rows * self.down_row
        seen = position + 1
        positions = sum(min(seen, window) if window else seen for window in self.windows)
        return self.trunk + self.predictor + ffn + positions * self.kv_position


def traffic_of(
    spec: ModelSpec, weights: Mapping[str, Weight], type_k: CacheType, type_v: CacheType, predictor: int = 0
) -> Traffic:
    """The traffic of a network with these weights, by canonical names, as the loader places them.

    `predictor` is the bytes of the predictor that every token is scored with, 0 without one.
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
    )


def _record_bytes(down: Weight) -> int:
    """Bytes of a down projection once it is transposed into neuron records."""
    return down.columns * record_format(down).row_bytes(down.rows)
