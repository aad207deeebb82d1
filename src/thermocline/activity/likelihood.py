"""What logits say about a text: log probabilities, perplexity with its error, and how far two models are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thermocline.errors import NumericalError

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


def log_probabilities(logits: Logits) -> Floats:
    """Natural logarithms of the softmax of each row (T, n_vocab), in float64.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    highest = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(logits).all():
        raise NumericalError("the model computed NaN or infinite logits; its weights or settings are broken")
    shifted = logits.astype(np.float64) - highest
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@dataclass(slots=True)
class Likelihood:
    """Adds up the negative log likelihood of tokens, in nats, and of its square."""

    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, log_probs: Floats, targets: npt.NDArray[np.int32]) -> None:
        """Score `targets` (T) by the rows that predict them (T, n_vocab)."""
        nll = -log_probs[np.arange(len(targets)), targets]
        self.tokens += len(nll)
        self.total += float(nll.sum())
        self.squares += float((nll * nll).sum())

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exp of the mean."""
        return math.exp(min(self.mean, 700.0))

    @property
    def error(self) -> float:
        """One standard error of the perplexity, as llama.cpp has it: the mean's error times the perplexity."""
        if self.tokens < 2:
            return math.nan
        variance = max(self.squares / self.tokens - self.mean**2, 0.0)
        return math.sqrt(variance / (self.tokens - 1)) * self.perplexity
