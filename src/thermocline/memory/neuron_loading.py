"""The neurons of every layer on their way into the tiers: sliced by the plan, kept as records, or left on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from thermocline.config import Mode
from thermocline.errors import UsageError
from thermocline.files.formats import BlockFormat
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.allocator import Rows, Slot, Source
from thermocline.memory.disk_store import DiskNeurons
from thermocline.memory.movable import LayerBiases, Movable, MovableLayer
from thermocline.memory.neuron_store import NeuronStore, Records, ResidentNeurons, require_store
from thermocline.memory.queueing import NEURONS, Account, Later, Orders
from thermocline.memory.reblock import Reblocked, Transposer, not_finite, transpose
from thermocline.memory.sent import SentNeurons, lanes_for
from thermocline.model.feed_forward import FeedForward, Neurons
from thermocline.model.tensors import record_format
from thermocline.ops.contract import NeuronBlock
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import slices


@dataclass(slots=True)
class NeuronLoading:
    """Queues the neurons of an account's layers. `scored` are the predictors' second matrices, where there are any.

    `mode`, `order`, `store`, `movable` and `sent_from` are those of `loader.load_transformer`.
    """

    account: Account
    mode: Mode
    order: Orders | None
    store: NeuronStore | None
    movable: Movable | None = None
    sent_from: Sequence[int] = ()
    reblocked: list[Reblocked] = field(default_factory=list)
    scored: list[tuple[Weight, Slot]] = field(default_factory=list)
    sent: list[SentNeurons] = field(default_factory=list)
    travelling: dict[tuple[int, int], Later[SentNeurons]] = field(default_factory=dict)

    def has_records(self, index: int) -> bool:
        """Whether the layer computes on neuron records: where neurons can be skipped, or the file has them so."""
        return self.account.spec.ffn.sparse or f"blk.{index}.ffn_down_t.weight" in self.account.weights

    def order_of(self, index: int) -> Orders | None:
        """The order in which a layer is cut; None where it is not cut, or has columns that cannot be moved."""
        if self.moves(index):
            known = None if self.order is None else self.order[index]
            return np.arange(self.account.spec.n_ff, dtype=np.int32) if known is None else known
        return self.order[index] if self.order is not None and self.cut(index) and self.has_records(index) else None

    def cut(self, index: int) -> bool:
        """Whether several tiers have neurons of a layer."""
        return len(slices(self.account.seats.layers[index], self.account.spec.n_ff)) > 1

    def moves(self, index: int) -> bool:
        """Whether a layer's neurons may change places: what is not cut yet may be later, where depths change."""
        movable = self.movable
        return movable is not None and self.has_records(index) and (self.cut(index) or not movable.within)

    def feed_forward(self, index: int) -> Later[FeedForward]:
        """Queue every tier's slice of a layer's neurons."""
        spec, blk, seat = self.account.spec, f"blk.{index}.", self.account.seats.layers[index]
        gate = self.account.weights[blk + "ffn_gate.weight"] if spec.ffn.gated else None
        up = self.account.weights[blk + "ffn_up.weight"]
        down, records, order = self.down(blk), self.has_records(index), self.order_of(index)
        if self.movable is not None and order is not None and self.moves(index):
            matrices = [up, down] if gate is None else [gate, up, down]
            return self.movable_parts(index, matrices, order, self.movable)
        parts: list[Later[Neurons]] = []
        for tier, start, stop in slices(seat, spec.n_ff):
            self.account.device(tier)
            if tier is Tier.DISK:
                weights = self.account.weights
                stored = weights.get(blk + "ffn_down_t.weight") or weights[blk + "ffn_down.weight"]
                bias = f"{blk}ffn_up.bias" if spec.ffn_bias else None
                cold = Records(index, gate, up, stored, stored.rows == spec.n_ff, spec.ffn, order, start, stop)
                parts.append(partial(self.on_disk, require_store(self.store, stop - start), cold, bias))
                continue
            rows: Rows = None
            if order is not None:
                rows = order[start:stop]
            elif stop - start < spec.n_ff:
                rows = slice(start, stop)
            place = partial(self.queue, index, tier=tier, rows=rows)
            few = self.mode is Mode.PREDICTED
            slots = (
                None if gate is None else place(gate, apart=few),
                place(up, apart=few or (self.mode is Mode.EXACT and gate is not None)),
                place(down, apart=self.mode is not Mode.DENSE)
                if records
                else self.columns(index, down, tier, start, stop),
            )
            bias = f"{blk}ffn_up.bias" if spec.ffn_bias else None
            parts.append(partial(self.resident, tier, rows, (start, stop), slots, records, bias))
            if tier is Tier.RAM and Tier.VRAM in self.account.memory.devices:
                travelling = partial(self.travelling_part, (start, stop), slots, records, bias, rows)
                self.travelling[index, start] = travelling

        def build() -> FeedForward:
            ffn = FeedForward.of(self.account.device(seat.home), [part() for part in parts], order)
            if self.movable is not None:
                self.movable.add_still(spec.ffn, spec.n_ff, seat.hot)
            return self.with_sent(index, ffn)

        return build

    def queue(self, index: int, source: Weight | Source, tier: Tier, rows: Rows = None, *, apart: bool = False) -> Slot:
        """Queue a matrix of a layer's neurons, or rows of it; `apart`: few of them are read at a time."""
        return self.account.allocator.queue(
            source, tier, Purpose.FFN, rows=rows, priority=NEURONS, as_stored=self.travels(index), apart=apart
        )

    def travels(self, index: int) -> bool:
        """Whether a layer's neurons in RAM are sent to VRAM in long prompts."""
        return bool(self.sent_from) and self.sent_from[index] > 0

    def with_sent(self, index: int, ffn: FeedForward) -> FeedForward:
        """The layer, with what travels to VRAM in long prompts."""
        sent = [self.travelling.get((index, part.start)) for part in ffn.parts]
        if self.travels(index) and any(sent):
            both = [part if other is None else other() for part, other in zip(ffn.parts, sent, strict=True)]
            self.sent += [part for part in both if isinstance(part, SentNeurons)]
            ffn.sent, ffn.sent_from = FeedForward.of(ffn.home, both, ffn.order), self.sent_from[index]
        return ffn

    def give_lanes(self) -> None:
        """Make the buffers that all of them pass through.

        Raises:
            BudgetError: there is no room for them.
        """
        if self.sent:
            device = self.account.device(Tier.VRAM)
            lanes_for(device, self.account.memory.arenas[Tier.VRAM].for_purpose(Purpose.STAGING), self.sent)

    def travelling_part(
        self, cut: tuple[int, int], slots: tuple[Slot | None, Slot, Slot], records: bool, bias: str | None, rows: Rows
    ) -> SentNeurons:
        """A slice in RAM as one that VRAM's device computes."""

        def weight(slot: Slot) -> Weight:
            assert slot.host is not None
            return Weight(slot.like.name, slot.like.format, (slot.count, slot.like.columns), slot.host)

        gate, up, down = slots
        return SentNeurons(
            self.account.device(Tier.VRAM),
            *cut,
            gate=None if gate is None else weight(gate),
            up=weight(up),
            down=weight(down),
            records=records,
            kind=self.account.spec.ffn,
            up_bias=None if bias is None else self.account.vector(bias, Tier.VRAM, Purpose.FFN, rows),
        )

    def movable_parts(
        self, index: int, matrices: Sequence[Weight | Source], order: Orders, movable: Movable
    ) -> Later[FeedForward]:
        """Queue a layer's neurons into slots of their tiers, from which they can be moved."""
        spec, seat = self.account.spec, self.account.seats.layers[index]
        likes = [m.like if isinstance(m, Source) else m for m in matrices]
        tiers = slices(seat, spec.n_ff)
        on_disk = self.store is not None
        fast, slow = movable.slots(Tier.VRAM, likes), None if on_disk else movable.slots(Tier.RAM, likes)
        at, cold = np.full(spec.n_ff, -1, np.int32), None
        biases, places = None, (0, 0)
        if spec.ffn_bias:
            self.account.elements(f"blk.{index}.ffn_up.bias")
            bias = self.account.weights[f"blk.{index}.ffn_up.bias"]
            cold_ones = movable.biases(Tier.RAM, likes, Purpose.STAGING if on_disk else Purpose.FFN)
            biases = LayerBiases(bias, movable.biases(Tier.VRAM, likes, Purpose.FFN), cold_ones)
            places = biases.hot.take(seat.hot), biases.cold.take(spec.n_ff - seat.hot)
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
                self.account.allocator.queue(matrix, tier, Purpose.FFN, rows=rows, priority=NEURONS, room=room)

        def build() -> FeedForward:
            on_disk = None if cold is None else cold()
            assert on_disk is None or isinstance(on_disk, DiskNeurons)
            scored = self.scored[index] if self.scored else None
            placed = None if scored is None else (scored[0], scored[1].array, self.account.device(scored[1].tier))
            table = movable.table(at[: seat.hot])
            layer = MovableLayer(spec.ffn, order, seat.hot, at, fast, slow, on_disk, None, placed, biases, table=table)
            if biases is not None:
                biases.lay(order, seat.hot, places)
                self.account.vector_bytes += 4 * spec.n_ff
            layer.ffn = FeedForward.of(self.account.device(seat.home), layer.parts(), order)
            movable.layers.append(layer)
            return layer.ffn

        return build

    def on_disk(self, store: NeuronStore, records: Records, bias: str | None) -> Neurons:
        """A slice that stays on disk, with its biases in RAM."""
        if bias is not None:
            cut = slice(records.start, records.stop)
            rows = cut if records.order is None else records.order[cut]
            records = replace(records, up_bias=self.account.vector(bias, Tier.RAM, Purpose.STAGING, rows))
        return store.neurons(records, self.account.memory.host)

    def resident(
        self,
        tier: Tier,
        rows: Rows,
        cut: tuple[int, int],
        slots: tuple[Slot | None, Slot, Slot],
        records: bool,
        bias: str | None,
    ) -> Neurons:
        """A slice in a tier's memory."""
        gate, up, down = slots
        start, stop = cut
        block = NeuronBlock(
            gate=None if gate is None else gate.matrix,
            up=up.matrix,
            down=down.matrix,
            records=records,
            kind=self.account.spec.ffn,
            neurons=stop - start,
            up_bias=None if bias is None else self.account.vector(bias, tier, Purpose.FFN, rows),
        )
        return ResidentNeurons(self.account.device(tier), start, stop, block)

    def columns(self, index: int, down: Weight | Source, tier: Tier, start: int, stop: int) -> Slot:
        """Queue the columns of a standard down projection that belong to a slice of neurons."""
        assert isinstance(down, Weight)
        if stop - start == down.columns:
            return self.queue(index, down, tier)
        if start % down.format.block or stop % down.format.block:
            raise UsageError(
                f"{down.name} in {down.format.name} can be cut at multiples of {down.format.block} neurons, "
                f"not at {start} and {stop}; make a new plan"
            )
        cut = slice(down.format.row_bytes(start), down.format.row_bytes(stop))
        part = Weight(down.name, down.format, (down.rows, stop - start), down.data[:, cut])
        return self.queue(index, part, tier)

    def down(self, blk: str) -> Weight | Source:
        """The down projection as it is computed with: as stored, or transposed into records when it is moved."""
        records = self.account.weights.get(blk + "ffn_down_t.weight")
        if records is not None:
            return records
        down = self.account.weights[blk + "ffn_down.weight"]
        if not self.account.spec.ffn.sparse:
            return down
        fmt = record_format(down)
        nobody: Bytes = np.empty((0, fmt.row_bytes(down.rows)), np.uint8)
        like = Weight(down.name.replace("ffn_down", "ffn_down_t"), fmt, (down.columns, down.rows), nobody)
        return Source(like, lambda out: self.transpose(down, out, fmt))

    def transpose(self, down: Weight, out: Bytes, fmt: BlockFormat) -> None:
        """Write `down` as records into `out`."""
        ops = self.account.memory.host.ops
        if not isinstance(ops, Transposer):
            self.reblocked.append(transpose(down, out, fmt))
            return
        worst, rms, size = ops.transpose_requantize(ops.place(down), out, fmt)
        if not np.isfinite(worst):
            raise not_finite(down.name)
        self.reblocked.append(Reblocked(down.name, fmt.name, worst, rms, down.format.name, size))
