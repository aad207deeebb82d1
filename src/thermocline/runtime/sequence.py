"""One sequence on a network: the tokens in, the next token's logits out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.memory.kv_cache import KVCache
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import FfnWork

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


class Step(NamedTuple):
    """`logits` (n_vocab) of the last token, overwritten by the next step; None where none were asked for."""

    logits: Logits | None
    work: FfnWork


class Sequence(Protocol):
    """What the engine needs of a network."""

    n_ctx: int
    n_vocab: int
    ubatch: int

    def step(self, tokens: Tokens, start: int, *, logits: bool) -> Step:
        """Run `tokens` (1 to `ubatch`) at positions from `start`; positions before it are cached already."""


class TransformerSequence:
    """A transformer with the cache of one sequence and the workspace of its steps."""

    def __init__(self, transformer: Transformer, cache: KVCache, ubatch: int) -> None:
        self.n_ctx = min(cache.n_ctx, transformer.n_ctx)
        self.n_vocab = transformer.spec.n_vocab
        self.ubatch = min(ubatch, self.n_ctx)
        self._transformer = transformer
        self._cache = cache
        self._workspace = Workspace(transformer.spec, transformer.ops, self.ubatch, 1, scored=transformer.scored)

    def step(self, tokens: Tokens, start: int, *, logits: bool) -> Step:
        """See the protocol."""
        outputs = Outputs.LAST if logits else Outputs.NONE
        segment = Segment(self._cache, start, len(tokens))
        result = self._transformer.step(tokens, (segment,), self._workspace, outputs)
        return Step(self._transformer.ops.to_host(result.logits)[0] if logits else None, result.work)
