"""What a decode step takes beside what it reads: measured with the engine itself, on a small network.

Its weights are more than second caches hold, so that Python finds these as a model leaves them. What the cost model
says of it without any calls is taken off; what is left are the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from thermocline.activity.predictor import Predictor
from thermocline.config import Mode, SamplingSettings
from thermocline.files.formats import F32, Q8_0
from thermocline.files.metadata import Metadata
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.hardware import probe
from thermocline.hardware.machine import Calls, Machine, Tier
from thermocline.hardware.probe import Probe, StepCosts, emulated, machine_of
from thermocline.hardware.survey import Survey
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache, kv_bytes_per_token
from thermocline.memory.loader import load_transformer
from thermocline.model.header import gguf_header
from thermocline.model.rope import RopeSpec
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import expected_tensors
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import Device, EmulatedDevice, Host
from thermocline.placement.cost import CostModel, FfnMode
from thermocline.placement.footprint import footprint_of
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.placement.workload import Workload
from thermocline.runtime.sampler import Sampler
from thermocline.runtime.sequence import TransformerSequence

LAYERS, WIDTH, NEURONS, RANK, HEAD = 6, 256, 2048, 64, 64
SELECTED = 8
"""One neuron in so many is selected, as it would be by a good predictor."""
STEPS, FIRST = 64, 8
"""Steps whose median counts, after some that touch everything first."""
NOTHING = Calls(attention=0.0, predictor=0.0, ffn=0.0, head=0.0)
SPEC = ModelSpec(
    family="llama",
    name="steps",
    n_layer=LAYERS,
    n_embd=WIDTH,
    n_head=WIDTH // HEAD,
    n_head_kv=WIDTH // HEAD,
    head_dim=HEAD,
    n_ff=NEURONS,
    n_vocab=NEURONS,
    n_ctx_train=STEPS + FIRST,
    norm_eps=1e-5,
    rope=RopeSpec(HEAD, 1e4, interleaved=True),
    ffn=FfnKind(Activation.RELU, gated=True),
    windows=(0,) * LAYERS,
    tied_embeddings=False,
)


@dataclass(frozen=True)
class _Network:
    """A source of random weights, with its predictor."""

    metadata: Metadata
    weights: dict[str, Weight]
    predictor: Predictor
    kind: str = "gguf"
    path: Path = Path("steps")
    fingerprint: str = "steps"

    def cost(self, machine: Machine) -> CostModel:
        """Its prices in the steps that are measured."""
        predictor = (self.predictor.layers[0].fc1.nbytes + self.predictor.layers[0].fc2.nbytes,) * LAYERS
        kv_token = kv_bytes_per_token(SPEC) // LAYERS
        weights = footprint_of(SPEC, self.weights, self.fingerprint, kv_token=kv_token, predictor=predictor)
        selected = np.full((LAYERS, NEURONS), 1 / SELECTED)
        return CostModel(weights, machine, Workload(prompt=0, output=STEPS + FIRST), FfnMode.PREDICTED, selected)


@dataclass(frozen=True, slots=True)
class _Step:
    """Median seconds of steps, by component; `wall` is all of a step, `network` what its network took."""

    wall: float
    network: float
    components: dict[str, float]


def probe_machine(
    *,
    refresh: bool = False,
    disk: Path | None = None,
    any_disk: bool = True,
    tell: Callable[[str], None] | None = None,
) -> tuple[Survey, Probe]:
    """Look at this machine, its steps included; see `hardware.probe.probe_machine`."""
    return probe.probe_machine(refresh=refresh, disk=disk, any_disk=any_disk, steps=measure_steps, tell=tell)


def measure_steps(survey: Survey, known: Probe) -> StepCosts:
    """Run the network on the host with all threads and with half of them, with attention beside an emulated device and
    the FFN on the host, and with the FFN cut in two.

    `known` has all but the steps.
    """
    network, threads = _drawn(), survey.cores.threads
    half = max(1, threads // 2)
    whole = _without_calls(machine_of(survey, known))
    halves = _without_calls(emulated(whole, known, survey.memory.usable))
    all_threads = _run(network, {Tier.RAM: Host(CpuOps(threads))})
    alone = _calls(_run(network, {Tier.RAM: Host(CpuOps(half))}), network.cost(halves))
    halves = replace(halves, cpu=replace(halves.cpu, calls=alone))
    if halves.gpu is not None:
        halves = replace(halves, gpu=replace(halves.gpu, calls=alone))

    def left_over(hot: int) -> float:
        """Seconds beyond the two sides' own of a step with attention beside the device, and so many neurons."""
        host = Host(CpuOps(max(1, threads - half)))
        devices: dict[Tier, Device] = {Tier.VRAM: EmulatedDevice(CpuOps(half)), Tier.RAM: host}
        return max(0.0, _run(network, devices, hot).network - _predicted(network.cost(halves), hot))

    crossing = left_over(0) / (2 * LAYERS + 2)  # to the host and back in every layer, and at both ends
    meeting = left_over(NEURONS // 2) / LAYERS - 2 * crossing
    return StepCosts(
        host=_calls(all_threads, network.cost(whole)),
        half=alone,
        crossing=crossing,
        meeting=max(meeting, 0.0),
        between=max(all_threads.wall - all_threads.network, 0.0),
    )


def _without_calls(machine: Machine) -> Machine:
    gpu = None if machine.gpu is None else replace(machine.gpu, calls=NOTHING)
    return replace(machine, cpu=replace(machine.cpu, calls=NOTHING), gpu=gpu, crossing=0.0, meeting=0.0)


def _calls(step: _Step, cost: CostModel) -> Calls:
    """Of a network that is the host's alone."""
    a_layer = {name: seconds / LAYERS for name, seconds in step.components.items()}
    time = cost.layer(cost.decode, 0, Tier.RAM, Tier.RAM, 0, cost.clusters)
    between = a_layer["ffn"] - a_layer["predictor"] - a_layer["ffn cold"]
    return Calls(
        attention=max(0.0, a_layer["attention ram"] - time.attention) + max(0.0, between),
        predictor=max(0.0, a_layer["predictor"] - time.predictor),
        ffn=max(0.0, a_layer["ffn cold"] - float(time.cold)),
        head=max(0.0, step.components["head"] - cost.head(Tier.RAM)),
    )


def _predicted(cost: CostModel, hot: int) -> float:
    """Seconds of a step with attention beside the device and so many neurons of each layer."""
    layer = cost.layer(cost.decode, 0, Tier.VRAM, Tier.VRAM, hot // cost.cluster, cost.clusters)
    return LAYERS * float(layer.total) + cost.head(Tier.RAM)


def _run(network: _Network, devices: Mapping[Tier, Device], hot: int = 0) -> _Step:
    """Steps with attention beside the fastest device, as many hot neurons as said, and the rest on the host."""
    memory, home = Memory(devices, {}), min(devices, key=list(Tier).index)
    seats = Seating(Tier.RAM, Tier.RAM, (LayerSeat(home, hot, NEURONS),) * LAYERS)
    try:
        transformer, _ = load_transformer(
            network, memory, mode=Mode.PREDICTED, predictor=network.predictor, seats=seats, mapped=True
        )
        caches, scratch = memory.arrays(Purpose.KV), memory.arrays(Purpose.ACTIVATIONS)
        cache = KVCache(SPEC, [caches[layer.device.tier] for layer in transformer.layers], SPEC.n_ctx_train)
        return _steps(TransformerSequence(transformer, cache, 1, scratch, timed=True))
    finally:
        memory.close()


def _steps(sequence: TransformerSequence) -> _Step:
    sampler = Sampler(SamplingSettings(temperature=0), sequence.n_vocab, sequence.n_ctx)
    token, walls, seconds = np.zeros(1, np.int32), [], []
    for position in range(FIRST + STEPS):
        began = time.perf_counter()
        logits = sequence.step(token, position, logits=True).logits
        assert logits is not None
        token[0] = sampler.sample(logits).token
        walls.append(time.perf_counter() - began)
        seconds.append(dict(sequence.tally.seconds))
    components = {name: median(step[name] for step in seconds[FIRST:]) for name in seconds[-1]}
    network = sum(components[name] for name in components if name.startswith("attention") or name in ("ffn", "head"))
    return _Step(median(walls[FIRST:]), network, components)


def _drawn() -> _Network:
    """Every matrix of a size is the same, in bytes of its own."""
    rng = np.random.default_rng(0)
    drawn: dict[tuple[int, int], Weight] = {}

    def weight(name: str, rows: int, columns: int) -> Weight:
        fmt = F32 if rows == 1 else Q8_0
        if (rows, columns) not in drawn:
            values = np.ones((1, columns)) if rows == 1 else rng.standard_normal((rows, columns)) / columns**0.5
            drawn[rows, columns] = from_float(name, values.astype(np.float32), fmt)
        return Weight(name, fmt, (rows, columns), drawn[rows, columns].data.copy())

    header = {key: value.item() if isinstance(value, np.generic) else value for key, value in gguf_header(SPEC).items()}
    tensors = expected_tensors(SPEC, records=True).items()
    weights = {name: weight(name, rows, columns) for name, (rows, columns) in tensors}
    # No two rows of fc1 are open at once, so that scores have the signs of fc2.
    first = rng.standard_normal((RANK // 2, WIDTH), dtype=np.float32)
    chosen = np.where(np.arange(NEURONS) % SELECTED == 0, 1.0, -1.0).astype(np.float32)
    layers = tuple(
        PredictorLayer(
            from_float("fc1", np.concatenate([first, -first]), Q8_0),
            from_float("fc2", np.repeat(chosen[:, None], RANK, axis=1), Q8_0),
        )
        for _ in range(LAYERS)
    )
    predictor = Predictor(layers, (0.0,) * LAYERS, (1 / SELECTED,) * LAYERS, {})
    return _Network(Metadata("steps", header), weights, predictor)  # type: ignore[arg-type]
