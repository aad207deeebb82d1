"""From an opened model to a network ready to run.

Every tensor is queued with the tier that shall have it, one flush moves them, and what was queued becomes layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from thermocline.activity.predictor import Predictor
from thermocline.config import Mode
from thermocline.errors import UsageError
from thermocline.files.formats import BlockFormat
from thermocline.files.quantize import to_float
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.allocator import BufferedAllocator, Flushed, Rows, Slot, Source
from thermocline.memory.arena import Memory
from thermocline.memory.checks import check_finite, first_bytes
from thermocline.memory.disk_store import DiskNeurons
from thermocline.memory.movable import Movable, MovableLayer
from thermocline.memory.neuron_store import NeuronStore, Records, ResidentNeurons, require_store
from thermocline.memory.reblock import Reblocked, Transposer, not_finite, transpose
from thermocline.memory.residence import Reading, lock, settle, touch
from thermocline.memory.sent import Sender, SentNeurons, lanes_for
from thermocline.model.families import family_of
from thermocline.model.feed_forward import FeedForward, Neurons
from thermocline.model.layer import Layer, LayerPredictor, Norm
from thermocline.model.network import Transformer, resolve_mode
from thermocline.model.rope import rope_table
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import check_tensors, has_records, record_format
from thermocline.ops.contract import Array, NeuronBlock, Ops
from thermocline.ops.device import Device
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import Seats, all_in, slices


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did. `mapped_bytes` stay in the file's mapping, `resident_bytes` were made anew.

    The predictor's are counted apart.
    """

    mapped_bytes: int
    resident_bytes: int
    reblocked: tuple[Reblocked, ...]
    seconds: float
    predictor_bytes: int = 0

    @property
    def worst_reblocked(self) -> Reblocked | None:
        """The transposed tensor with the largest error, None if nothing was transposed."""
        return max(self.reblocked, key=lambda r: r.max_abs_error, default=None)


def load_transformer(
    source: NetworkSource,
    ops: Ops | Memory,
    *,
    n_ctx: int = 0,
    mode: Mode = Mode.AUTO,
    predictor: Predictor | None = None,
    check: bool = False,
    mlock: bool = False,
    progress: Reading | None = None,
    seats: Seats | None = None,
    order: Orders | None = None,
    store: NeuronStore | None = None,
    movable: Movable | None = None,
    sent_from: Sequence[int] = (),
) -> tuple[Transformer, LoadReport]:
    """Read the spec, hold the tensors to it, and place them where `seats` says: without, all beside `ops`.

    `n_ctx` is the longest context that will be run, 0 the model's own. Norms and biases are always looked at
    for NaN and infinity, and so are predictors, and down projections while they are transposed; `check` looks at
    every weight. With a `predictor`, the mode may be predicted, or changed to it later. Mapped weights are read in
    their order, which `progress` is told about, and with `mlock` kept in memory. `order` (n_layer, n_ff) is each
    layer's neurons, hottest first: layers whose records are cut are cut in this order, the others stay as they are.
    `store` answers for neurons that `seats` leaves on disk. With `movable`, which is filled, neurons can change places
    later on. `sent_from` are for each layer the tokens of a step from which its neurons in RAM are sent to VRAM to be
    computed there, 0 for never; without, they never are.

    Raises:
        ModelFormatError: the source contradicts itself, or the predictor is of another network.
        UnsupportedModelError: it asks for what is not implemented.
        NumericalError: weights are not finite.
        UsageError: the network cannot run in that mode, or cannot be cut as the seats say.
        HardwareError: the system does not allow so much memory to be locked.
        BudgetError, AllocationError: a tier has no room; nothing is left in any.
    """
    began = time.perf_counter()
    memory = ops if isinstance(ops, Memory) else Memory.of_host(ops)
    family = family_of(source)
    spec = family.spec(source)
    mode = resolve_mode(mode, spec.ffn, predictor=predictor is not None)
    weights = family.weights(source, spec)
    check_tensors(source.path, spec, weights)
    budgeted = Tier.RAM in memory.ledger.budgets
    if not budgeted:
        touch(source.path, weights.values(), progress)
    if check:
        check_finite(weights, memory.host.ops)
    n_ctx = n_ctx or spec.n_ctx_train
    if spec.n_positions and n_ctx > spec.n_ctx_train:
        raise UsageError(
            f"{spec.name} has learned positions for {spec.n_ctx_train} tokens only; use a --ctx-size up to that"
        )
    seats = seats if seats is not None else all_in(Tier.RAM, spec.n_layer, spec.n_ff)
    loading = _Loading(spec, memory, weights, seats, order, store, n_ctx, movable, sent_from)
    try:
        if predictor is not None:
            loading.queue_predictor(source, predictor)
        build = loading.queue_all(mode)
        loading.flushed = loading.allocator.flush(progress if budgeted else None)
        transformer = build()
        loading.give_lanes()
        if store is not None:
            settle(source.path, loading.flushed.host_bytes)
        if mlock:
            lock(loading.flushed.host_bytes)
    except BaseException:
        memory.close()
        raise
    return transformer, loading.report(time.perf_counter() - began)


