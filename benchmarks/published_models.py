"""Published shapes and sparsity of the models that PowerInfer's paper runs, and the temperatures they imply.

Sizes are those of the models' public configurations. Sparsity and locality are PowerInfer's (arXiv 2312.12456v2):
share of active FFN neurons from tables 1 and 3, neurons that own 80 % of the activations from figure 4, predictor
sizes from table 6. Nothing here is fitted to a published speed.

Only two shares are published for a model, and only for some models: of a typical layer's neurons, and of the whole
model's. Temperatures follow a power law over ranks, p ~ (rank + 64)^-a at most 0.97, whose exponent meets the first;
layer means rise geometrically with depth (the paper: early layers fire least), by a ramp that meets the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import BlockFormat
from thermocline.placement.footprint import Footprint

Floats = npt.NDArray[np.float64]

COVERED = 0.8
HOTTEST = 0.97
DENSEST = 0.9
"""Largest mean of a layer."""
OFFSET = 64
AVERAGE_PREDICTOR = 0.0709
"""Predictor parameters over model parameters, averaged in table 6; for models it does not list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model's sizes, active share of its FFN neurons, and shares of neurons that own 80 % of the activations.

    `like` names the model whose locality stands in where none was published.
    """

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    gated: bool
    active: float
    per_layer: float
    whole: float
    tied: bool = False
    predictor: float = AVERAGE_PREDICTOR
    like: str = ""

    @property
    def parameters(self) -> int:
        """Weights without predictors and norms."""
        head_dim = self.n_embd // self.n_head
        attention = self.n_embd * (2 * self.n_embd + 2 * self.n_head_kv * head_dim)
        ffn = (2 + self.gated) * self.n_embd * self.n_ff
        return self.n_layer * (attention + ffn) + self.n_vocab * self.n_embd * (1 if self.tied else 2)

    def footprint(self, fmt: BlockFormat, *, predictors: bool = True) -> Footprint:
        """The model's bytes with all matrices in one format; predictor ranks are whole blocks of 32."""
        rank = self.predictor * self.parameters / (self.n_layer * (self.n_embd + self.n_ff))
        return Footprint.of_sizes(
            f"{self.name} {fmt.name}",
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_ff=self.n_ff,
            n_vocab=self.n_vocab,
            n_head=self.n_head,
            n_head_kv=self.n_head_kv,
            head_dim=self.n_embd // self.n_head,
            gated=self.gated,
            fmt=fmt,
            tied=self.tied,
            predictor_rank=round(rank / 32) * 32 if predictors else 0,
        )


LLAMA_70B = Published(
    name="ReGLU LLaMA-2-70B", n_layer=80, n_embd=8192, n_ff=28672, n_vocab=32000, n_head=64, n_head_kv=8, gated=True,
    active=0.18, per_layer=0.43, whole=0.26, predictor=0.0808,
)  # fmt: skip
LLAMA_13B = replace(
    LLAMA_70B, name="ReGLU LLaMA-2-13B", n_layer=40, n_embd=5120, n_ff=13824, n_head=40, n_head_kv=40, active=0.22,
    predictor=AVERAGE_PREDICTOR, like="ReGLU LLaMA-2-70B",
)  # fmt: skip
LLAMA_7B = replace(LLAMA_13B, name="ReGLU LLaMA-2-7B", n_layer=32, n_embd=4096, n_ff=11008, n_head=32, n_head_kv=32,
                   active=0.30)  # fmt: skip
BAMBOO_7B = replace(LLAMA_7B, name="Bamboo-7B", n_ff=14336, n_head_kv=8, active=0.10)
OPT_30B = Published(
    name="OPT-30B", n_layer=48, n_embd=7168, n_ff=28672, n_vocab=50272, n_head=56, n_head_kv=56, gated=False,
    active=0.03, per_layer=0.26, whole=0.17, tied=True,
)  # fmt: skip
OPT_66B = replace(OPT_30B, name="OPT-66B", n_layer=64, n_embd=9216, n_ff=36864, n_head=72, n_head_kv=72,
                  predictor=0.0488, like="OPT-30B")  # fmt: skip
OPT_175B = replace(OPT_66B, name="OPT-175B", n_layer=96, n_embd=12288, n_ff=49152, n_head=96, n_head_kv=96)
FALCON_40B = Published(
    name="ReLU Falcon-40B", n_layer=60, n_embd=8192, n_ff=32768, n_vocab=65024, n_head=128, n_head_kv=8, gated=False,
    active=0.05, per_layer=0.26, whole=0.17, predictor=0.0868, like="OPT-30B",
)  # fmt: skip
SWIGLU_13B = replace(LLAMA_13B, name="SwiGLU LLaMA-2-13B", active=0.57, per_layer=0.69, whole=0.75,
                     like="SwiGLU LLaMA-2-70B")  # fmt: skip
YI_34B = replace(SWIGLU_13B, name="Yi-34B", n_layer=60, n_embd=7168, n_ff=20480, n_vocab=64000, n_head=56, n_head_kv=8,
                 active=0.47)  # fmt: skip


@cache
def temperatures(model: Published) -> Floats:
    """(n_layer, n_ff), hottest first, with the published means and localities as near as the law allows."""
    every = np.arange(OFFSET, OFFSET + model.n_ff, dtype=np.float64)
    some = every[::16]
    exponent = _rising(lambda a: -_coverage(_law(some, a, model.active)), 0.0, 4.0, -model.per_layer)
    ramp = _rising(lambda s: -_coverage(_layers(model, some, exponent, s)), 0.0, 8.0, -model.whole)
    return _layers(model, every, exponent, ramp)


def localities(model: Published) -> tuple[float, float, float]:
    """Mean, typical layer's and whole model's share that the temperatures really have."""
    p = temperatures(model)
    return float(p.mean()), _coverage(p[model.n_layer // 2]), _coverage(p)


def _layers(model: Published, ranks: Floats, exponent: float, ramp: float) -> Floats:
    weights = np.exp(ramp * (np.arange(model.n_layer) / max(1, model.n_layer - 1) - 0.5))
    scale = _rising(lambda c: float(np.minimum(weights * c, DENSEST).mean()), 0.0, 1e3, model.active, 60)
    return np.stack([_law(ranks, exponent, mean) for mean in np.minimum(weights * scale, DENSEST)])


def _law(ranks: Floats, exponent: float, mean: float) -> Floats:
    """One layer's temperatures with that mean."""
    law: Floats = ranks**-exponent
    scale = _rising(lambda c: float(np.minimum(law * 10**c, HOTTEST).mean()), -6.0, 12.0, mean, 40)
    return np.minimum(law * 10**scale, HOTTEST)


def _coverage(p: Floats) -> float:
    """Share of the neurons, hottest first, that own 80 % of the activations."""
    sums = np.cumsum(-np.sort(-p.ravel()))
    return float(np.searchsorted(sums, COVERED * sums[-1]) + 1) / p.size


def _rising(function: Callable[[float], float], low: float, high: float, wanted: float, rounds: int = 14) -> float:
    """Where a rising function meets `wanted`, by bisection; the nearer end if it does not."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return (low + high) / 2
