"""The models of `benchmarks.synthetic` in memory, neurons hottest first, drawn by torch in seconds.

The construction is the same, with the calibration tokens run through every layer as it is drawn: gates are A·B - b·uᵀ,
the residual stream always holds u, and [B; -B; u] with [A, -A, -b] predicts them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.synthetic import (
    CALIBRATION_TOKENS,
    GATE_RANK,
    MISSED,
    RESIDUAL_SHARE,
    frequencies,
)
from benchmarks.synthetic_families import NORM_EPS, ROPE_BASE, Shape, metadata
from thermocline.activity.predictor import Predictor
from thermocline.files.formats import F16, F32
from thermocline.files.metadata import Metadata
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.weight import Weight

Tensor = torch.Tensor


@dataclass(frozen=True)
class Source:
    """A model that is in memory only. `heat` (n_layer, n_ff) is how often each neuron fired."""

    metadata: Metadata
    weights: Mapping[str, Weight]
    predictor: Predictor
    heat: npt.NDArray[np.float32]
    kind: str = "gguf"
    path: Path = field(default=Path("synthetic"))
    fingerprint: str = "synthetic"

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, without the predictor."""
        return sum(weight.nbytes for weight in self.weights.values())


@torch.inference_mode()
def synthetic(shape: Shape, active: float, seed: int, device: torch.device) -> Source:
    """A ReGLU model in F16 whose neurons fire `active` of the time on average."""
    return _Drawing(shape, active, seed, device).model()


