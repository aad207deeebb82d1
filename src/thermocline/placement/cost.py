"""Predicted time of every layer, for decode and prefill, whatever its placement.

Times are the larger of bytes over bandwidth and operations over rate (the roofline), summed where things follow one
another and maximised where the two sides overlap. Reading happens at the bandwidth measured while the other side
works wherever both do, and more slowly over rows that lie apart than over whole matrices. What is read from disk or
sent over the link slows what is computed meanwhile, and is slowed by it, for as long as both last (`together`). Neuron
records are counted by clusters, and a side's share of a layer is a difference of two prefix sums: any depth is priced
in constant time, and whole tables of depths at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.activity.predictor import MOST_TOKENS
from thermocline.config import Mode
from thermocline.errors import HardwareError, UsageError
from thermocline.hardware.machine import UNCORRECTED, Corrections, Machine, Processor, Tier
from thermocline.placement.footprint import Footprint
from thermocline.placement.reading import ReadPrices
from thermocline.placement.workload import Workload

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ACTIVATION_BYTES = 4
"""Of one number of the residual stream."""

NEIGHBOURS = 4
"""Rows before one that must be taken too for it to be read as fast as a matrix is."""

STAGED = 2
"""Times that a byte on its way to the link passes RAM before: it is read, and written to a pinned buffer."""

LARGEST_CLUSTER, SMALLEST_CLUSTER = 256, 64
SCANNED_TOKENS = 4
"""In mode exact, so many tokens read a layer's first matrix from disk to know which records they need; more do not."""


class FfnMode(StrEnum):
    """How the FFN of a placed model computes: all neurons, gate first, or those that the predictor selects."""

    DENSE = "dense"
    EXACT = "exact"
    PREDICTED = "predicted"


def ffn_mode(mode: Mode | str) -> FfnMode:
    """The mode to price; `auto` must have been resolved before.

    Raises:
        UsageError: not one of dense, exact and predicted.
    """
    if str(mode) not in list(FfnMode):
        raise UsageError(f"cannot price the mode {mode}; allowed: {', '.join(FfnMode)}")
    return FfnMode(str(mode))


class Sides(NamedTuple):
    """Seconds that each side takes for a layer's neurons, whatever its home: as in `LayerTime`."""

    hot: Floats
    cold: Floats
    disk: Floats
    run: Ints


class LayerTime(NamedTuple):
    """Seconds of one pass through a layer; each an array over the depths asked for, or over those that it depends on.

    `hot` and `cold` overlap. `disk` is the part of `cold` that waits for reads. `run` is the neurons of one
    disk read. `streamed` tells that cold weights travel to the GPU instead (prefill); `hot` is then all of it.
    """

    attention: float
    predictor: float
    crossing: Floats
    hot: Floats
    cold: Floats
    disk: Floats
    run: Ints
    streamed: npt.NDArray[np.bool_]

    @property
    def total(self) -> Floats:
        """The layer's time: sums, and the longer of the two sides."""
        total: Floats = self.attention + self.predictor + self.crossing + np.maximum(self.hot, self.cold)
        return total


@dataclass(frozen=True, slots=True)
class Phase:
    """A kind of pass: `tokens` of it at once, from `sequences` caches of `position` tokens.

    `weight` is passes per token of output. `mode` is how its FFN computes.
    """

    name: str
    tokens: int
    sequences: int
    position: int
    weight: float
    mode: FfnMode


