"""Prefill, then decode one token at a time."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np

from thermocline.config import Mode
from thermocline.errors import ContextError, UsageError
from thermocline.hardware.machine import ReadCurve
from thermocline.hardware.mapping import Mapping, sheltered
from thermocline.model.feed_forward import Tally
from thermocline.placement.plan import Plan
from thermocline.runtime.below import Below
from thermocline.runtime.drift import Moved, Watch
from thermocline.runtime.sequence import Logits, Sequence, Step, Tokens
from thermocline.runtime.split import Account, SplitReport, split_report
from thermocline.runtime.traffic import Traffic


class Engine:
    """Runs one sequence and remembers which tokens its KV cache holds.

    One generation runs at a time: the one that called `begin` last. Not safe to share between threads.

    Args:
        sequence: the network with its cache.
        traffic: what a step reads from memory.
        width: logits that belong to tokens; the rest of a row is padding and never looked at.
        mode: how the FFN is computed, for reports.
        plan: what places it on several devices; None for one.
        watch: what counts what fires, and moves neurons between two generations; None where nobody does.
        below: what is read from disk.
        files: what the network is mapped from. A step that misses a part of one fails, and so do all after it.
    """

    def __init__(
        self,
        sequence: Sequence,
        traffic: Traffic,
        width: int,
        mode: Mode,
        plan: Plan | None = None,
        watch: Watch | None = None,
        below: Below | None = None,
        files: Listing[Mapping] = (),
    ) -> None:
        self.plan = plan
        self._below = below if below is not None and below.reads else None
        self.watch = watch
        self.moved: Moved | None = None
        self.account = Account()
        self.traffic = traffic
        self.mode = mode
        self.width = min(width, sequence.n_vocab)
        self.n_ctx = sequence.n_ctx
        self.bytes_read = 0.0
        self.fired = self.selected = 0
        self._sequence = sequence
        self._files = tuple(files)
        self._held: list[int] = []
        self._token = np.zeros(1, np.int32)
        self._generation = 0

    def split(self, seconds: float) -> SplitReport | None:
        """What the decode steps since `begin`, which took `seconds`, did by the plan; None without one."""
        if self.plan is None:
            return None
        return split_report(
            self.plan,
            self.account,
            fired=self.fired,
            bytes_read=self.bytes_read,
            seconds=seconds,
            curve=self.curve,
            over=self.over,
        )

    @property
    def over(self) -> int:
        """Bytes that a GPU held beyond its budget in the first prompt."""
        return self._sequence.over

    @property
    def curve(self) -> ReadCurve | None:
        """How fast the disk is that neurons are read from, None where none are or that was not measured."""
        return None if self._below is None else self._below.curve

    def room(self, prompt: Listing[int], max_tokens: int = -1) -> int:
        """How many tokens may follow `prompt`: `max_tokens` (-1: no wish), or what the context leaves.

        Raises:
            ContextError: the prompt leaves no room for a single token.
            UsageError: the prompt is empty.
        """
        if not prompt:
            raise UsageError("the prompt is empty and this model starts no text by itself; give at least one token")
        self.require_room(len(prompt))
        left = self.n_ctx - len(prompt)
        return left if max_tokens < 0 else min(left, max_tokens)

    def require_room(self, tokens: int, *, at_least: bool = False) -> None:
        """Refuse a prompt of so many tokens, or of `at_least` so many.

        Raises:
            ContextError: it leaves no room for a single token.
        """
        if tokens >= self.n_ctx:
            remedy = "shorten the prompt (one token is for the answer) or raise --ctx-size"
            raise ContextError(tokens + 1, self.n_ctx, remedy, at_least=at_least)

    def begin(self) -> int:
        """Start a generation; earlier ones can go no further. Returns the ticket that `step` asks for."""
        self._generation += 1
        self.bytes_read, self.fired, self.selected = 0.0, 0, 0
        self.account = Account()
        self.moved = None if self.watch is None else self.watch.between()
        return self._generation

    def prefill(self, prompt: Listing[int], *, reuse: bool) -> tuple[Logits, int]:
        """Run the prompt; the next token's logits, and how many tokens were in the cache already.

        With `reuse`, the tokens that the cache holds from before are not computed again. Their values may
        differ in the last bits from those of a batch that is cut otherwise; without it, the same prompt
        always gives the same bits.

        Raises:
            HardwareError: a part of the model's files is gone, or cannot be read.
        """
        start = self._common(prompt) if reuse else 0
        del self._held[start:]
        tokens, cached = np.asarray(prompt, np.int32), start
        while True:
            stop = min(start + self._sequence.ubatch, len(tokens))
            with sheltered(self._files):
                step = self._sequence.step(tokens[start:stop], start, logits=stop == len(tokens))
            self._held.extend(prompt[start:stop])
            if self.watch is not None and step.counted:
                self.watch.counts.end_step(stop - start)
            start = stop
            if step.logits is not None:
                return step.logits[: self.width], cached

    def step(self, token: int, ticket: int) -> Logits:
        """Append `token`; the next one's logits (width), overwritten by the next step.

        Raises:
            UsageError: another generation began since the one with this ticket.
            HardwareError: a part of the model's files is gone, or cannot be read.
        """
        if ticket != self._generation:
            raise UsageError("another generation was started on this model; finish one before starting the next")
        position = len(self._held)
        self._token[0] = token
        if self._below is not None:
            self.account.disk.begin(self._below.stats, self._below.uses)
        with sheltered(self._files):
            step = self._sequence.step(self._token, position, logits=True)
        self._held.append(token)
        if self.watch is not None and step.counted:
            self.watch.counts.end_step(1)
        self.bytes_read += self.traffic.step(step.work, position)
        self.fired += step.work.fired
        self.selected += max(step.work.gate_rows, step.work.up_rows)
        if self.plan is not None:
            self.account.add(self._sequence.tally, step.hot, self.traffic.hot(step.hot, position))
        if self._below is not None:
            self.account.disk.end(self._below.stats, self._below.uses)
        assert step.logits is not None
        return step.logits[: self.width]

    def forget(self, ticket: int) -> None:
        """After an error: reuse nothing of what the cache holds, unless another generation owns it by now."""
        if ticket == self._generation:
            self._held.clear()

    def end(self, why: str) -> None:
        """Let go of the network, for good: streams that are left can tell what they did, and fail with `why`."""
        self._held.clear()
        self._files = ()
        if self._below is not None:
            self._below = Below(None, curve=self._below.curve)
        self._sequence = _Ended(self._sequence, why)

    def _common(self, prompt: Listing[int]) -> int:
        """Length of the prefix that prompt and cache share; at least one token is left to be computed."""
        limit = min(len(self._held), len(prompt) - 1)
        return next((i for i in range(limit) if self._held[i] != prompt[i]), limit)


class _Ended:
    """What is left of a sequence whose engine has ended."""

    def __init__(self, sequence: Sequence, why: str) -> None:
        self._why = why
        self.n_ctx, self.n_vocab, self.ubatch = sequence.n_ctx, sequence.n_vocab, sequence.ubatch
        self.tally, self.over = Tally(), sequence.over

    def step(self, tokens: Tokens, start: int, *, logits: bool) -> Step:
        """Raises UsageError."""
        raise UsageError(self._why)
