"""What fires while a model runs: counted step by step, kept as an activity, and how hot that makes each neuron."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.activity.statistics import Activity
from thermocline.activity.store import load_activity, save_activity
from thermocline.errors import OutputError, printable
from thermocline.files.atomic import existing_mode, explained
from thermocline.model.feed_forward import Counts

Floats = npt.NDArray[np.float64]

HALF_LIFE = 2048.0
"""Tokens after which what was counted weighs half as much."""
PRIOR_TOKENS = 256.0
"""Tokens that the temperatures known before weigh as much as."""


class FiringCounts:
    """Counts of one model, by layer and the file's number of each neuron; see `model.network.Counter`.

    `lately` are those since the last `forget_lately`.
    """

    def __init__(self, n_layer: int, n_ff: int) -> None:
        self.fired = np.zeros((n_layer, n_ff), np.int64)
        self.lately = np.zeros((n_layer, n_ff), np.int64)
        self.tokens = 0
        self.tokens_lately = 0
        self._fading = np.zeros((n_layer, n_ff))
        self._fading_tokens = 0.0

    def ffn_fired(self, layer: int, fired: Counts) -> None:
        """See the protocol."""
        self.lately[layer] += fired

    def end_step(self, tokens: int) -> None:
        """All layers of a step of so many tokens are counted."""
        self.tokens += tokens
        self.tokens_lately += tokens

    def forget_lately(self) -> None:
        """Let what was counted lately join the rest, which counts the less the older it is."""
        faded = 0.5 ** (self.tokens_lately / HALF_LIFE)
        self._fading = self._fading * faded + self.lately
        self._fading_tokens = self._fading_tokens * faded + self.tokens_lately
        self.fired += self.lately
        self.lately[...] = 0
        self.tokens_lately = 0

    def temperatures(self, before: Floats | None) -> Floats:
        """How often each neuron fires (n_layer, n_ff): what was counted, and what was known before."""
        counted, tokens = self._fading + self.lately, self._fading_tokens + self.tokens_lately
        if before is None:
            return counted / max(tokens, 1.0)
        mixed: Floats = (before * PRIOR_TOKENS + counted) / (PRIOR_TOKENS + tokens)
        return mixed

    def activity(self, fingerprint: str, name: str, mode: str) -> Activity:
        """Everything that was counted, as one run."""
        counted = Activity.from_counts(fingerprint, name, self.fired + self.lately, self.tokens)
        run = {"id": secrets.token_hex(8), "tokens": self.tokens, "mode": mode, "counted": "while generating"}
        return counted.with_run(run)


def require_addable(path: Path, fingerprint: str, name: str) -> None:
    """Refuse a file to which this model's counts cannot be added.

    Raises:
        FingerprintError: it is another model's.
        ModelFormatError: it is no activity.
        OutputError: no file can be written there.
    """
    existing_mode(path)
    with explained(path):
        path.parent.stat()
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{printable(str(path))}: cannot be written: its folder does not allow it")
    if path.exists():
        load_activity(path).require_model(fingerprint, name)


def add_to(path: Path, counted: Activity) -> None:
    """Write counts to a file, or add them to those that it has.

    Raises:
        OutputError: it could not be written.
        UsageError, FingerprintError, ModelFormatError: what is there by now is of another kind.
    """
    save_activity(load_activity(path).merge(counted, path=path) if path.exists() else counted, path)