class CostModel:
    """Prices placements of one model on one machine for one workload.

    `temperatures` is (n_layer, n_ff): how often each neuron fires, hottest first. None means unknown: every
    neuron is then taken to fire always, so that no sparsity is promised that nobody has measured. In mode
    `predicted` they should be how often the predictor selects each neuron. A batch unites the active sets of
    its tokens, taken as independent: 1 - (1 - p)^tokens. The cost of a cache of clusters read from disk
    before is not counted: reads are priced as if each were the first. `scattered` says that the file has its neurons
    in another order than the temperatures, so that those on disk lie anywhere among those that are not.

    Raises:
        UsageError: temperatures do not fit the model, are not probabilities or not hottest first; or the
            cluster is not 1 to 256 neurons.
    """

    def __init__(
        self,
        footprint: Footprint,
        machine: Machine,
        workload: Workload,
        mode: FfnMode,
        temperatures: npt.NDArray[np.floating] | None = None,
        cluster: int = LARGEST_CLUSTER,
        *,
        scattered: bool = False,
    ) -> None:
        if not 1 <= cluster <= LARGEST_CLUSTER:
            raise UsageError(
                f"a cluster of {cluster} neurons; allowed: 1 to {LARGEST_CLUSTER}, useful: {SMALLEST_CLUSTER} or more"
            )
        if mode is FfnMode.PREDICTED and not any(footprint.predictor):
            raise UsageError(f"{footprint.name} has no predictor; use --mode exact or dense, or train one")
        self.footprint = footprint
        self.machine = machine
        self.workload = workload
        self.mode = mode
        self.cluster = cluster
        self.known = temperatures is not None
        self.clusters = -(-footprint.n_ff // cluster)
        self.bounds: Ints = np.minimum(np.arange(self.clusters + 1, dtype=np.int64) * cluster, footprint.n_ff)
        self.record_bytes = [sum(record) for record in footprint.records]
        p = self._temperatures = _checked(temperatures, footprint)
        self._unions: dict[int, Floats] = {}
        self.phases = self._phases()
        self._tables = {phase.name: self._table(phase, p) for phase in self.phases}
        self._disk: dict[str, tuple[Floats, Ints]] = {}
        disk = machine.disk
        self._prices = None if disk is None else ReadPrices(disk.curve, self.bounds, scattered=scattered)
        self.share = self._share(p)

    @property
    def decode(self) -> Phase:
        """One step of all sequences."""
        return self.phases[0]

    def hot_share(self, layer: int, hot: int) -> float:
        """Share of the layer's activations that its first `hot` clusters own."""
        return float(self.share[layer, hot])

    def alone(self, tokens: int, mode: FfnMode) -> Floats:
        """Seconds that each layer's FFN takes in a step of `tokens` tokens, its predictor included: (n_layer).

        All of it is in RAM: whatever the placement, a step shall be computed alike.
        """
        phase = Phase("alone", tokens, 1, 0, 1.0, mode)
        scored = [self._predictor(phase, layer, Tier.RAM) for layer in range(self.footprint.n_layer)]
        seconds: Floats = self._table(phase, self._temperatures).cpu[:, -1] + scored
        return seconds

    def expected_rows(self, phase: Phase) -> Floats:
        """Gate, up and down rows that one pass computes of each cluster: (n_layer, clusters, 3)."""
        return self._tables[phase.name].rows

    def layer(
        self,
        phase: Phase,
        layer: int,
        home: Tier,
        predictor: Tier,
        hot: npt.ArrayLike,
        warm: npt.ArrayLike,
        sides: Sides | None = None,
    ) -> LayerTime:
        """Seconds of one pass through `layer`.

        Attention and its cache are on `home`. Clusters up to `hot` are in VRAM, from there to `warm` in RAM, the
        rest on disk; both may be arrays that broadcast. The residual stream comes from `home` and returns there.
        `sides` are those of the same depths, if they are known.
        """
        hot = np.asarray(hot, np.int64)
        vram, cold, disk, run = self.sides(phase, layer, hot, warm) if sides is None else sides
        scored = self._predictor(phase, layer, predictor)
        crossings = self._crossings(home, predictor, scored > 0, hot > 0, hot < self.clusters)
        scored *= self._corrections(phase).predictor
        crossing = crossings * self._crossing(phase) + self._meetings(home, hot) * self._meeting
        time = LayerTime(self.attention(phase, layer, home), scored, crossing, vram, cold, disk, run, hot < 0)
        return (
            time if phase is self.decode or self.machine.gpu is None else self._streamed(phase, layer, home, hot, time)
        )

    def sides(self, phase: Phase, layer: int, hot: npt.ArrayLike, warm: npt.ArrayLike) -> Sides:
        """What both sides take for a layer's neurons; see `layer`."""
        hot, warm = np.asarray(hot, np.int64), np.asarray(warm, np.int64)
        table, last, gpu = self._tables[phase.name], self.clusters, self.machine.gpu
        works_hot, works_cold = hot > 0, hot < last
        both = works_hot & works_cold
        cpu, busy = table.cpu[layer], table.cpu_busy[layer]
        computed = np.where(both, busy[last] - busy[hot], cpu[last] - cpu[hot])
        disk, run = np.zeros(warm.shape), np.ones(warm.shape, np.int64)
        if (warm < last).any():
            reads, runs = self._reads(phase)
            disk, run = reads[layer, warm], runs[layer, warm]
            computed = self._while_reading(computed, disk)
        cold = computed + works_cold * self.machine.cpu.started.ffn
        vram = np.zeros(hot.shape)
        if gpu is not None and table.gpu is not None and table.gpu_busy is not None:
            read = np.where(both, table.gpu_busy[layer, hot], table.gpu[layer, hot])
            vram = read + works_hot * gpu.started.ffn
        off = self._corrections(phase)
        return Sides(vram * off.hot, cold * off.cold, disk * off.cold, run)

    def attention(self, phase: Phase, layer: int, home: Tier) -> float:
        """Seconds of a layer's attention with its cache: weights, cached keys and values, launches."""
        f, side = self.footprint, self.machine.processor(home)
        window = f.windows[layer]
        seen = min(phase.position, window) if window else phase.position
        flops = phase.tokens * (2.0 * f.attention_params + 4.0 * seen * f.n_q)
        nbytes = f.attention[layer] + f.kv_token * seen * phase.sequences
        computed = side.seconds(nbytes, f.attention_params, flops) + side.started.attention
        if home is Tier.DISK:
            computed = float(self._while_reading(computed, self._streaming(f.attention[layer])))
        return computed * self._corrections(phase).attention(home)

    def _while_reading(self, computed: npt.ArrayLike, disk: npt.ArrayLike) -> Floats:
        """Seconds of what the CPU computes while it is read from disk."""
        shares = self.machine.shares
        return together(computed, disk, shares.ram_beside_disk, shares.disk_beside_ram)

    def _streaming(self, nbytes: int) -> float:
        """Seconds to read a matrix from disk from end to end."""
        if self.machine.disk is None:
            raise HardwareError(f"{self.machine.name} has no disk tier; keep the trunk in RAM and VRAM")
        return nbytes / self.machine.disk.curve.bandwidth(nbytes) if nbytes else 0.0

    def embedding(self, tier: Tier, phases: Sequence[Phase] | None = None) -> float:
        """Seconds per token of output to fetch the embeddings, in some phases or in all."""
        side, f = self.machine.processor(tier), self.footprint
        row = f.embedding / f.n_vocab
        # Token ids come from the CPU: a table in VRAM does not save the crossing, only the bytes on the link.
        ids = self.machine.crossing if tier is Tier.VRAM else 0.0
        if tier is Tier.DISK:
            ids = self._streaming(int(row))  # a row is fetched for each token

        def passing(phase: Phase) -> float:
            return (phase.tokens * row / side.bandwidth + side.launch + ids) * self._corrections(phase).rest

        return sum(phase.weight * passing(phase) for phase in phases or self.phases)

    def head(self, tier: Tier) -> float:
        """Seconds per token of output for logits and their way to the sampler, which is on the CPU, and for what is
        between the parts of a step.
        """
        side, f, batch = self.machine.processor(tier), self.footprint, self.workload.batch
        flops = 2.0 * f.n_vocab * f.n_embd * batch
        time = side.seconds(f.head, f.n_vocab * f.n_embd, flops) + side.started.head
        if tier is Tier.DISK:
            time = float(self._while_reading(time, self._streaming(f.head)))
        if tier is Tier.VRAM:
            time += self.machine.crossing + f.n_vocab * ACTIVATION_BYTES * batch / self.machine.link
        off = self.machine.corrections
        return (time * off.rest + self.machine.between_parts) * self.decode.weight

    def edge(self, here: Tier, there: Tier) -> float:
        """Seconds per token of output to take the residual stream from one layer's home to the next one's."""
        if _computed_by(here) is _computed_by(there):
            return 0.0
        return sum(p.weight * self._crossing(p) for p in self.phases)

    def edge_of(self, phase: Phase, here: Tier, there: Tier) -> float:
        """Seconds of one pass for the same."""
        return 0.0 if _computed_by(here) is _computed_by(there) else self._crossing(phase)

    def _phases(self) -> tuple[Phase, ...]:
        w = self.workload
        decode = Phase("decode", w.batch, w.batch, w.position, 1 / w.batch, self.mode)
        if not w.prompt:
            return (decode,)
        tokens, mode = min(w.prompt, w.ubatch), self.mode
        if mode is FfnMode.PREDICTED:
            ways = [mode, FfnMode.EXACT] if tokens <= MOST_TOKENS else [FfnMode.EXACT]
            mode = min(ways, key=lambda way: float(self.alone(tokens, way).sum()))
        return decode, Phase("prefill", tokens, 1, max(1, w.prompt // 2), w.prompt / tokens / w.output, mode)

    def _rows(self, p: Floats | None, tokens: int, mode: FfnMode) -> Floats:
        """Expected gate, up and down rows that one pass computes: (n_layer, clusters, 3)."""
        f, sizes = self.footprint, np.diff(self.bounds).astype(np.float64)
        every = np.broadcast_to(sizes, (f.n_layer, self.clusters))
        if p is None or mode is FfnMode.DENSE:
            return np.stack([every * f.gated, every, every], axis=-1)
        fired = self._fired(p, tokens)
        if mode is FfnMode.PREDICTED:
            return np.stack([fired * f.gated, fired, fired], axis=-1)
        return np.stack([every, fired, fired] if f.gated else [every * 0, every, fired], axis=-1)

    def _fired(self, p: Floats, tokens: int) -> Floats:
        """Expected size of the union of `tokens` active sets in each cluster: (n_layer, clusters)."""
        if tokens not in self._unions:
            with np.errstate(divide="ignore"):  # log 0 = -inf is the neuron that always fires
                union = p if tokens == 1 else -np.expm1(tokens * np.log1p(-p))
            self._unions[tokens] = np.add.reduceat(union, self.bounds[:-1], axis=1)
        return self._unions[tokens]

    def _table(self, phase: Phase, p: Floats | None) -> _Table:
        f, gpu, cpu = self.footprint, self.machine.gpu, self.machine.cpu
        rows = self._rows(p, phase.tokens, phase.mode)
        records = np.asarray(f.records, np.float64)
        nbytes: Floats = np.einsum("lct,lt->lc", rows, records)
        lone = 1 - (rows / np.diff(self.bounds)[:, None]) ** NEIGHBOURS
        apart: Floats = np.einsum("lct,lt->lc", rows * lone, records)
        numbers: Floats = rows.sum(axis=-1) * f.n_embd

        def prefix(side: Processor, bandwidth: float) -> Floats:
            read = (nbytes + apart * (1 / side.apart(phase.tokens) - 1)) / bandwidth
            computed = numbers * max(1 / (side.unpacking or np.inf), 2.0 * phase.tokens / side.flops)
            return _prefix(np.maximum(read, computed))

        return _Table(
            rows=rows,
            cpu=prefix(cpu, cpu.bandwidth),
            cpu_busy=prefix(cpu, cpu.bandwidth_busy),
            gpu=None if gpu is None else prefix(gpu, gpu.bandwidth),
            gpu_busy=None if gpu is None else prefix(gpu, gpu.bandwidth_busy),
            gpu_dense=None if gpu is None else phase.tokens * 2.0 * f.n_embd * f.n_ff * (2 + f.gated) / gpu.flops,
        )

    def _reads(self, phase: Phase) -> tuple[Floats, Ints]:
        """Seconds to read what a pass needs of the clusters from each depth on, and the best size of a read.

        Both (n_layer, clusters + 1). In mode exact a short pass reads the rows of the first matrix before, to know
        which records are needed, where that takes less than all of them. A longer pass reads all records.
        """
        if phase.name in self._disk:
            return self._disk[phase.name]
        if self._prices is None:
            raise HardwareError(f"{self.machine.name} has no disk tier; keep all neurons in RAM and VRAM")
        f, rows, prices = self.footprint, self._tables[phase.name].rows, self._prices
        time = np.zeros((f.n_layer, self.clusters + 1))
        runs = np.ones((f.n_layer, self.clusters + 1), np.int64)
        sizes = np.diff(self.bounds).astype(np.float64)
        exact = phase.mode is FfnMode.EXACT
        for layer, record in enumerate(f.records):
            needed, whole = rows[layer, :, 2] / sizes, sum(record)
            if not exact:
                time[layer], runs[layer] = prices.records(needed, whole)
                continue
            time[layer], runs[layer] = prices.records(np.ones_like(sizes), whole)
            if phase.tokens <= SCANNED_TOKENS:
                first = record[0] or record[1]
                few, lengths = prices.records(needed, whole - first)
                few = few + prices.first_rows(first)
                runs[layer] = np.where(few < time[layer], lengths, runs[layer])
                time[layer] = np.minimum(few, time[layer])
        return self._disk.setdefault(phase.name, (time, runs))

    def _predictor(self, phase: Phase, layer: int, tier: Tier) -> float:
        nbytes = self.footprint.predictor[layer]
        if phase.mode is not FfnMode.PREDICTED or not nbytes:
            return 0.0
        side, f = self.machine.processor(tier), self.footprint
        record = self.record_bytes[layer] / (f.n_embd * (2 + f.gated))  # bytes of a number in this model's format
        numbers = nbytes / record
        return side.seconds(nbytes, numbers, 2.0 * numbers * phase.tokens) + side.started.predictor

    @staticmethod
    def _crossings(
        home: Tier, predictor: Tier, scored: bool, works_hot: npt.NDArray[np.bool_], works_cold: npt.NDArray[np.bool_]
    ) -> Floats:
        """How often something is handed over: the input out, its partial sum back, scores to the other side."""
        at_home, away = (works_hot, works_cold) if home is Tier.VRAM else (works_cold, works_hot)
        far_predictor = scored and _computed_by(predictor) is not _computed_by(home)
        scores_back = at_home if far_predictor else np.zeros_like(at_home)
        return (away | far_predictor).astype(np.float64) + away + scores_back

    def _meetings(self, home: Tier, hot: Ints) -> npt.NDArray[np.bool_]:
        """Where the device has to be woken: what the home's own thread computes begins at once."""
        return (hot > 0) & ((hot < self.clusters) | (home is not Tier.VRAM))

    @property
    def _meeting(self) -> float:
        return self.machine.meeting * self.machine.corrections.crossing

    def _corrections(self, phase: Phase) -> Corrections:
        """Those of the machine, which are of decode steps."""
        return self.machine.corrections if phase is self.decode else UNCORRECTED

    def _crossing(self, phase: Phase) -> float:
        handed = self.machine.crossing + phase.tokens * self.footprint.n_embd * ACTIVATION_BYTES / self.machine.link
        return handed * self.machine.corrections.crossing

    def _streamed(self, phase: Phase, layer: int, home: Tier, hot: Ints, split: LayerTime) -> LayerTime:
        """The split, or sending the cold records to the GPU in pieces while it computes, where that is faster."""
        gpu, table, f, machine = self.machine.gpu, self._tables[phase.name], self.footprint, self.machine
        if gpu is None or table.gpu_dense is None:
            return split
        shares = machine.shares
        # The CPU's threads fill pinned buffers with the next piece while one is on its way.
        copied = STAGED / (machine.cpu.bandwidth * shares.ram_beside_link)
        a_byte = max(1 / (machine.link * shares.link_beside_ram), copied)
        bytes_sent = self.record_bytes[layer] * (f.n_ff - self.bounds[hot]).astype(np.float64)
        whole = f.n_ff * self.record_bytes[layer] / gpu.bandwidth
        computed = max(table.gpu_dense, whole) + gpu.started.ffn
        sent = together(bytes_sent * a_byte, computed, shares.link_beside_vram, shares.vram_beside_link)
        stream = np.maximum(sent, split.disk)
        crossing = np.full_like(stream, 0.0 if home is Tier.VRAM else 2 * self._crossing(phase))
        faster = (hot < self.clusters) & (stream + crossing < np.maximum(split.hot, split.cold) + split.crossing)
        return split._replace(
            crossing=np.where(faster, crossing, split.crossing),
            hot=np.where(faster, stream, split.hot),
            cold=np.where(faster, 0.0, split.cold),
            streamed=faster,
        )

    def _share(self, p: Floats | None) -> Floats:
        """Share of a layer's activations above each depth: (n_layer, clusters + 1)."""
        mass = self._rows(p, 1, FfnMode.PREDICTED)[..., 2]
        sums = _prefix(mass)
        whole = sums[:, -1:]
        plain = np.broadcast_to(self.bounds / self.footprint.n_ff, sums.shape).copy()
        share: Floats = np.divide(sums, whole, out=plain, where=whole > 0)
        return share


@dataclass(frozen=True, slots=True)
class _Table:
    """Prefix sums of seconds over clusters, (n_layer, clusters + 1): each side alone and beside a busy one.

    `rows` are the expected gate, up and down rows of each cluster, (n_layer, clusters, 3).
    """

    rows: Floats
    cpu: Floats
    cpu_busy: Floats
    gpu: Floats | None
    gpu_busy: Floats | None
    gpu_dense: float | None


def together(one: npt.ArrayLike, other: npt.ArrayLike, one_beside: float, other_beside: float) -> Floats:
    """Seconds of two things at once that take so many alone, each at a share of its speed while both last.

    Never more than one after the other.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    first = np.minimum(one / one_beside, other / other_beside)
    rest = np.maximum(one - first * one_beside, other - first * other_beside)
    both: Floats = np.minimum(first + rest, one + other)
    return both


def _computed_by(tier: Tier) -> Tier:
    """The memory beside which a tier's tensors are computed: the CPU reads what is on disk."""
    return Tier.RAM if tier is Tier.DISK else tier


def _prefix(values: Floats) -> Floats:
    sums = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _checked(temperatures: npt.NDArray[np.floating] | None, footprint: Footprint) -> Floats | None:
    if temperatures is None:
        return None
    p = np.asarray(temperatures, np.float64)
    wanted = (footprint.n_layer, footprint.n_ff)
    if p.shape != wanted:
        raise UsageError(f"temperatures are {p.shape}, but {footprint.name} needs {wanted} (layers, neurons)")
    if not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1):
        raise UsageError(f"temperatures of {footprint.name} are not all probabilities from 0 to 1")
    if (np.diff(p, axis=1) > 0).any():
        raise UsageError(f"temperatures of {footprint.name} are not ordered hottest first")
    return p
