"""The threads: no fighting, no load when idle, no hanging at the end."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from thermocline.files.formats import F32
from thermocline.files.quantize import from_float
from thermocline.hardware.cores import find_cores
from thermocline.ops.contract import ALL, Activation, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps


@pytest.fixture(scope="module")
def values():
    return np.random.default_rng(1).standard_normal((300, 256)).astype(np.float32)


def product(ops, values, x):
    out = np.empty((len(x), len(values)), np.float32)
    ops.linear(x, (ops.place(from_float("w", values, F32)),), (out,))
    return out


def test_idle_threads_use_no_cpu(values):
    ops = CpuOps(3)
    product(ops, values, values)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.04


def test_parked_threads_wake_up(values):
    ops = CpuOps(3)
    expected = product(ops, values, values)
    for _ in range(5):
        ops.park()
        time.sleep(0.01)
        assert product(ops, values, values).tobytes() == expected.tobytes()


def current_core():
    return int(Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()[36])


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs cores to choose from"
)
def test_the_caller_leaves_the_core_of_a_worker(values):
    allowed = os.sched_getaffinity(0)
    if find_cores().threads != len(allowed):
        pytest.skip("threads of a core share it")
    ops, last = CpuOps(len(allowed)), max(allowed)
    product(ops, values, values)

    def left():
        time.sleep(0.02)
        os.sched_setaffinity(0, {last})
        os.sched_setaffinity(0, allowed)
        product(ops, values, values)
        assert os.sched_getaffinity(0) == allowed
        return current_core() != last

    # Other processes push the caller about, at times often: one round of some shows what it does by itself.
    assert any(sum(left() for _ in range(20)) > 15 for _ in range(20))


def test_two_contexts_work_at_once(values):
    """Two owners in two threads, each with its own pool: neither waits for nor disturbs the other."""
    expected = product(CpuOps(1), values, values).tobytes()
    wrong = []

    def work():
        ops = CpuOps(2)
        wrong.extend(1 for _ in range(15) if product(ops, values, values).tobytes() != expected)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("threads", [1, 16, 64])
def test_any_number_of_threads_gives_the_same(values, threads):
    """More threads than cores too: those that wait give their cores away."""
    expected, ops = product(CpuOps(2), values, values[:20]).tobytes(), CpuOps(threads)
    for _ in range(3):
        assert product(ops, values, values[:20]).tobytes() == expected


def test_callers_of_one_context_take_turns(values):
    ops = CpuOps(2)
    inputs = [values[i : i + 40] for i in range(0, 160, 40)]
    expected = [product(ops, values, x).tobytes() for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(10) if product(ops, values, inputs[i]).tobytes() != expected[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong
    assert not any(worker.is_alive() for worker in workers)


def test_a_step_allocates_nothing_once_it_was_run(values):
    ops = CpuOps(2)
    block = [ops.place(from_float("w", values, F32)) for _ in range(3)]
    neurons = NeuronBlock(block[0], block[1], block[2], True, FfnKind(Activation.RELU, gated=True), 300)
    out = np.zeros((40, 256), np.float32)

    def step():
        product(ops, values, values[:40])
        ops.ffn(values[:40], neurons, ALL, out, skip_zeros=True)

    step()
    step()
    held = ops.scratch_bytes
    for _ in range(3):
        step()
    assert ops.scratch_bytes == held


PROGRAM = """
import os, sys
import numpy as np
from thermocline.files.formats import F32
from thermocline.files.quantize import from_float
from thermocline.hardware.cores import find_cores
from thermocline.ops.cpu import CpuOps

ops = CpuOps(3)
weight = ops.place(from_float("w", np.ones((300, 256), np.float32), F32))
x, out = np.ones((4, 256), np.float32), np.empty((4, 300), np.float32)
ops.linear(x, (weight,), (out,))
assert (out == 256).all()
"""
ENDINGS = {
    "with live threads": "",
    "with a live cycle": "cycle = [ops]; cycle.append(cycle)",
    "with deleted ops": "del ops",
    "after a forked child refused": """
child = os.fork()
if child == 0:
    try:
        ops.linear(x, (weight,), (out,))
    except RuntimeError as error:
        assert "fork" in str(error)
        del ops
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ops.linear(x, (weight,), (out,))
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_process_ends_cleanly(ending):
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM + ENDINGS[ending]], capture_output=True, text=True, timeout=60, env=env
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
