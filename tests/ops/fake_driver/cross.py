"""Crosses by the way that the command line names, over a driver that is none; prints how many answers were right."""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module

import numpy as np

from thermocline.files.formats import F32
from thermocline.files.weight import Weight
from thermocline.ops.contract import Activation, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.crossing import HostCalls, HostDriver, StreamMemory
from thermocline.ops.handover import ColdWorker, Mailbox

WIDTH, NEURONS, LAYERS, LAUNCHES, STREAM = 64, 48, 3, 20, 0x7ABC
RELU = FfnKind(Activation.RELU, gated=True)


def main() -> None:
    rng = np.random.default_rng(1)
    ops = CpuOps(1)
    mailbox = Mailbox.of(lambda shape, dtype: np.zeros(shape, dtype), WIDTH, NEURONS)
    worker = ColdWorker(ops, mailbox, 20.0)

    def placed() -> object:
        values = rng.standard_normal((NEURONS, WIDTH)).astype(np.float32)
        return ops.place(Weight("w", F32, values.shape, values.view(np.uint8)))

    block = NeuronBlock(placed(), placed(), placed(), True, RELU, NEURONS)
    for _ in range(LAYERS):
        worker.add(block, skip_zeros=True, listed=False)
    mailbox.x[...] = rng.standard_normal(WIDTH)
    wanted = np.zeros((1, WIDTH), np.float32)
    ops.ffn(mailbox.x[None], block, import_module("thermocline.ops.contract").ALL, wanted, skip_zeros=True)

    crossing: StreamMemory | HostCalls
    if sys.argv[1] == "memory":
        crossing = StreamMemory(worker, import_module("cuda.bindings.driver"), lambda: STREAM)
    else:
        crossing = HostCalls(worker, HostDriver(), lambda: STREAM)
    for number in range(1, LAYERS + 1):
        crossing.post(number)
        crossing.wait(number)
    driver, right = ctypes.CDLL("libcuda.so.1"), 0
    for _ in range(LAUNCHES):
        mailbox.partial[...] = 0
        with worker.step():
            kept = driver.launch()  # without Python's lock, as a driver's thread
        right += mailbox.partial.tobytes() == wanted[0].tobytes()
    work = worker.take_work()
    print(right, kept, work.gate_rows == LAUNCHES * LAYERS * NEURONS)


if __name__ == "__main__":
    main()
