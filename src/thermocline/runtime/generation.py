"""From tokens to text: a stream of items, each with its measurements."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from thermocline.config import SamplingSettings
from thermocline.errors import ThermoclineError
from thermocline.runtime.drift import Moved
from thermocline.runtime.engine import Engine
from thermocline.runtime.report import RunReport
from thermocline.runtime.sampler import Sampler
from thermocline.runtime.split import SplitReport, split_report
from thermocline.text.detokenize import Detokenizer, StopMatcher
from thermocline.text.tokenizer import Tokenizer


class FinishReason(StrEnum):
    """Why a generation ended: a stop string or end-of-sequence token, or no room for more tokens."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Item:
    """One generated token.

    `text` is what can be shown now: it may be empty while a character or a possible stop string is unfinished.
    `logprob` is the natural logarithm of the model's own probability; `top` holds the likeliest tokens with
    theirs if `logprobs` asked for them. `seconds` is what the token took to compute. `finish_reason` is set on
    the last item.
    """

    text: str
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    seconds: float
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole text. `tokens` includes an end-of-sequence token if one was generated; `top` is as in the items."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason | None
    report: RunReport


class Stream:
    """Iterates over the items of one generation; computing starts with the first.

    `close` (or leaving a `with` block) stops early and leaves the model usable. `report` tells what was done so
    far, at any time.

    Raises:
        ContextError: the prompt does not fit, before anything is computed.
        SamplingError: a setting does not fit this model.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        settings: SamplingSettings,
        *,
        reuse: bool = False,
        chat: bool = False,
        load_seconds: float = 0.0,
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.finish_reason: FinishReason | None = None
        self._limit = engine.room(prompt, settings.max_tokens)
        self._engine, self._prompt, self._reuse = engine, prompt, reuse
        self._sampler = Sampler(settings, engine.width, engine.n_ctx)
        self._ends = frozenset[int]() if settings.ignore_eos else tokenizer.eos_ids
        self._detokenizer = Detokenizer(tokenizer, continuing=not chat)
        self._stops = StopMatcher(settings.stop)
        self._load_seconds = load_seconds
        self._cached = self._generated = 0
        self._prompt_seconds = self._first_seconds = self._decode_seconds = 0.0
        self._bytes_read, self._fired, self._selected = 0.0, 0, 0
        self._spent = engine.account
        self._moved: Moved | None = None
        self._items = self._run()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        self._items.close()

    @property
    def report(self) -> RunReport:
        """The measurements so far."""
        return RunReport(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self._cached,
            prompt_seconds=self._prompt_seconds,
            first_token_seconds=self._first_seconds,
            generated_tokens=self._generated,
            decode_tokens=max(self._generated - 1, 0),
            decode_seconds=self._decode_seconds,
            bytes_read=self._bytes_read,
            fired=self._fired,
            selected=self._selected,
            neurons=self._engine.traffic.neurons,
            mode=self._engine.mode,
            predictor_bytes=self._engine.traffic.predictor,
            load_seconds=self._load_seconds,
            seed=self._sampler.seed,
            split=self._split(),
            moved=self._moved,
        )

    def _split(self) -> SplitReport | None:
        plan = self._engine.plan
        if plan is None:
            return None
        return split_report(
            plan,
            self._spent,
            fired=self._fired,
            bytes_read=self._bytes_read,
            seconds=self._decode_seconds,
            curve=self._engine.curve,
            over=self._engine.over,
        )

    def collect(self) -> Generation:
        """Run to the end and put the items together (those that are still to come)."""
        items = list(self)
        return Generation(
            text="".join(item.text for item in items),
            tokens=tuple(item.token for item in items),
            logprobs=tuple(item.logprob for item in items),
            top=tuple(item.top for item in items),
            finish_reason=self.finish_reason,
            report=self.report,
        )

    def _run(self) -> Generator[Item, None, None]:
        engine = self._engine
        ticket = engine.begin()
        self._moved = engine.moved
        try:
            began = time.perf_counter()
            logits, self._cached = engine.prefill(self._prompt, reuse=self._reuse)
            self._prompt_seconds = time.perf_counter() - began
            self._sampler.accept(self._prompt)
            while True:
                sampled = self._sampler.sample(logits)
                text = self._advance(sampled.token)
                self._account(seconds := time.perf_counter() - began)
                yield Item(text, sampled.token, sampled.logprob, sampled.top, seconds, self.finish_reason)
                if self.finish_reason:
                    return
                began = time.perf_counter()
                logits = engine.step(sampled.token, ticket)
        except ThermoclineError:
            engine.forget(ticket)
            raise

    def _advance(self, token: int) -> str:
        """The text that `token` brings, and whether it ends the generation."""
        self._generated += 1
        if token in self._ends:
            self.finish_reason = FinishReason.STOP
            return self._flush()
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.matched is not None:
            self.finish_reason = FinishReason.STOP
        elif self._generated == self._limit:
            self.finish_reason = FinishReason.LENGTH
            text += self._flush()
        return text

    def _flush(self) -> str:
        """What detokenizer and stop strings held back."""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()

    def _account(self, seconds: float) -> None:
        if self._generated == 1:
            self._first_seconds = seconds
        else:
            self._decode_seconds += seconds
            self._engine.account.wall += seconds
        engine = self._engine
        self._bytes_read, self._fired, self._selected = engine.bytes_read, engine.fired, engine.selected
        self._spent = engine.account
