"""Footprints of real weights, and the demands that follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from thermocline.errors import UsageError
from thermocline.files.formats import F16, F32, Q8_0, BlockFormat
from thermocline.files.weight import Weight
from thermocline.hardware.catalogue import machine
from thermocline.hardware.machine import Tier
from thermocline.model.rope import RopeSpec
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import expected_tensors
from thermocline.model.workspace import workspace_bytes
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cuda.sizes import scratch_bytes
from thermocline.placement.cost import FfnMode
from thermocline.placement.footprint import Footprint, footprint_of
from thermocline.placement.ledger import Purpose
from thermocline.placement.problem import SCALE_BYTES, LayerPlace, Placement, Problem
from thermocline.placement.workload import NO_OVERHEADS, Workload


def spec_of(*, tied: bool, gated: bool = True) -> ModelSpec:
    return ModelSpec(
        family="llama", name="t", n_layer=3, n_embd=64, n_head=4, n_head_kv=2, head_dim=16, n_ff=160, n_vocab=96,
        n_ctx_train=128, norm_eps=1e-5, rope=RopeSpec(rotary_dim=16, base=1e4, interleaved=False),
        ffn=FfnKind(Activation.RELU, gated), windows=(0, 8, 0), tied_embeddings=tied, qkv_bias=True,
    )  # fmt: skip


def weights_of(spec: ModelSpec, *, records: bool, fmt: BlockFormat = Q8_0) -> dict[str, Weight]:
    def weight(name: str, shape: tuple[int, int]) -> Weight:
        chosen = F32 if shape[0] == 1 else F16 if name == "output.weight" else fmt
        return Weight(name, chosen, shape, np.zeros((shape[0], chosen.row_bytes(shape[1])), np.uint8))

    return {name: weight(name, shape) for name, shape in expected_tensors(spec, records=records).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_stored_byte_is_counted_once(tied: bool, records: bool, gated: bool) -> None:
    spec = spec_of(tied=tied, gated=gated)
    weights = weights_of(spec, records=records)
    f = footprint_of(spec, weights, "f" * 64, kv_token=2 * spec.n_kv * 2)
    assert f.nbytes == sum(w.nbytes for w in weights.values())
    assert f.gated is gated
    assert f.records[0] == ((68 if gated else 0), 68, 68)
    assert f.windows == (0, 8, 0)
    assert f.attention_params == 64 * (2 * 64 + 2 * 32)


@pytest.mark.parametrize("tied", [False, True])
def test_a_placement_takes_the_whole_model(tied: bool) -> None:
    spec = spec_of(tied=tied)
    weights = weights_of(spec, records=True)
    predictors = (1000, 2000, 3000)
    f = footprint_of(spec, weights, "f" * 64, kv_token=128, predictor=predictors)
    work = Workload(context=64, prompt=8, output=8, batch=2)
    problem = Problem(f, machine("t4+i5-12400"), work, FfnMode.PREDICTED, overheads=NO_OVERHEADS, cluster=64)
    layers = (
        LayerPlace(Tier.VRAM, Tier.RAM, 1, 3),
        LayerPlace(Tier.RAM, Tier.VRAM, 3, 3),
        LayerPlace(Tier.RAM, Tier.RAM, 0, 3),
    )
    placed = problem.placed(Placement(Tier.RAM, Tier.RAM, layers))
    stored = sum(w.nbytes for w in weights.values()) + sum(predictors)
    assert sum(d.nbytes for d in placed) == stored + 3 * 128 * 64 * 2
    taken = {(d.tier, d.purpose): d.nbytes for d in placed}
    assert taken[Tier.VRAM, Purpose.FFN] == 3 * 68 * (64 + 160)
    assert taken[Tier.VRAM, Purpose.KV] == 128 * 64 * 2
    assert taken[Tier.VRAM, Purpose.PREDICTOR] == 2000
    exact = replace(problem, mode=FfnMode.EXACT)
    assert not any(d.purpose is Purpose.PREDICTOR for d in exact.placed(Placement(Tier.RAM, Tier.RAM, layers)))


def test_scratch_covers_the_workspace() -> None:
    spec = spec_of(tied=False)
    f = footprint_of(spec, weights_of(spec, records=True), "f" * 64, kv_token=128)
    work = Workload(context=64, prompt=8, output=8, batch=2, ubatch=32)
    problem = Problem(f, machine("t4+i5-12400"), work, FfnMode.EXACT, overheads=NO_OVERHEADS)
    scratch = next(d.nbytes for d in problem.fixed(Tier.RAM) if d.purpose is Purpose.ACTIVATIONS)
    assert scratch >= workspace_bytes(spec, 32, 2, observed=True)
    on_gpu = next(d.nbytes for d in problem.fixed(Tier.VRAM) if d.purpose is Purpose.ACTIVATIONS)
    kernels = scratch_bytes(32, n_embd=64, n_ff=160, n_vocab=f.n_vocab, n_q=f.n_q, gated=f.gated, context=64)
    of_cpu = 4 * 32 * 160 * (1 + f.gated) + SCALE_BYTES * 160 * f.n_layer
    assert on_gpu == scratch - of_cpu + kernels


@pytest.mark.parametrize(
    "change", [{"attention": (1,)}, {"predictor": ()}, {"n_ff": 0}, {"embedding": -1}, {"attention": (1, 2, -3)}]
)
def test_impossible_footprints_are_refused(change: dict[str, object]) -> None:
    spec = spec_of(tied=False)
    f = footprint_of(spec, weights_of(spec, records=True), "f" * 64, kv_token=128)
    with pytest.raises(UsageError):
        Footprint(**({name: getattr(f, name) for name in f.__slots__} | change))


def test_budgets_of_other_tiers_are_refused() -> None:
    spec = spec_of(tied=False)
    f = footprint_of(spec, weights_of(spec, records=True), "f" * 64, kv_token=128)
    for budgets in ({Tier.DISK: 5}, {Tier.RAM: -5}, {Tier.VRAM: 0.5}):
        with pytest.raises(UsageError):
            Problem(f, machine("t4+i5-12400"), Workload(), FfnMode.EXACT, budgets=budgets)