Orders = npt.NDArray[np.int32]
Built = TypeVar("Built")
Later = Callable[[], Built]
"""What a queued tensor will be part of, to be called once it is flushed."""

TRUNK, NEURONS = 0, 1
"""Priorities: without the trunk nothing runs."""


def _held(tier: Tier) -> Tier:
    """Where small things of a tier are: what stays on disk is computed in RAM."""
    return Tier.RAM if tier is Tier.DISK else tier


@dataclass(slots=True)
class _Loading:
    """The account kept while tensors are queued and placed."""

    spec: ModelSpec
    memory: Memory
    weights: Mapping[str, Weight]
    seats: Seats
    order: Orders | None
    store: NeuronStore | None
    n_ctx: int
    movable: Movable | None = None
    sent_from: Sequence[int] = ()
    reblocked: list[Reblocked] = field(default_factory=list)
    predictor_bytes: int = 0
    vector_bytes: int = 0
    flushed: Flushed = field(default_factory=Flushed)
    predictors: list[Later[LayerPredictor]] = field(default_factory=list)
    scored: list[tuple[Weight, Slot]] = field(default_factory=list)
    sent: list[SentNeurons] = field(default_factory=list)
    travelling: dict[tuple[int, int], Later[SentNeurons]] = field(default_factory=dict)
    ropes: dict[Tier, Array] = field(default_factory=dict)
    allocator: BufferedAllocator = field(init=False)

    def __post_init__(self) -> None:
        self.allocator = BufferedAllocator(self.memory)
        if len(self.seats.layers) != self.spec.n_layer:
            raise UsageError(f"a plan of {len(self.seats.layers)} layers does not seat {self.spec.n_layer}")

    def queue_all(self, mode: Mode) -> Later[Transformer]:
        """Queue the whole network."""
        spec, seats = self.spec, self.seats
        entry, exit_ = self.device(seats.embedding), self.device(seats.head)
        shared = spec.tied_embeddings and seats.embedding is seats.head
        purpose = Purpose.OUTPUT if shared else Purpose.EMBEDDING
        embedding = self.queue("token_embd.weight", seats.embedding, purpose)
        positions = None
        if spec.n_positions:
            positions = self.queue("position_embd.weight", seats.embedding, Purpose.EMBEDDING)
        head = embedding
        if not shared:
            name = "token_embd.weight" if spec.tied_embeddings else "output.weight"
            head = self.queue(name, seats.head, Purpose.OUTPUT)
        layers = [self.layer(i) for i in range(spec.n_layer)]
        return lambda: Transformer(
            spec=spec,
            entry=entry,
            embedding=embedding.matrix,
            layers=tuple(layer() for layer in layers),
            exit=exit_,
            output_norm=self.norm("output_norm", seats.head, Purpose.OUTPUT),
            head=(head.matrix,),
            positions=None if positions is None else positions.matrix,
            n_ctx=self.n_ctx,
            mode=mode,
        )

    def device(self, tier: Tier) -> Device:
        """What computes beside a tier; neurons on disk are the host's.

        Raises:
            UsageError: this engine has no such tier.
        """
        device = self.memory.devices.get(Tier.RAM if tier is Tier.DISK else tier)
        if device is None:
            raise UsageError(f"the plan puts tensors in {tier}, but no device has it; use --device emulated or cuda")
        return device

    def queue(self, name: str, tier: Tier, purpose: Purpose) -> Slot:
        return self.allocator.queue(self.weights[name], tier, purpose, priority=TRUNK)

    def layer(self, index: int) -> Later[Layer]:
        """Queue a layer; norms, biases and the table of rotations are made when it is built."""
        spec, blk, seat = self.spec, f"blk.{index}.", self.seats.layers[index]
        home, device = seat.home, self.device(seat.home)
        qkv = [self.queue(f"{blk}attn_{part}.weight", home, Purpose.ATTENTION) for part in "qkv"]
        out = self.queue(blk + "attn_output.weight", home, Purpose.ATTENTION)
        ffn = self.feed_forward(index)

        def build() -> Layer:
            def vector(name: str) -> Array:
                return self.vector(blk + name, home, Purpose.ATTENTION)

            bias = [vector(f"attn_{part}.bias") for part in "qkv"] if spec.qkv_bias else None
            return Layer(
                device=device,
                home=home,
                rope=self.rope(home),
                attn_norm=self.norm(blk + "attn_norm", home, Purpose.ATTENTION),
                qkv=(qkv[0].matrix, qkv[1].matrix, qkv[2].matrix),
                qkv_bias=(bias[0], bias[1], bias[2]) if bias else None,
                q_norm=vector("attn_q_norm.weight") if spec.qk_norm else None,
                k_norm=vector("attn_k_norm.weight") if spec.qk_norm else None,
                out=(out.matrix,),
                out_bias=(vector("attn_output.bias"),) if spec.out_bias else None,
                ffn_norm=None if spec.shared_norm else self.norm(blk + "ffn_norm", home, Purpose.ATTENTION),
                ffn=ffn(),
                down_bias=vector(self.down_bias) if spec.ffn_bias else None,
                window=spec.windows[index],
                predictor=self.predictors[index]() if self.predictors else None,
            )

        return build

    def queue_predictor(self, source: NetworkSource, predictor: Predictor) -> None:
        """Queue the layers' predictors, looked at for NaN and infinity. Their neurons are in the layers' order."""
        predictor.require_fits(source.path, self.spec)
        matrices: dict[str, Weight] = {}
        for index, layer in enumerate(predictor.layers):
            matrices |= {f"predictor of layer {index}, fc1": layer.fc1, f"predictor of layer {index}, fc2": layer.fc2}
        check_finite(matrices, self.memory.host.ops)
        self.predictor_bytes = predictor.nbytes
        tokens = predictor.batches(first_bytes(self.spec, self.weights))
        for index, layer in enumerate(predictor.layers):
            seat = self.seats.layers[index]
            tier = _held(seat.predictor or seat.home)
            fc1 = self.allocator.queue(layer.fc1, tier, Purpose.PREDICTOR)
            fc2 = self.allocator.queue(layer.fc2, tier, Purpose.PREDICTOR, rows=self.order_of(index))
            threshold, most = predictor.thresholds[index], tokens[index]
            self.scored.append((layer.fc2, fc2))
            self.predictors.append(partial(self.placed_predictor, tier, fc1, fc2, threshold, most))

    def placed_predictor(self, tier: Tier, fc1: Slot, fc2: Slot, threshold: float, tokens: int) -> LayerPredictor:
        return LayerPredictor(self.device(tier), fc1.matrix, fc2.matrix, threshold, tokens)

    def has_records(self, index: int) -> bool:
        """Whether the layer computes on neuron records: where neurons can be skipped, or the file has them so."""
        return self.spec.ffn.sparse or f"blk.{index}.ffn_down_t.weight" in self.weights

    def order_of(self, index: int) -> Orders | None:
        """The order in which a layer is cut; None where it is not cut, or has columns that cannot be moved."""
        if self.movable is not None and self.has_records(index):  # what is not cut yet may be later
            known = None if self.order is None else self.order[index]
            return np.arange(self.spec.n_ff, dtype=np.int32) if known is None else known
        cut = len(slices(self.seats.layers[index], self.spec.n_ff)) > 1
        return self.order[index] if self.order is not None and cut and self.has_records(index) else None

    def feed_forward(self, index: int) -> Later[FeedForward]:
        """Queue every tier's slice of a layer's neurons."""
        spec, blk, seat = self.spec, f"blk.{index}.", self.seats.layers[index]
        gate = self.weights[blk + "ffn_gate.weight"] if spec.ffn.gated else None
        up = self.weights[blk + "ffn_up.weight"]
        down, records, order = self.down(blk), self.has_records(index), self.order_of(index)
        if self.movable is not None and order is not None:
            matrices = [up, down] if gate is None else [gate, up, down]
            return self.movable_parts(index, matrices, order, self.movable)
        parts: list[Later[Neurons]] = []
        for tier, start, stop in slices(seat, spec.n_ff):
            self.device(tier)
            if tier is Tier.DISK:
                stored = self.weights.get(blk + "ffn_down_t.weight") or self.weights[blk + "ffn_down.weight"]
                bias = f"{blk}ffn_up.bias" if spec.ffn_bias else None
                cold = Records(index, gate, up, stored, stored.rows == spec.n_ff, spec.ffn, order, start, stop)
                parts.append(partial(self.on_disk, require_store(self.store, stop - start), cold, bias))
                continue
            rows: Rows = None
            if order is not None:
                rows = order[start:stop]
            elif stop - start < spec.n_ff:
                rows = slice(start, stop)
            place = partial(self.allocator.queue, tier=tier, purpose=Purpose.FFN, rows=rows, priority=NEURONS)
            slots = (
                None if gate is None else place(gate),
                place(up),
                place(down) if records else self.columns(down, tier, start, stop),
            )
            bias = f"{blk}ffn_up.bias" if spec.ffn_bias else None
            parts.append(partial(self.resident, tier, rows, (start, stop), slots, records, bias))
            if tier is Tier.RAM and Tier.VRAM in self.memory.devices:
                travelling = partial(self.travelling_part, (start, stop), slots, records, bias, rows)
                self.travelling[index, start] = travelling
        return lambda: self.with_sent(index, FeedForward.of(self.device(seat.home), [part() for part in parts], order))

    def with_sent(self, index: int, ffn: FeedForward) -> FeedForward:
        """The layer, with what travels to VRAM in long prompts."""
        sent = [self.travelling.get((index, part.start)) for part in ffn.parts]
        tokens = self.sent_from[index] if self.sent_from else 0
        if tokens and any(sent):
            both = [part if other is None else other() for part, other in zip(ffn.parts, sent, strict=True)]
            self.sent += [part for part in both if isinstance(part, SentNeurons)]
            ffn.sent, ffn.sent_from = FeedForward.of(ffn.home, both, ffn.order), tokens
        return ffn

    def give_lanes(self) -> None:
        """Make the buffers that all of them pass through.

        Raises:
            BudgetError: there is no room for them.
        """
        if self.sent:
            device = self.device(Tier.VRAM)
            lanes_for(device, self.memory.arenas[Tier.VRAM].for_purpose(Purpose.STAGING), self.sent)
            if isinstance(device.ops, Sender):  # pinned
                largest = max(neurons.largest for neurons in self.sent)
                self.memory.arenas[Tier.RAM].claim(2 * largest, Purpose.STAGING)

    def travelling_part(
        self, cut: tuple[int, int], slots: tuple[Slot | None, Slot, Slot], records: bool, bias: str | None, rows: Rows
    ) -> SentNeurons:
        """A slice in RAM as one that VRAM's device computes."""

        def weight(slot: Slot) -> Weight:
            assert slot.host is not None
            return Weight(slot.like.name, slot.like.format, (slot.count, slot.like.columns), slot.host)

        gate, up, down = slots
        return SentNeurons(
            self.device(Tier.VRAM),
            *cut,
            gate=None if gate is None else weight(gate),
            up=weight(up),
            down=weight(down),
            records=records,
            kind=self.spec.ffn,
            up_bias=None if bias is None else self.vector(bias, Tier.VRAM, Purpose.FFN, rows),
        )

    def movable_parts(
        self, index: int, matrices: Sequence[Weight | Source], order: Orders, movable: Movable
    ) -> Later[FeedForward]:
        """Queue a layer's neurons into slots of their tiers, from which they can be moved.

        Raises:
            UsageError: neurons of this network have biases, which would have to move along.
        """
        spec, seat = self.spec, self.seats.layers[index]
        if spec.ffn_bias:
            raise UsageError(f"{spec.name} has a bias for each neuron, and these cannot move; leave --drift out")
        likes = [m.like if isinstance(m, Source) else m for m in matrices]
        tiers = slices(seat, spec.n_ff)
        on_disk = self.store is not None
        fast, slow = movable.slots(Tier.VRAM, likes), None if on_disk else movable.slots(Tier.RAM, likes)
        at, cold = np.full(spec.n_ff, -1, np.int32), None
        for tier, start, stop in tiers:
            slots = fast if tier is Tier.VRAM else slow
            if tier is Tier.DISK or slots is None:
                gate = likes[0] if len(likes) == 3 else None
                stored = isinstance(matrices[-1], Weight)
                records = Records(index, gate, likes[-2], likes[-1], stored, spec.ffn, order, start, stop)
                cold = partial(self.on_disk, require_store(self.store, stop - start), records, None)
                continue
            first = slots.rooms[0].rows
            at[start:stop] = np.arange(first, first + stop - start)
            for matrix, room in zip(matrices, slots.rooms, strict=True):
                rows = order[start:stop]
                self.allocator.queue(matrix, tier, Purpose.FFN, rows=rows, priority=NEURONS, room=room)

        def build() -> FeedForward:
            on_disk = None if cold is None else cold()
            assert on_disk is None or isinstance(on_disk, DiskNeurons)
            scored = self.scored[index] if self.scored else None
            placed = None if scored is None else (scored[0], scored[1].array)
            layer = MovableLayer(spec.ffn, order, seat.hot, at, fast, slow, on_disk, scored=placed)
            layer.ffn = FeedForward.of(self.device(seat.home), layer.parts(), order)
            movable.layers.append(layer)
            return layer.ffn

        return build

    def on_disk(self, store: NeuronStore, records: Records, bias: str | None) -> Neurons:
        if bias is not None:
            cut = slice(records.start, records.stop)
            rows = cut if records.order is None else records.order[cut]
            records = replace(records, up_bias=self.vector(bias, Tier.RAM, Purpose.FFN, rows))
        return store.neurons(records, self.memory.host)

    def resident(
        self,
        tier: Tier,
        rows: Rows,
        cut: tuple[int, int],
        slots: tuple[Slot | None, Slot, Slot],
        records: bool,
        bias: str | None,
    ) -> Neurons:
        gate, up, down = slots
        start, stop = cut
        block = NeuronBlock(
            gate=None if gate is None else gate.matrix,
            up=up.matrix,
            down=down.matrix,
            records=records,
            kind=self.spec.ffn,
            neurons=stop - start,
            up_bias=None if bias is None else self.vector(bias, tier, Purpose.FFN, rows),
        )
        return ResidentNeurons(self.device(tier), start, stop, block)

    def columns(self, down: Weight | Source, tier: Tier, start: int, stop: int) -> Slot:
        """Queue the columns of a standard down projection that belong to a slice of neurons."""
        assert isinstance(down, Weight)
        if stop - start == down.columns:
            return self.allocator.queue(down, tier, Purpose.FFN, priority=NEURONS)
        if start % down.format.block or stop % down.format.block:
            raise UsageError(
                f"{down.name} in {down.format.name} can be cut at multiples of {down.format.block} neurons, "
                f"not at {start} and {stop}; make a new plan"
            )
        cut = slice(down.format.row_bytes(start), down.format.row_bytes(stop))
        part = Weight(down.name, down.format, (down.rows, stop - start), down.data[:, cut])
        return self.allocator.queue(part, tier, Purpose.FFN, priority=NEURONS)

    def down(self, blk: str) -> Weight | Source:
        """The down projection as it is computed with: as stored, or transposed into records when it is moved."""
        records = self.weights.get(blk + "ffn_down_t.weight")
        if records is not None:
            return records
        down = self.weights[blk + "ffn_down.weight"]
        if not self.spec.ffn.sparse:
            return down
        fmt = record_format(down)
        nobody: Bytes = np.empty((0, fmt.row_bytes(down.rows)), np.uint8)
        like = Weight(down.name.replace("ffn_down", "ffn_down_t"), fmt, (down.columns, down.rows), nobody)
        return Source(like, lambda out: self.transpose(down, out, fmt))

    def transpose(self, down: Weight, out: Bytes, fmt: BlockFormat) -> None:
        """Write `down` as records into `out`."""
        ops = self.memory.host.ops
        if not isinstance(ops, Transposer):
            self.reblocked.append(transpose(down, out, fmt))
            return
        worst, rms, size = ops.transpose_requantize(ops.place(down), out, fmt)
        if not np.isfinite(worst):
            raise not_finite(down.name)
        self.reblocked.append(Reblocked(down.name, fmt.name, worst, rms, down.format.name, size))

    @property
    def down_bias(self) -> str:
        """What a layer's bias of the down projection is called in this file."""
        return "ffn_down_t.bias" if has_records(self.weights) else "ffn_down.bias"

    def norm(self, name: str, tier: Tier, purpose: Purpose) -> Norm:
        """A norm by the name of its tensors."""
        bias = self.vector(name + ".bias", tier, purpose) if self.spec.layer_norm else None
        return Norm(self.vector(name + ".weight", tier, purpose), bias)

    def vector(self, name: str, tier: Tier, purpose: Purpose, rows: Rows = None) -> Array:
        """A norm or a bias, or some elements of it, as float32."""
        values = to_float(self.weights[name])[0]
        if not np.isfinite(values).all():
            raise not_finite(name)
        values = values if rows is None else values[rows]
        self.vector_bytes += values.nbytes
        return self.made(values, tier, purpose)

    def made(self, values: npt.NDArray[np.float32], tier: Tier, purpose: Purpose) -> Array:
        array = self.memory.arenas[_held(tier)].array(values.shape, "float32", purpose)
        self.device(tier).ops.upload(values, array)
        return array

    def rope(self, tier: Tier) -> Array | None:
        """The table of rotations on a device."""
        tier = _held(tier)
        if self.spec.rope is None:
            return None
        if tier not in self.ropes:
            self.ropes[tier] = self.made(rope_table(self.spec.rope, self.n_ctx), tier, Purpose.ACTIVATIONS)
        return self.ropes[tier]

    def report(self, seconds: float) -> LoadReport:
        mapped, copied = (
            sum(size for purpose, size in sizes.items() if purpose is not Purpose.PREDICTOR)
            for sizes in (self.flushed.mapped, self.flushed.copied)
        )
        return LoadReport(mapped, copied + self.vector_bytes, tuple(self.reblocked), seconds, self.predictor_bytes)
