"""A sequence on a GPU: rehearsed at loading, held to its budget, and out of memory in one request at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch

from thermocline.config import CrossingKind
from thermocline.errors import BudgetError, HardwareError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.model.network import Transformer
from thermocline.model.observers import Counter
from thermocline.ops.contract import Arrays, FfnWork
from thermocline.ops.cuda.ops import FEW, CudaOps
from thermocline.ops.factory import interpreted
from thermocline.placement.ledger import Purpose
from thermocline.runtime.captured import CapturedStep
from thermocline.runtime.placing import Placing
from thermocline.runtime.sequence import Step, Tokens, TransformerSequence

FAILURES: Final[tuple[type[Exception], ...]] = tuple(
    found for name in ("AcceleratorError",) if (found := getattr(torch, name, None)) is not None
)
"""What torch raises where the device itself failed; older versions raise no class of their own."""
TRITON: Final = "Triton Error"
"""Begins the message of what Triton raises there, which is a RuntimeError as any."""
REMEDY: Final = "lower --vram-budget or --ubatch-size"


class GpuSequence(TransformerSequence):
    """A sequence, parts of which are on a GPU.

    Single tokens are replayed where nothing is on disk; prompts take the plain way, over the same cache. What is
    replayed is not counted.
    """

    def __init__(
        self,
        transformer: Transformer,
        cache: KVCache,
        ubatch: int,
        arrays: Mapping[Tier, Arrays] | None = None,
        counter: Counter | None = None,
    ) -> None:
        super().__init__(transformer, cache, ubatch, arrays, counter=counter)
        self.captured: CapturedStep | None = None
        self.look: Callable[[], int] | None = None
        """Tells how many bytes the GPU held beyond its budget; asked once, after the first prompt."""

    def step(self, tokens: Tokens, start: int, *, logits: bool) -> Step:
        """See the protocol.

        Raises:
            BudgetError: the GPU's memory ran out; the next request may succeed.
            HardwareError: the CPU's side of a token failed, or the GPU itself.
        """
        with told(f"this request ran out of it; {REMEDY}"):
            if self.captured is None or len(tokens) > 1 or not logits:
                self.rest()
                done = super().step(tokens, start, logits=logits)
                if logits and self.look is not None:
                    self.over, self.look = self.look(), None
                return done
            self.tally.clear()
            row, hot, cold = self.captured.run(int(tokens[0]), start)
        return Step(row, FfnWork(*(a + b for a, b in zip(hot, cold, strict=True))), hot, counted=False)

    def rest(self) -> None:
        """Return when nobody computes with the neurons any more.

        Raises:
            HardwareError: the CPU's side goes on for too long with what a request gave up.
        """
        if self.captured is not None:
            self.captured.rest()

    def rehearse(self) -> None:
        """Run what is the GPU's of the longest prompt and of a token, at the end of the context and on nothing.

        Kernels are compiled then, and all scratch memory is as large as it will ever be. Short prompts, which are
        predicted, take other scratch than long ones, and a few tokens take kernels for as many.
        """
        few = range(1, 1 if interpreted() else FEW + 1)  # where kernels are interpreted, nothing is compiled
        lengths = {self.ubatch, self._transformer.scored, 1, *few}
        for tokens in sorted({max(1, min(self.ubatch, length)) for length in lengths}, reverse=True):
            start = self._cache.n_ctx - tokens
            self._transformer.rehearse(Tier.VRAM, tokens, start, self._cache, self._workspace)


def sequence_of(
    transformer: Transformer,
    cache: KVCache,
    ubatch: int,
    arrays: Mapping[Tier, Arrays],
    way: CrossingKind,
    counter: Counter | None = None,
) -> tuple[GpuSequence, list[str]]:
    """The fastest sequence that this placement allows, and what there is to say about it.

    Raises:
        UsageError: a way of crossing was asked for that does not work.
        BudgetError: the GPU's memory has no room for what the kernels need.
        HardwareError: the GPU itself failed.
    """
    notices: list[str] = []
    sequence = GpuSequence(transformer, cache, ubatch, arrays, counter)
    with told(REMEDY):
        sequence.rehearse()  # before a graph is captured, which goes on using the scratch of its time
    try:
        captured = sequence.captured = CapturedStep(transformer, cache, way=way, arrays=arrays)
        notices += [captured.notice] if captured.notice is not None else []
    except UsageError as error:
        if way is not CrossingKind.AUTO:
            raise
        notices.append(f"decoding takes the plain way: {error}")
    except RuntimeError as error:
        if _is_full(error):
            raise _full(REMEDY, error) from error
        if way is not CrossingKind.AUTO:
            raise UsageError(f"decoding cannot be captured here: {_line(error)}; use --crossing auto") from error
        notices.append(f"decoding takes the plain way, as it cannot be captured here: {_line(error)}")
    return sequence, notices


@contextmanager
def told(remedy: str) -> Iterator[None]:
    """Within, what torch and Triton raise of the GPU becomes an error of ours.

    Raises:
        BudgetError: its memory ran out, for which there is this remedy.
        HardwareError: it failed.
    """
    try:
        yield
    except RuntimeError as error:
        if _is_full(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise _full(remedy, error) from error
        if isinstance(error, FAILURES) or str(error).startswith(TRITON):
            raise HardwareError(f"the GPU failed: {_line(error)}; restart the program") from error
        raise


def _is_full(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (said.startswith(TRITON) and "out of memory" in said)


def _full(remedy: str, error: Exception) -> BudgetError:
    return BudgetError(Tier.VRAM, 0, f"{remedy} ({error})")


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def beyond(placing: Placing) -> int:
    """Bytes that the GPU has held beyond its budget by the driver's account and torch's."""
    memory = placing.memory
    ops, budget = memory.devices[Tier.VRAM].ops, memory.ledger.budgets.get(Tier.VRAM)
    return max(0, ops.held_bytes() - budget) if isinstance(ops, CudaOps) and budget is not None else 0


def excess(placing: Placing) -> int:
    """Put the kernels' scratch into the ledger, as large as the rehearsal made it, and the host's memory that is pinned
    for the GPU; bytes beyond the budget, 0 if none.

    By the driver's account and torch's, which count what the ledger cannot know, or by the ledger's with all that the
    plan sets aside.

    Raises:
        BudgetError: the host's budget has no room for what is pinned.
    """
    memory = placing.memory
    ops, budget = memory.devices[Tier.VRAM].ops, memory.ledger.budgets.get(Tier.VRAM)
    if budget is None or not isinstance(ops, CudaOps):
        return 0
    memory.arenas[Tier.RAM].claim(ops.streams.pinned_bytes, Purpose.STAGING)
    over = max(ops.held_bytes(), memory.ledger.used(Tier.VRAM) + ops.scratch.nbytes) - budget
    if over <= 0:
        memory.arenas[Tier.VRAM].claim(ops.scratch.nbytes, Purpose.ACTIVATIONS)
        over = placing.unclaimed(Tier.VRAM) + memory.ledger.used(Tier.VRAM) - budget
    return max(0, over)
