"""What an audit measures: how far a prediction is from exact computing, and whether that is little enough.

Distances are Kullback-Leibler divergences in nats, from what dense computing of the same weights gives. Of the
neurons, each layer answers for itself: its predictor sees exact computing's residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.activity.calibration import Quality
from thermocline.activity.likelihood import Likelihood

Floats = npt.NDArray[np.float64]

MIN_TOKENS: Final = 8192
"""How many tokens an audit reads unless somebody says otherwise; over fewer none passes, nor is it noted."""
MEAN_ENERGY_RECALL: Final = 0.98
WORST_ENERGY_RECALL: Final = 0.95
MEAN_KL: Final = 0.010
TOP_1: Final = 0.95
PERPLEXITY_RATIO: Final = 1.01
SAME_KL: Final = 1e-6
"""Modes that must not differ may differ by so much: what adding up in another order makes."""
MORE_REPEATED: Final = 0.10
MORE_INVALID: Final = 0.01
GRAM: Final = 4
"""Tokens of which a repetition is made."""


class Gate(NamedTuple):
    """A figure and the limit that it must keep."""

    name: str
    found: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the limit is kept; NaN never keeps one."""
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    @property
    def figure(self) -> str:
        """What was found, as it is told: a count whole."""
        return f"{self.found:,}" if isinstance(self.found, int) else f"{self.found:.4g}"

    @property
    def words(self) -> str:
        """Figure, relation and limit."""
        relation = {(True, True): ">=", (True, False): "<=", (False, True): "<", (False, False): ">"}[
            self.passed, self.at_least
        ]
        return f"{self.name} {self.figure} {relation} {self.limit:g}"


@dataclass(slots=True)
class Comparison:
    """Adds up, token by token, how far a mode is from dense."""

    divergences: list[float] = field(default_factory=list)
    agreed: int = 0
    reference: Likelihood = field(default_factory=Likelihood)
    own: Likelihood = field(default_factory=Likelihood)

    def add(self, reference: Floats, own: Floats, target: int | None) -> None:
        """Log probabilities (n_vocab) of a token's successor by dense and by the mode; `target` is what came."""
        # A sum, no inner product: a BLAS library's threads wait for the next one for so long that kernels go without.
        self.divergences.append(max(float((np.exp(reference) * (reference - own)).sum()), 0.0))
        self.agreed += int(reference.argmax() == own.argmax())
        if target is not None:
            targets = np.array([target], np.int32)
            self.reference.add(reference[None], targets)
            self.own.add(own[None], targets)

    def result(self) -> Distance:
        """The figures."""
        count = len(self.divergences)
        if not count:
            return Distance(*[math.nan] * 5)
        kl = np.array(self.divergences)
        ratio = math.exp(min(self.own.mean - self.reference.mean, 700.0)) if self.own.tokens else math.nan
        return Distance(
            float(kl.mean()), float(np.quantile(kl, 0.99)), float(kl.max()), self.agreed / count, ratio
        )  # fmt: skip


class Distance(NamedTuple):
    """How far a mode is from dense: KL divergence in nats, share of equal likeliest tokens, perplexity over dense's."""

    mean_kl: float
    p99_kl: float
    max_kl: float
    top1: float
    perplexity_ratio: float


@dataclass(frozen=True, slots=True)
class Generated:
    """Free texts of one mode: share of 4-grams that came before in the same text, and of characters that are none."""

    repeated: float
    invalid: float

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], texts: Sequence[str]) -> Generated:
        """From several texts and their tokens."""
        grams = repeated = 0
        for ids in tokens:
            found = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
            grams += len(found)
            repeated += len(found) - len(set(found))
        characters = sum(map(len, texts))
        invalid = sum(text.count("\ufffd") for text in texts)
        return cls(repeated / grams if grams else 0.0, invalid / characters if characters else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What an audit found.

    `exact`, `oracle` and `predicted` are distances from dense; the oracle computes exactly the neurons that fire, so
    that it is as far as the mask alone leads, without any error of the predictor. `layers` tell of each layer's
    predictor, `generated` of free texts of exact and predicted. `share` is the predictor's of the model's numbers.
    `stored` says whether it was noted, and `problem` what was in the way of that.
    """

    tokens: int
    exact: Distance
    oracle: Distance
    predicted: Distance
    layers: tuple[Quality, ...]
    generated: tuple[Generated, Generated]
    share: float
    stored: bool = False
    problem: str = ""
    seconds: float = 0.0

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Every figure that must keep a limit."""
        energy = [layer.energy_recall for layer in self.layers]
        exact, predicted = self.generated
        return (
            Gate("energy recall, mean", float(np.mean(energy)), MEAN_ENERGY_RECALL, True),
            Gate("energy recall, worst layer", min(energy), WORST_ENERGY_RECALL, True),
            Gate("KL, mean", self.predicted.mean_kl, MEAN_KL, False),
            Gate("top-1", self.predicted.top1, TOP_1, True),
            Gate("perplexity ratio", self.predicted.perplexity_ratio, PERPLEXITY_RATIO, False),
            Gate("KL of exact, largest", self.exact.max_kl, SAME_KL, False),
            Gate("KL of the oracle mask, largest", self.oracle.max_kl, SAME_KL, False),
            Gate("repetition beyond exact's", predicted.repeated - exact.repeated, MORE_REPEATED, False),
            Gate("invalid text beyond exact's", predicted.invalid - exact.invalid, MORE_INVALID, False),
            Gate("tokens read", self.tokens, MIN_TOKENS, True),
        )

    @property
    def whole(self) -> bool:
        """Whether enough was read to judge by."""
        return self.tokens >= MIN_TOKENS

    @property
    def passed(self) -> bool:
        """Whether all gates are."""
        return all(gate.passed for gate in self.gates)

    @property
    def summary(self) -> str:
        """One line: the figures if it passed, else what did not."""
        if not self.passed:
            return ", ".join(gate.words for gate in self.gates if not gate.passed)
        p = self.predicted
        return (
            f"KL {p.mean_kl:.4f}, top-1 {p.top1:.1%}, perplexity x{p.perplexity_ratio:.4f}, "
            f"energy recall {self.gates[0].found:.3f}, {self.tokens:,} tokens"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON and for the predictor's info; NaN becomes None."""
        names = ("exact", "oracle", "predicted")
        return {
            "passed": self.passed,
            "summary": self.summary,
            "tokens": self.tokens,
            "share_of_parameters": self.share,
            **{name: _known(getattr(self, name)._asdict()) for name in names},
            "generated": dict(zip(("exact", "predicted"), map(asdict, self.generated), strict=True)),
            "gates": [_known({**gate._asdict(), "passed": gate.passed}) for gate in self.gates],
            "layers": [layer.as_dict() for layer in self.layers],
        }


def _known(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in figures.items()}
