"""The tiers below RAM: what a plan leaves on disk, and the room that its records get in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from thermocline.activity.order import Order
from thermocline.errors import ModelFormatError, OutputError, UsageError, printable
from thermocline.files.formats import F32
from thermocline.files.source import ModelSource
from thermocline.files.weight import Weight
from thermocline.hardware.machine import Disk, ReadCurve, Tier
from thermocline.hardware.reader import ReadStats
from thermocline.memory.arena import Memory
from thermocline.memory.bundle import Bundle, bundle_path, layer_matrices, read_bundle, write_bundle
from thermocline.memory.disk_store import IN_FLIGHT, DiskStore
from thermocline.memory.pieces import PIECES_BYTES, PieceStream
from thermocline.memory.reads import Way
from thermocline.memory.record_cache import Uses
from thermocline.memory.streamed import StreamingOps
from thermocline.model.families import family_of
from thermocline.placement.cost import FfnMode
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import Plan
from thermocline.placement.seats import LayerSeat, Seating, Seats

Tell = Callable[[str], None] | None


@dataclass(slots=True)
class Below:
    """What serves the tiers below RAM: None where nothing is on disk. `seats` are the plan's as they are carried out:
    neurons of RAM and of disk are one slice, whose hottest records are in memory. `scanner` reads the first matrices
    that mode exact looks through, unless `streaming` does. `curve` is how fast the disk is.
    """

    seats: Seats | None
    store: DiskStore | None = None
    streaming: StreamingOps | None = None
    scanner: PieceStream | None = None
    notices: list[str] = field(default_factory=list)
    curve: ReadCurve | None = None

    @property
    def reads(self) -> bool:
        """Whether anything is on disk."""
        return self.store is not None or self.streaming is not None

    @property
    def uses(self) -> Uses:
        """Records asked for, and those of them that were in memory, so far."""
        return Uses() if self.store is None else self.store.uses

    @property
    def stats(self) -> ReadStats:
        """What was read from disk, records and trunk."""
        parts = (part.stats for part in (self.store, self.streaming, self.scanner) if part is not None)
        return sum(parts, ReadStats())

    def warm_up(self, order: Order | None) -> None:
        """Have the hottest records in memory, where it is known which they are."""
        if self.store is not None and order is not None:
            self.store.warm_up(order.by_number)

    def close(self) -> None:
        """Let go of the files."""
        for part in (self.store, self.streaming, self.scanner):
            if part is not None:
                part.close()


def streams(plan: Plan) -> bool:
    """Whether parts of the trunk are on disk."""
    return Tier.DISK in (plan.embedding, plan.head, *(layer.home for layer in plan.layers))


def below(
    source: ModelSource, plan: Plan | None, memory: Memory, disk: Disk | None, tell: Tell = None, moving: int = 0
) -> Below:
    """Set up what a plan leaves on disk. `moving` bytes of what it has for staging are somebody else's.

    Raises:
        BudgetError: there is no room for what is read.
        UsageError: the model's file has no neuron records.
    """
    if plan is None:
        return Below(None)
    curve = None if disk is None else disk.curve
    ops, found = memory.host.ops, Below(plan, curve=curve)
    way = Way.of(curve)
    taken = IN_FLIGHT * way.largest + moving
    if isinstance(ops, StreamingOps):
        ops.reserve(memory)
        found.streaming = ops
        taken += PIECES_BYTES
    if all(layer.warm == plan.n_ff for layer in plan.layers):
        return found
    staging = sum(size for tier, purpose, size in plan.demands if (tier, purpose) == (Tier.RAM, Purpose.STAGING))
    if plan.mode is FfnMode.EXACT and found.streaming is None and staging >= taken + PIECES_BYTES:
        found.scanner = PieceStream()
        found.scanner.reserve(memory)
        taken += PIECES_BYTES
    scanner = found.scanner
    if found.streaming is not None and plan.mode is not FfnMode.DENSE:
        scanner = found.streaming.pieces
    bundle = _bundle(source, found.notices, tell)
    warm = sum((layer.warm - layer.hot) * layer.record_bytes for layer in plan.layers)
    room = warm + max(staging - taken - _biases(source, plan), 0)
    found.store = DiskStore(memory, room, way, bundle=bundle, scanner=scanner)
    seats = tuple(LayerSeat(layer.home, layer.hot, layer.hot, layer.predictor) for layer in plan.layers)
    found.seats = Seating(plan.embedding, plan.head, seats)
    return found


def _biases(source: ModelSource, plan: Plan) -> int:
    """Bytes of the biases of neurons that are not in VRAM: they are in RAM, wherever the records are."""
    spec = family_of(source).spec(source)
    return F32.block_bytes * sum(spec.n_ff - layer.hot for layer in plan.layers) if spec.ffn_bias else 0


def _bundle(source: ModelSource, notices: list[str], tell: Tell) -> Bundle | None:
    """The model's bundle, made if there is none yet; None where it cannot be made, and then in words why."""
    family = family_of(source)
    spec = family.spec(source)
    weights = family.weights(source, spec)
    layers: list[list[Weight]] = []
    for layer in range(spec.n_layer):
        matrices = layer_matrices(weights, layer)
        if matrices is None:
            raise UsageError(
                f"{printable(source.path.name)} has no neuron records, of which some could stay on disk: write a file "
                "that has them with `thermocline convert`, or raise --ram-budget"
            )
        layers.append(matrices)
    path = bundle_path(source.path)
    try:
        return read_bundle(path, source.fingerprint, layers)
    except ModelFormatError:
        pass
    try:
        return _written(path, source.fingerprint, layers, notices, tell)
    except OutputError as error:
        notices.append(f"each neuron takes {len(layers[0])} reads instead of one, as no bundle can be made: {error}")
        return None


def _written(path: Path, fingerprint: str, layers: list[list[Weight]], notices: list[str], tell: Tell) -> Bundle:
    if tell is not None:
        tell(f"bundling the neurons of {path.stem}, once, so that one read brings one")
    size = write_bundle(path, fingerprint, layers)
    notices.append(f"wrote {printable(path.name)} ({size / 1e9:.2f} GB), where one read brings a neuron")
    return read_bundle(path, fingerprint, layers)
