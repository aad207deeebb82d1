"""One sequence on a network: the tokens in, the next token's logits out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.model.feed_forward import NOTHING, Tally
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.observers import Counter
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import Arrays, FfnWork
from thermocline.runtime.taped import TapedStep

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


class Step(NamedTuple):
    """`logits` (n_vocab) of the last token, overwritten by the next step; None where none were asked for."""

    logits: Logits | None
    work: FfnWork
    hot: FfnWork = NOTHING
    """The part of the work that was done beside VRAM."""
    counted: bool = True
    """Whether a counter was told what fired, if there is one."""


class Sequence(Protocol):
    """What the engine needs of a network."""

    n_ctx: int
    n_vocab: int
    ubatch: int
    tally: Tally
    """What the last step did, and by component how long it took, if that is measured."""
    over: int
    """Bytes that a GPU held beyond its budget in the first prompt."""

    def step(self, tokens: Tokens, start: int, *, logits: bool) -> Step:
        """Run `tokens` (1 to `ubatch`) at positions from `start`; positions before it are cached already."""


class TransformerSequence:
    """A transformer with the cache of one sequence and the workspace of its steps."""

    over = 0

    def __init__(
        self,
        transformer: Transformer,
        cache: KVCache,
        ubatch: int,
        arrays: Mapping[Tier, Arrays] | None = None,
        *,
        timed: bool = False,
        counter: Counter | None = None,
    ) -> None:
        """`arrays` make the workspace; `counter` is told what fires in every step."""
        self.n_ctx = min(cache.n_ctx, transformer.n_ctx)
        self.n_vocab = transformer.spec.n_vocab
        self.ubatch = min(ubatch, self.n_ctx)
        self.tally = Tally(timed=timed)
        self._transformer = transformer
        self._cache = cache
        self._counter = counter
        self._workspace = transformer.workspace(self.ubatch, 1, observed=counter is not None, arrays=arrays)
        self._taped = None if timed or counter is not None else _taped(transformer, cache, self._workspace)

    def step(self, tokens: Tokens, start: int, *, logits: bool) -> Step:
        """See the protocol."""
        outputs = Outputs.LAST if logits else Outputs.NONE
        segment = Segment(self._cache, start, len(tokens))
        if self._taped is not None and logits and len(tokens) == 1:
            self._transformer.check(tokens, (segment,), self._workspace, outputs)
            return Step(*self._taped.run(int(tokens[0]), start))
        result = self._transformer.step(
            tokens, (segment,), self._workspace, outputs, tally=self.tally, counter=self._counter
        )
        return Step(self._transformer.ops.to_host(result.logits)[0] if logits else None, result.work, result.hot)


def _taped(transformer: Transformer, cache: KVCache, workspace: Workspace) -> TapedStep | None:
    """The step of a single token without Python in it, where it can be had: it makes the same bits."""
    try:
        return TapedStep(transformer, cache, workspace)
    except UsageError:
        return None
