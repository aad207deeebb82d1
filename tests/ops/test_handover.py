"""Cold neurons handed over to a native worker, by a device that is simulated."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest

from thermocline.errors import HardwareError
from thermocline.files.formats import F16, Q8_0
from thermocline.files.quantize import quantize
from thermocline.files.weight import Weight
from thermocline.ops.contract import Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.handover import DONE, ColdWorker, Fault, Mailbox

WIDTH, NEURONS = 64, 48
RELU = FfnKind(Activation.RELU, gated=True)


def block(ops: CpuOps, seed: int, fmt=F16) -> NeuronBlock:
    rng = np.random.default_rng(seed)

    def placed():
        values = rng.standard_normal((NEURONS, WIDTH)).astype(np.float32)
        return ops.place(Weight("w", fmt, (NEURONS, WIDTH), quantize(values, fmt)))

    return NeuronBlock(placed(), placed(), placed(), True, RELU, NEURONS)


@pytest.fixture
def ops() -> CpuOps:
    return CpuOps(1)


def make_worker(ops: CpuOps, blocks: list[NeuronBlock], *, patience: float = 20.0, listed: bool = False) -> ColdWorker:
    mailbox = Mailbox.of(lambda shape, dtype: np.zeros(shape, dtype), WIDTH, NEURONS)
    worker = ColdWorker(ops, mailbox, patience)
    for each in blocks:
        worker.add(each, skip_zeros=True, listed=listed)
    mailbox.x[...] = np.random.default_rng(9).standard_normal(WIDTH)
    return worker


def direct(ops: CpuOps, each: NeuronBlock, x: np.ndarray, active: ActiveSet) -> np.ndarray:
    out = np.zeros((1, WIDTH), np.float32)
    ops.ffn(x[None], each, active, out, skip_zeros=True)
    return out[0]


@pytest.mark.parametrize("listed", [False, True])
def test_what_comes_back_is_what_the_ops_compute(ops, listed):
    blocks = [block(ops, 1), block(ops, 2, Q8_0)]
    worker = make_worker(ops, blocks, listed=listed)
    box = worker.mailbox
    active = ActiveSet(np.arange(1, 40, 3, dtype=np.int32)) if listed else ActiveSet()
    if listed:
        box.active[: len(active.indices)] = active.indices
        box.count[0] = len(active.indices)
    with worker.step():
        for number, each in enumerate(blocks, 1):
            worker.post(number)
            assert worker.wait(number)
            assert box.partial.tobytes() == direct(ops, each, box.x, active).tobytes()
            assert box.words[0] == box.words[DONE] == 0
    work = worker.take_work()
    assert work.gate_rows == 2 * (len(active.indices) if listed else NEURONS)
    assert 0 < work.fired < work.gate_rows
    assert worker.take_work() == (0, 0, 0, 0)


@pytest.mark.parametrize("crossings", [3000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_every_crossing_is_answered_alike(ops, crossings):
    worker = make_worker(ops, [block(ops, 1), block(ops, 2), block(ops, 3)])
    with worker.step():
        seen = worker.simulate(3, crossings)
    assert (seen.crossings, seen.different) == (crossings, 0)


def test_steps_after_a_rest(ops):
    """The worker sleeps between requests, and every step wakes it."""
    worker = make_worker(ops, [block(ops, 1)])
    for pause in (0, 0.02, 0.001, 0.02):
        time.sleep(pause)
        with worker.step():
            assert worker.simulate(1, 20).crossings == 20


def test_a_worker_that_dies_ends_the_request_and_the_next_one_has_a_new_worker(ops):
    worker = make_worker(ops, [block(ops, 1), block(ops, 2)])
    worker.inject(Fault.DIE, 7)
    with pytest.raises(HardwareError, match="worker of the CPU's neurons died"), worker.step():
        assert worker.simulate(2, 100).crossings == 7
    assert not worker.alive
    with worker.step():
        assert worker.simulate(2, 100)[:2] == (100, 0)


def test_a_failure_inside_is_told_and_nothing_hangs(ops):
    worker = make_worker(ops, [block(ops, 1)])
    worker.inject(Fault.FAIL, 3)
    with pytest.raises(HardwareError, match="told to fail"), worker.step():
        assert worker.simulate(1, 10).crossings == 10


def test_a_slow_worker_ends_the_request_and_is_waited_for(ops):
    worker = make_worker(ops, [block(ops, 1)], patience=0.2)
    worker.inject(Fault.STALL, 2, 0.9)
    with pytest.raises(HardwareError, match="did not compute its neurons in time"), worker.step():
        assert worker.simulate(1, 10).crossings == 2
    with pytest.raises(HardwareError, match="still computing"), worker.step():
        pass
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with worker.step():
                assert worker.simulate(1, 50)[:2] == (50, 0)
            break
        except HardwareError as error:
            assert "still computing" in str(error) or "in time" in str(error)  # noqa: PT017
    else:
        pytest.fail("the worker never came back")


def test_a_device_that_waits_for_ever_is_released(ops):
    """What a watcher does for stream memory operations, which know no deadline: the late answer is dropped."""
    worker = make_worker(ops, [block(ops, 1)])
    worker.inject(Fault.STALL, 0, 0.5)
    with pytest.raises(HardwareError, match="gave up"), worker.step():  # noqa: PT012
        worker.post(1)
        deadline = time.monotonic() + 60
        while not worker.release("the watcher gave up") and time.monotonic() < deadline:
            time.sleep(0.001)
        assert worker.mailbox.words[DONE] == 1
        assert not worker.release("nothing is open")
    with worker.step():
        assert worker.simulate(1, 20)[:2] == (20, 0)


def test_a_cancelled_request_ends_between_two_crossings(ops):
    worker = make_worker(ops, [block(ops, 1)])
    results = []
    with worker.step():
        thread = threading.Thread(target=lambda: results.append(worker.simulate(1, 1 << 40)))
        thread.start()
        time.sleep(0.05)
        worker.cancel()
        thread.join(60)
        assert not thread.is_alive()
    assert results[0].different == 0
    with worker.step():
        assert worker.simulate(1, 20)[:2] == (20, 0)


@pytest.mark.parametrize("ids", [[5, 3], [0, NEURONS], [-1, 4], [2, 2]])
def test_a_damaged_list_is_an_error_and_reads_nothing(ops, ids):
    worker = make_worker(ops, [block(ops, 1)], listed=True)
    worker.mailbox.active[: len(ids)] = ids
    worker.mailbox.count[0] = len(ids)
    with pytest.raises(HardwareError, match="list of neurons"), worker.step():  # noqa: PT012
        worker.post(1)
        assert worker.wait(1)


def test_a_count_beyond_the_list_is_an_error(ops):
    worker = make_worker(ops, [block(ops, 1)], listed=True)
    for count in (NEURONS + 1, -1):
        worker.mailbox.count[0] = count
        with pytest.raises(HardwareError, match="list of neurons"), worker.step():  # noqa: PT012
            worker.post(1)
            worker.wait(1)


def test_an_unknown_layer_is_an_error(ops):
    worker = make_worker(ops, [block(ops, 1)])
    with pytest.raises(HardwareError, match="does not have"), worker.step():  # noqa: PT012
        worker.post(9)
        assert worker.wait(9)


def test_callbacks_do_what_a_stream_asks_of_them(ops):
    """The C functions that a device calls in its stream, called from another thread as a driver would."""
    each = block(ops, 1)
    worker = make_worker(ops, [each])
    post, wait, argument = worker.callbacks(1)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def stream() -> None:
        kind(post)(argument)
        kind(wait)(argument)

    with worker.step():
        thread = threading.Thread(target=stream)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert worker.mailbox.partial.tobytes() == direct(ops, each, worker.mailbox.x, ActiveSet()).tobytes()


def test_closing_with_work_open_does_not_hang(ops):
    worker = make_worker(ops, [block(ops, 1)])
    worker.inject(Fault.STALL, 0, 0.1)
    with worker.step():
        worker.post(1)
    del worker


def test_what_does_not_fit_the_mailbox_is_refused(ops):
    box = Mailbox.of(lambda shape, dtype: np.zeros(shape, dtype), WIDTH, 5)
    worker = ColdWorker(ops, box)
    with pytest.raises(ValueError, match="more neurons than the mailbox"):
        worker.add(block(ops, 1), skip_zeros=True, listed=True)
    narrow = ColdWorker(ops, Mailbox.of(lambda shape, dtype: np.zeros(shape, dtype), 32, NEURONS))
    with pytest.raises(ValueError, match="other columns"):
        narrow.add(block(ops, 1), skip_zeros=True, listed=False)
