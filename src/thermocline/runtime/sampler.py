"""Choosing the next token from its logits."""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.random  # here, before a model is loaded: while it is imported, an interrupt would be lost in it
import numpy.typing as npt

from thermocline.config import SamplingSettings
from thermocline.errors import NumericalError, SamplingError

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

FIRST_LOOK = 1024
"""Candidates sorted at first where only top-p cuts; the set seldom needs more, and a full sort of 128k costs 10 ms."""

DRAWN_BITS = 53
"""Of a seed that is drawn: JavaScript and jq read no more of a number than that."""


class Sampled(NamedTuple):
    """A chosen token, its log probability before any setting changed it, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """One sequence's sampler: settings, random generator and the tokens seen lately.

    Repeat penalty as in CTRL (Keskar et al., 2019) with llama.cpp's rule for negative logits; presence and
    frequency as in OpenAI's API; top-p by Holtzman et al., 2020; min-p by Nguyen et al., 2024. The same
    settings, seed and logits give the same tokens.

    Args:
        settings: the chain's settings.
        width: entries of a logits row.
        n_ctx: tokens that a `repeat_last_n` of -1 stands for.

    Raises:
        SamplingError: a logit bias names a token that the model does not have.
    """

    def __init__(self, settings: SamplingSettings, width: int, n_ctx: int) -> None:
        for token in settings.logit_bias:
            if token >= width:
                raise SamplingError(f"logit_bias names token {token}; this model has tokens 0 to {width - 1}")
        self.settings = settings
        self.seed = settings.seed if settings.seed >= 0 else secrets.randbits(DRAWN_BITS)
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._biased = np.fromiter(settings.logit_bias.keys(), np.intp)
        self._bias = np.fromiter(settings.logit_bias.values(), np.float32)
        self._recent: deque[int] = deque(maxlen=n_ctx if settings.repeat_last_n < 0 else settings.repeat_last_n)
        self._seen: Counter[int] = Counter()
        self._work = np.empty(width, np.float32)
        self._scratch = np.empty(width, np.float32)

    def accept(self, tokens: Iterable[int]) -> None:
        """Let the penalties see `tokens`."""
        if not self._recent.maxlen:
            return
        for token in tokens:
            if len(self._recent) == self._recent.maxlen:
                oldest = self._recent[0]
                self._seen[oldest] -= 1
                if not self._seen[oldest]:
                    del self._seen[oldest]
            self._recent.append(token)
            self._seen[token] += 1

    def sample(self, logits: Logits) -> Sampled:
        """Choose a token from a row of logits (width), which stays as it is, and `accept` it.

        Raises:
            NumericalError: a logit is not finite.
            SamplingError: the logit bias forbids every token.
        """
        total = self._log_total(logits)
        np.copyto(self._work, logits)
        self._work[self._biased] += self._bias
        self._penalize()
        token = int(self._work.argmax()) if self.settings.temperature == 0 else self._draw()
        if self._work[token] == -math.inf:
            raise SamplingError("logit_bias forbids every token; leave at least one")
        self.accept((token,))
        return Sampled(token, float(logits[token]) - total, self._top(logits, total) if self.settings.logprobs else ())

    def _log_total(self, logits: Logits) -> float:
        """The logarithm of the sum of the logits' exponentials."""
        largest = float(logits.max())
        if not (math.isfinite(largest) and math.isfinite(float(logits.min()))):
            bad = np.flatnonzero(~np.isfinite(logits))
            raise NumericalError(
                f"{len(bad)} of {len(logits)} logits are not finite (the first is token {bad[0]}'s); "
                "the model's weights are damaged or overflow: check the file, or try --ops reference"
            )
        np.subtract(logits, largest, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        return largest + math.log(float(self._scratch.sum(dtype=np.float64)))

    def _top(self, logits: Logits, total: float) -> tuple[tuple[int, float], ...]:
        ids = self._likeliest(logits, self.settings.logprobs)
        return tuple((int(i), float(logits[i]) - total) for i in ids)

    def _penalize(self) -> None:
        s = self.settings
        if not self._seen or (s.repeat_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0):
            return
        ids = np.fromiter(self._seen.keys(), np.intp)
        seen = np.fromiter(self._seen.values(), np.float32)
        values = self._work[ids]
        # Dividing a negative logit would make its token likelier.
        values = np.where(values > 0, values / np.float32(s.repeat_penalty), values * np.float32(s.repeat_penalty))
        self._work[ids] = values - np.float32(s.presence_penalty) - seen * np.float32(s.frequency_penalty)

    def _draw(self) -> int:
        ids, share = self._candidates()
        keep = share >= self.settings.min_p * share.max()
        ids = ids[keep]
        logits = self._work[ids].astype(np.float64)
        with np.errstate(over="ignore"):  # a temperature near 0 makes -inf of all but the likeliest: its meaning
            weights = np.exp((logits - logits.max()) / self.settings.temperature)
        possible = weights > 0
        ids, cumulative = ids[possible], weights[possible].cumsum()
        place = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def _candidates(self) -> tuple[Ids, npt.NDArray[np.float64]]:
        """Ids that pass top-k and top-p, with probabilities up to a common factor."""
        largest = self._work.max()
        if largest == -math.inf:
            raise SamplingError("logit_bias forbids every token; leave at least one")
        width, s = len(self._work), self.settings
        if 0 < s.top_k < width:
            ids = self._likeliest(self._work, s.top_k)
            share = np.exp(self._work[ids].astype(np.float64) - largest)
            return self._nucleus(ids, share, float(share.sum()))
        np.subtract(self._work, largest, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        if s.top_p == 1:
            return np.arange(width), self._scratch.astype(np.float64)
        total = float(self._scratch.sum(dtype=np.float64))
        look = min(FIRST_LOOK, width)
        while True:
            ids = self._likeliest(self._work, look)
            share = np.exp(self._work[ids].astype(np.float64) - largest)
            if look == width or share.sum() >= s.top_p * total:
                return self._nucleus(ids, share, total)
            look = min(look * 8, width)

    def _nucleus(self, ids: Ids, share: npt.NDArray[np.float64], total: float) -> tuple[Ids, npt.NDArray[np.float64]]:
        """The first of `ids`, sorted likeliest first, whose shares reach top-p of the total."""
        if self.settings.top_p == 1:
            return ids, share
        count = int(share.cumsum().searchsorted(self.settings.top_p * total)) + 1
        return ids[:count], share[:count]

    def _likeliest(self, values: Logits, count: int) -> Ids:
        """Ids of the `count` largest values, largest first, ties to the lowest id."""
        width = len(values)
        if count < width:
            np.copyto(self._scratch, values)
            self._scratch.partition(width - count)
            ids: npt.NDArray[Any] = np.flatnonzero(values >= self._scratch[width - count])
        else:
            ids = np.arange(width)
        return ids[np.argsort(-values[ids], kind="stable")][:count]
