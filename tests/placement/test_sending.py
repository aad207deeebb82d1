"""From where on neurons travel to the GPU is where the cost model says that a prompt is faster so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thermocline.files.formats import F16
from thermocline.hardware.catalogue import machine
from thermocline.hardware.machine import Machine, Tier
from thermocline.placement.cost import CostModel, FfnMode
from thermocline.placement.footprint import Footprint
from thermocline.placement.problem import Problem
from thermocline.placement.seats import LayerSeat
from thermocline.placement.sending import sent_from
from thermocline.placement.workload import Workload

VRAM, RAM = Tier.VRAM, Tier.RAM
SEATS = [LayerSeat(VRAM, 2048, 11008), LayerSeat(RAM, 0, 11008), LayerSeat(VRAM, 11008, 11008), LayerSeat(RAM, 0, 512)]


def problem(on: Machine) -> Problem:
    footprint = Footprint.of_sizes(
        "7b",
        n_layer=4,
        n_embd=4096,
        n_ff=11008,
        n_vocab=32000,
        n_head=32,
        n_head_kv=32,
        head_dim=128,
        gated=True,
        fmt=F16,
    )
    return Problem(footprint, on, Workload(context=1024, ubatch=512), FfnMode.DENSE)


def streams(of: Problem, tokens: int, layer: int, seat: LayerSeat) -> bool:
    work = replace(of.workload, prompt=tokens, output=1)
    cost = CostModel(of.footprint, of.machine, work, of.mode)
    return bool(cost.layer(cost.phases[1], layer, seat.home, seat.home, -(-seat.hot // 256), cost.clusters).streamed)


def test_it_is_faster_from_there_on_and_not_before() -> None:
    of = problem(machine("t4+i5-12400"))
    found = sent_from(of, SEATS)
    assert found[2:] == (0, 0)
    for layer, tokens in enumerate(found[:2]):
        assert 2 <= tokens <= 512
        sizes = [1 << i for i in range(1, 10)]
        assert [streams(of, n, layer, SEATS[layer]) for n in sizes if n >= tokens] == [True] * sum(
            n >= tokens for n in sizes
        )
        assert tokens == 2 or not streams(of, tokens // 2, layer, SEATS[layer])


@pytest.mark.parametrize("change", [{"link": 1e3}, {"gpu": None}])
def test_a_slow_link_or_no_gpu_sends_nothing(change: dict) -> None:
    assert sent_from(problem(replace(machine("t4+i5-12400"), **change)), SEATS) == (0, 0, 0, 0)
