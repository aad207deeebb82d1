"""A network that says what it is told to, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from thermocline.config import Mode
from thermocline.files.open import open_model
from thermocline.ops.contract import FfnWork
from thermocline.runtime.engine import Engine
from thermocline.runtime.sequence import Step
from thermocline.runtime.traffic import Traffic
from thermocline.text.load import load_tokenizer
from thermocline.text.tokenizer import Tokenizer

TRAFFIC = Traffic(trunk=1000, gate_row=0.0, up_row=10.0, down_row=20.0, kv_position=2.0, windows=(0, 3), neurons=50)
WORK = FfnWork(0, 50, 5, 4)


class FakeSequence:
    """Chooses the next token from the tokens before it; fails where a real network would read garbage.

    `choose` gives a token id, or a row of logits. `steps` records (start, count, logits wanted) of every step.
    """

    over = 0

    def __init__(self, choose: Callable[[Sequence[int]], int | np.ndarray], n_vocab: int, n_ctx: int, ubatch: int):
        self.n_vocab, self.n_ctx, self.ubatch = n_vocab, n_ctx, ubatch
        self.choose = choose
        self.cells: list[int] = []
        self.steps: list[tuple[int, int, bool]] = []
        self._logits = np.zeros(n_vocab, np.float32)

    def step(self, tokens: np.ndarray, start: int, *, logits: bool) -> Step:
        assert 1 <= len(tokens) <= self.ubatch
        assert start <= len(self.cells)
        assert start + len(tokens) <= self.n_ctx
        self.cells[start:] = tokens.tolist()
        self.steps.append((start, len(tokens), logits))
        if not logits:
            return Step(None, WORK)
        chosen = self.choose(self.cells)
        self._logits[:] = 0.0 if isinstance(chosen, int) else chosen
        if isinstance(chosen, int):
            self._logits[chosen] = 20.0
        return Step(self._logits, WORK)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(open_model(tiny_model))


@pytest.fixture
def saying(tokenizer: Tokenizer) -> Callable[..., tuple[Engine, FakeSequence]]:
    """An engine that answers a prompt of `skip` tokens with the bytes or ids given, then repeats the last one."""

    def make(
        answer: str | bytes | Sequence[int], *, skip: int = 1, n_ctx: int = 64, ubatch: int = 8
    ) -> tuple[Engine, FakeSequence]:
        ids = list(answer.encode() if isinstance(answer, str) else answer)
        fake = FakeSequence(lambda cells: ids[min(len(cells) - skip, len(ids) - 1)], tokenizer.size, n_ctx, ubatch)
        return Engine(fake, TRAFFIC, tokenizer.size, Mode.EXACT), fake

    return make
