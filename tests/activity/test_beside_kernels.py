"""What is counted between two steps leaves the processors to the kernels: no other thread works or waits busily."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from thermocline.activity.accumulator import Accumulator
from thermocline.activity.audit import Comparison
from thermocline.activity.likelihood import log_probabilities
from thermocline.activity.statistics import Activity

RANDOM = np.random.default_rng(8)
VOCABULARY, NEURONS, TOKENS = 32000, 2048, 256


def compare() -> None:
    reference, own = log_probabilities(RANDOM.normal(0, 3, (2, VOCABULARY)).astype(np.float32))
    comparison = Comparison()
    for _ in range(20):
        comparison.add(reference, own, 7)


def count() -> None:
    accumulator = Accumulator(Activity.empty("0" * 64, "m", 2, NEURONS), np.ones((2, NEURONS)))
    hidden = (RANDOM.random((TOKENS, NEURONS)) < 0.1).astype(np.float32)
    accumulator.begin_sequence()
    for layer in range(2):
        accumulator.ffn_hidden(layer, hidden)


def of_others(work: Callable[[], None]) -> float:
    """Processor time of the process's other threads over this one's."""
    own, everything = time.thread_time(), time.process_time()
    work()
    own, everything = time.thread_time() - own, time.process_time() - everything
    return everything / own - 1


@pytest.mark.parametrize("work", [compare, count])
def test_this_thread_alone_works(work: Callable[[], None]) -> None:
    work()
    time.sleep(0.2)  # threads of earlier tests come to rest
    assert min(of_others(work) for _ in range(5)) < 0.2
