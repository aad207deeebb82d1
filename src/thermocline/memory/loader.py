"""From an opened model to a network ready to run.

Every tensor is queued with the tier that shall have it, one flush moves them, and what was queued becomes layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from thermocline.activity.predictor import Predictor
from thermocline.config import Mode
from thermocline.errors import UsageError
from thermocline.files.weight import PickedWeight, Weight
from thermocline.hardware.machine import Tier
from thermocline.hardware.mapping import mappings_below, sheltered
from thermocline.memory import huge_pages
from thermocline.memory.allocator import Flushed, Slot
from thermocline.memory.arena import Memory
from thermocline.memory.checks import check_finite
from thermocline.memory.huge_pages import Progress
from thermocline.memory.movable import Movable
from thermocline.memory.neuron_loading import NeuronLoading
from thermocline.memory.neuron_store import NeuronStore
from thermocline.memory.queueing import Account, Later, Orders, held
from thermocline.memory.reblock import Reblocked
from thermocline.memory.residence import lock, release, settle, touch
from thermocline.model.families import family_of
from thermocline.model.layer import Layer, LayerPredictor
from thermocline.model.network import Transformer, resolve_mode
from thermocline.model.rope import rope_table
from thermocline.model.source import NetworkSource
from thermocline.model.tensors import check_tensors, has_records
from thermocline.ops.contract import Array, Ops
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import Seats, all_in


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did. `mapped_bytes` stay in the file's mapping, `resident_bytes` were made anew.

    The predictor's are counted apart. `own_bytes` of the mapping were replaced by huge pages of our own.
    """

    mapped_bytes: int
    resident_bytes: int
    reblocked: tuple[Reblocked, ...]
    seconds: float
    predictor_bytes: int = 0
    own_bytes: int = 0

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
    mapped: bool | None = None,
    aside: int = 0,
    progress: Progress | None = None,
    seats: Seats | None = None,
    order: Orders | None = None,
    store: NeuronStore | None = None,
    movable: Movable | None = None,
    sent_from: Sequence[int] = (),
    predicted_up_to: Sequence[int] = (),
) -> tuple[Transformer, LoadReport]:
    """Read the spec, hold the tensors to it, and place them where `seats` says: without, all beside `ops`.

    `n_ctx` is the longest context that will be run, 0 the model's own. Norms and biases are always looked at
    for NaN and infinity, and so are predictors, and down projections while they are transposed; `check` looks at
    every weight. With a `predictor`, the mode may be predicted, or changed to it later. Mapped weights are read in
    their order, which `progress` is told about, and with `mlock` kept in memory. They stay the file's if `mapped`, are
    copied to huge pages if it is False, and without it where that pays and memory has room for that and for `aside`
    bytes, and, unless a budget counts RAM, for the file beside it. `order` (n_layer, n_ff) is each layer's neurons,
    hottest first: layers whose records are cut are cut in this order, the others stay as they are.
    `store` answers for neurons that `seats` leaves on disk. With `movable`, which is filled, neurons can change places
    later on. `sent_from` are for each layer the tokens of a step from which its neurons in RAM are sent to VRAM to be
    computed there, 0 for never; without, they never are. `predicted_up_to` are for each layer the most tokens of a step
    that are computed by prediction; without, 1.

    Raises:
        ModelFormatError: the source contradicts itself, or the predictor is of another network.
        UnsupportedModelError: it asks for what is not implemented.
        NumericalError: weights are not finite.
        UsageError: the network cannot run in that mode, or cannot be cut as the seats say.
        HardwareError: the system does not allow so much memory to be locked, or has no room for a copy.
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
    account = Account(spec, memory, weights, seats)
    loading = _Loading(account, NeuronLoading(account, mode, order, store, movable, sent_from), n_ctx)
    try:
        if predictor is not None:
            loading.queue_predictor(source, predictor, predicted_up_to or (1,) * spec.n_layer)
        build = loading.queue_all(mode)
        views = [weight.data for weight in weights.values() if not isinstance(weight, PickedWeight)]
        copied = mapped is not True and not budgeted
        copied = copied and huge_pages.have_room(account.allocator.ram_bytes, aside, beside_file=mapped is None)
        arranged = account.allocator.arrange() if copied else 0
        with sheltered(mappings_below(views)):
            loading.flushed = account.allocator.flush(progress if budgeted or arranged else None)
        release(loading.flushed.left)  # before any of it may be replaced by a copy
        transformer = build()
        loading.ffn.give_lanes()
        held = loading.flushed.host_bytes
        if mapped is False or (mapped is None and huge_pages.pays(held, aside, budgeted=budgeted)):
            with sheltered(mappings_below(held)):
                loading.own_bytes = huge_pages.copy(held, progress, budgeted=budgeted and mapped is None)
        if store is not None or (budgeted and loading.own_bytes):
            settle(source.path, held)
        if mlock:
            lock(held)
    except BaseException:
        memory.close()
        raise
    return transformer, loading.report(time.perf_counter() - began)


@dataclass(slots=True)
class _Loading:
    """The network, as it is put together while its tensors are queued and placed."""

    account: Account
    ffn: NeuronLoading
    n_ctx: int
    predictor_bytes: int = 0
    own_bytes: int = 0
    flushed: Flushed = field(default_factory=Flushed)
    predictors: list[Later[LayerPredictor]] = field(default_factory=list)
    ropes: dict[Tier, Array] = field(default_factory=dict)

    def queue_all(self, mode: Mode) -> Later[Transformer]:
        """Queue the whole network."""
        spec, seats = self.account.spec, self.account.seats
        entry, exit_ = self.account.device(seats.embedding), self.account.device(seats.head)
        shared = spec.tied_embeddings and seats.embedding is seats.head
        purpose = Purpose.OUTPUT if shared else Purpose.EMBEDDING
        embedding = self.account.queue("token_embd.weight", seats.embedding, purpose)
        positions = None
        if spec.n_positions:
            positions = self.account.queue("position_embd.weight", seats.embedding, Purpose.EMBEDDING)
        head = embedding
        if not shared:
            name = "token_embd.weight" if spec.tied_embeddings else "output.weight"
            head = self.account.queue(name, seats.head, Purpose.OUTPUT)
        layers = [self.layer(i) for i in range(spec.n_layer)]
        return lambda: Transformer(
            spec=spec,
            entry=entry,
            embedding=embedding.matrix,
            layers=tuple(layer() for layer in layers),
            exit=exit_,
            output_norm=self.account.norm("output_norm", seats.head, Purpose.OUTPUT),
            head=(head.matrix,),
            positions=None if positions is None else positions.matrix,
            n_ctx=self.n_ctx,
            mode=mode,
        )

    def layer(self, index: int) -> Later[Layer]:
        """Queue a layer; norms, biases and the table of rotations are made when it is built."""
        spec, blk, seat = self.account.spec, f"blk.{index}.", self.account.seats.layers[index]
        home, device = seat.home, self.account.device(seat.home)
        qkv = [self.account.queue(f"{blk}attn_{part}.weight", home, Purpose.ATTENTION) for part in "qkv"]
        out = self.account.queue(blk + "attn_output.weight", home, Purpose.ATTENTION)
        ffn = self.ffn.feed_forward(index)

        def build() -> Layer:
            def vector(name: str) -> Array:
                return self.account.vector(blk + name, home, Purpose.ATTENTION)

            bias = [vector(f"attn_{part}.bias") for part in "qkv"] if spec.qkv_bias else None
            return Layer(
                device=device,
                home=home,
                rope=self.rope(home),
                attn_norm=self.account.norm(blk + "attn_norm", home, Purpose.ATTENTION),
                qkv=(qkv[0].matrix, qkv[1].matrix, qkv[2].matrix),
                qkv_bias=(bias[0], bias[1], bias[2]) if bias else None,
                q_norm=vector("attn_q_norm.weight") if spec.qk_norm else None,
                k_norm=vector("attn_k_norm.weight") if spec.qk_norm else None,
                out=(out.matrix,),
                out_bias=(vector("attn_output.bias"),) if spec.out_bias else None,
                ffn_norm=None if spec.shared_norm else self.account.norm(blk + "ffn_norm", home, Purpose.ATTENTION),
                ffn=ffn(),
                down_bias=vector(self.down_bias) if spec.ffn_bias else None,
                window=spec.windows[index],
                predictor=self.predictors[index]() if self.predictors else None,
            )

        return build

    def queue_predictor(self, source: NetworkSource, predictor: Predictor, up_to: Sequence[int]) -> None:
        """Queue the layers' predictors, looked at for NaN and infinity. Their neurons are in the layers' order."""
        predictor.require_fits(source.path, self.account.spec)
        matrices: dict[str, Weight] = {}
        for index, layer in enumerate(predictor.layers):
            matrices |= {f"predictor of layer {index}, fc1": layer.fc1, f"predictor of layer {index}, fc2": layer.fc2}
        check_finite(matrices, self.account.memory.host.ops)
        self.predictor_bytes = predictor.nbytes
        for index, layer in enumerate(predictor.layers):
            seat = self.account.seats.layers[index]
            tier = held(seat.predictor or seat.home)
            queue = partial(self.account.allocator.queue, tier=tier, purpose=Purpose.PREDICTOR)
            fc1 = queue(layer.fc1)
            fc2 = queue(layer.fc2, rows=self.ffn.order_of(index), as_stored=self.ffn.movable is not None)
            self.ffn.scored.append((layer.fc2, fc2))
            self.predictors.append(
                partial(self.placed_predictor, tier, fc1, fc2, predictor.thresholds[index], up_to[index])
            )

    def placed_predictor(self, tier: Tier, fc1: Slot, fc2: Slot, threshold: float, tokens: int) -> LayerPredictor:
        return LayerPredictor(self.account.device(tier), fc1.matrix, fc2.matrix, threshold, tokens)

    @property
    def down_bias(self) -> str:
        """What a layer's bias of the down projection is called in this file."""
        return "ffn_down_t.bias" if has_records(self.account.weights) else "ffn_down.bias"

    def rope(self, tier: Tier) -> Array | None:
        """The table of rotations on a device."""
        tier = held(tier)
        if self.account.spec.rope is None:
            return None
        if tier not in self.ropes:
            self.ropes[tier] = self.account.made(
                rope_table(self.account.spec.rope, self.n_ctx), tier, Purpose.ACTIVATIONS
            )
        return self.ropes[tier]

    def report(self, seconds: float) -> LoadReport:
        mapped, copied = (
            sum(size for purpose, size in sizes.items() if purpose is not Purpose.PREDICTOR)
            for sizes in (self.flushed.mapped, self.flushed.copied)
        )
        return LoadReport(
            mapped,
            copied + self.account.vector_bytes,
            tuple(self.ffn.reblocked),
            seconds,
            self.predictor_bytes,
            self.own_bytes,
        )