class _Drawing:
    def __init__(self, shape: Shape, active: float, seed: int, device: torch.device) -> None:
        self.shape, self.active, self.device = shape, active, device
        self.random = torch.Generator(device).manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.u = _unit(self._normal(1, shape.n_embd))[0]
        self.weights: dict[str, Weight] = {}
        self.layers: list[PredictorLayer] = []
        self.thresholds: list[float] = []
        self.shares: list[float] = []
        self.heat: list[npt.NDArray[np.float32]] = []
        embedding = (_unit(self._off_u(self._normal(shape.n_vocab, shape.n_embd))) + self.u) * shape.n_embd**0.5
        tokens = torch.from_numpy(self.rng.integers(0, shape.n_vocab, CALIBRATION_TOKENS)).to(device)
        self.x = embedding[tokens]
        self._keep("token_embd.weight", embedding)

    def model(self) -> Source:
        s = self.shape
        for layer in range(s.n_layer):
            self._layer(f"blk.{layer}.")
        self._keep("output_norm.weight", torch.ones(1, s.n_embd))
        self._keep("output.weight", self._normal(s.n_vocab, s.n_embd) / s.n_embd**0.5)
        predictor = Predictor(tuple(self.layers), tuple(self.thresholds), tuple(self.shares), {"made_by": "synthetic"})
        header: Any = {
            k: v.item() if isinstance(v, np.generic) else v for k, v in metadata("synthetic", s, self.active).items()
        }
        return Source(Metadata("synthetic", header), self.weights, predictor, np.stack(self.heat))

    def _layer(self, blk: str) -> None:
        s = self.shape
        spread, share, n_kv = s.n_embd**-0.5, RESIDUAL_SHARE * s.n_layer**-0.5, s.n_head_kv * s.head_dim
        q, k, v = (self._normal(rows, s.n_embd) * spread for rows in (s.n_embd, n_kv, n_kv))
        o = self._off_u((self._normal(s.n_embd, s.n_embd) * (spread * share)).T).T
        self.x += self._attention(_norm(self.x), q, k, v) @ o.T
        h = _norm(self.x)
        rank = min(GATE_RANK, s.n_embd // 2)
        basis = torch.linalg.qr(self._off_u(self._normal(rank, s.n_embd)).T.double())[0].T.float()
        a = self._normal(s.n_ff, rank) * rank**-0.5
        ratio = (h @ basis.T) @ a.T / (h @ self.u)[:, None]
        wanted = torch.from_numpy(np.sort(frequencies(s.n_ff, self.active, self.rng))[::-1].copy()).to(self.device)
        place = ((1 - wanted) * len(h)).long().clamp(0, len(h) - 1)
        b = ratio.sort(dim=0).values[place, torch.arange(s.n_ff, device=self.device)]
        gate, up = a @ basis - torch.outer(b, self.u), self._normal(s.n_ff, s.n_embd) * spread
        down = self._off_u(self._normal(s.n_ff, s.n_embd) * (share * s.n_ff**-0.5))
        fired = (h @ gate.T).relu()
        self._predict(basis, a, b, fired > 0)
        self.x += (fired * (h @ up.T)) @ down
        for name in ("attn_norm", "ffn_norm"):
            self._keep(f"{blk}{name}.weight", torch.ones(1, s.n_embd))
        for name, value in {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": o}.items():
            self._keep(f"{blk}{name}.weight", value)
        for name, value in {"ffn_gate": gate, "ffn_up": up, "ffn_down_t": down}.items():
            self._keep(f"{blk}{name}.weight", value)

    def _predict(self, basis: Tensor, a: Tensor, b: Tensor, fired: Tensor) -> None:
        fc1 = torch.cat([basis, -basis, self.u[None]]).half()
        fc2 = torch.cat([a, -a, -b[:, None]], dim=1).half()
        scores = (self.x @ fc1.float().T).relu() @ fc2.float().T
        ordered = scores[fired].sort().values
        threshold = float(ordered[int(MISSED * len(ordered))]) if len(ordered) else 0.0
        self.layers.append(PredictorLayer(_weight("fc1", fc1), _weight("fc2", fc2)))
        self.thresholds.append(threshold)
        self.shares.append(float((scores >= threshold).float().mean()))
        self.heat.append(np.sort(fired.float().mean(dim=0).cpu().numpy())[::-1].copy())

    def _attention(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, n = self.shape, len(h)
        pairs = torch.arange(0, s.head_dim, 2, device=self.device, dtype=torch.float32)
        angle = torch.outer(
            torch.arange(n, device=self.device, dtype=torch.float32), ROPE_BASE ** (-pairs / s.head_dim)
        )
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def heads(w: Tensor, count: int) -> Tensor:
            return (h @ w.T).view(n, count, s.head_dim)

        def turned(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.view(*x.shape[:2], -1, 2)) * turn
            return torch.view_as_real(pairs).flatten(2).transpose(0, 1)

        group = s.n_head // s.n_head_kv
        queries = turned(heads(q, s.n_head))
        keys = turned(heads(k, s.n_head_kv)).repeat_interleave(group, dim=0)
        values = heads(v, s.n_head_kv).transpose(0, 1).repeat_interleave(group, dim=0)
        mixed = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return mixed.transpose(0, 1).reshape(n, -1)

    def _keep(self, name: str, value: Tensor) -> None:
        self.weights[name] = _weight(name, value.float() if len(value) == 1 else value.half())

    def _normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.random, device=self.device)

    def _off_u(self, rows: Tensor) -> Tensor:
        return rows - torch.outer(rows @ self.u, self.u)


def _weight(name: str, value: Tensor) -> Weight:
    """A tensor in its own type, float32 or float16, on the host: in numpy's memory, whose pages are huge."""
    fmt, kind = (F32, np.float32) if value.dtype is torch.float32 else (F16, np.float16)
    data: npt.NDArray[Any] = np.empty(tuple(value.shape), kind)
    torch.from_numpy(data).copy_(value)
    return Weight(name, fmt, (len(value), value.shape[1]), data.view(np.uint8))


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _norm(x: Tensor) -> Tensor:
    normal: Tensor = x / (x.square().mean(dim=-1, keepdim=True) + NORM_EPS).sqrt()
    return normal
