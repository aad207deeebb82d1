"""The FFN: one token neuron by neuron, many tokens by matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from thermocline.ops.contract import Activation, ActiveSet, FfnKind, FfnWork, NeuronBlock
from thermocline.ops.cuda.layout import DeviceMatrix
from thermocline.ops.cuda.tuning import power_of_two

if TYPE_CHECKING:
    from thermocline.ops.cuda.ops import CudaOps

Tensor = torch.Tensor

ACTIVATIONS: Final = {Activation.SILU: 0, Activation.RELU: 1, Activation.RELU2: 2, Activation.GELU: 3}
NOTHING: Final = FfnWork(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class DeviceSet(ActiveSet):
    """An active set whose length only the device knows: `indices` is the whole array, `count` int32 (1)."""

    count: Tensor | None = None


def ffn(
    ops: CudaOps, x: Tensor, block: NeuronBlock, active: ActiveSet, out: Tensor,
    *, skip_zeros: bool, hidden: Tensor | None,
) -> FfnWork:  # fmt: skip
    """See the contract."""
    if len(x) == 1:
        return _one(ops, x, block, active, out, skip=skip_zeros and block.records, hidden=hidden)
    return _many(ops, x, block, active, out, skip=skip_zeros and block.records, hidden=hidden)


def _one(
    ops: CudaOps, x: Tensor, block: NeuronBlock, active: ActiveSet, out: Tensor,
    *, skip: bool, hidden: Tensor | None,
) -> FfnWork:  # fmt: skip
    ids, count, limit = _listed(ops, block, active)
    work = ops.counts if ops.counts is not None else ops.scratch.take("work", (4,), torch.int64).zero_()
    h = ops.scratch.take("h", (block.neurons,))
    _open(ops, x, block, ids, count, limit, h, work, skip=skip)
    if block.records:
        _add_records(ops, block, ids, count, limit, h, out, work, skip=skip)
    spread = None
    if hidden is not None or not block.records:
        spread = h[None] if ids is None else _spread(ops, block, ids, count, limit, h)
    if spread is not None and not block.records:
        ops.matvec(spread, block.down, out, add=True)
    if hidden is not None and spread is not None:
        hidden.copy_(spread)
    if ops.counts is not None:
        return NOTHING
    gate, up, down, fired = work.tolist()
    if not block.records:
        down, fired = limit, int(torch.count_nonzero(h[:limit]))
    return FfnWork(gate, up, down, fired)


def _listed(ops: CudaOps, block: NeuronBlock, active: ActiveSet) -> tuple[Tensor | None, Tensor | None, int]:
    """Ids, their count where only the device knows it, and the most there can be."""
    if active.indices is None:
        return None, None, block.neurons
    ids: Any = active.indices
    if isinstance(active, DeviceSet):
        return ids, active.count, block.neurons
    ids = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(ids).to(ops.device)
    return ids, None, len(ids)


def _open(
    ops: CudaOps, x: Tensor, block: NeuronBlock, ids: Tensor | None, count: Tensor | None, limit: int,
    h: Tensor, work: Tensor, *, skip: bool,
) -> None:  # fmt: skip
    up: DeviceMatrix = block.up
    gate: DeviceMatrix = block.gate if block.gate is not None else up
    tuning, kind = ops.tuning, block.kind
    rows = tuning.neuron_rows
    ops.launcher(
        "gate_up", (-(-limit // rows),),
        x=x, **gate.arguments("gate"), **up.arguments("up"), up_bias=block.up_bias, places=block.rows,
        ids=ids, count=count, neurons=limit,
        columns=up.columns, threshold=float(kind.threshold), h=h, work=work,
        GATED=block.gate is not None, BOTH=kind.both, ACTIVATION=ACTIVATIONS[kind.activation], SKIP=skip,
        ROWS=rows, BLOCK=min(tuning.neuron_block_of(gate), tuning.neuron_block_of(up)), num_warps=tuning.warps,
    )  # fmt: skip


def _add_records(
    ops: CudaOps, block: NeuronBlock, ids: Tensor | None, count: Tensor | None, limit: int,
    h: Tensor, out: Tensor, work: Tensor, *, skip: bool,
) -> None:  # fmt: skip
    tuning, down = ops.tuning, block.down
    groups = tuning.groups(block.neurons)
    room = -(-block.neurons // groups)
    listed = {
        "rows": ops.scratch.take("rows", (groups, room), torch.int32),
        "values": ops.scratch.take("values", (groups, room)),
        "sizes": ops.scratch.take("sizes", (groups,), torch.int32),
    }
    partial = ops.scratch.take("partial", (groups, down.columns))
    if not limit:
        return
    ops.launcher(
        "list_groups", (groups,),
        h=h, places=block.rows, ids=ids, count=count, neurons=limit, room=room, **listed, work=work,
        SKIP=skip, GROUPS=groups, BLOCK=min(1024, power_of_two(room)), num_warps=4,
    )  # fmt: skip
    width = tuning.record_block_of(down)
    ops.launcher(
        "add_rows", (groups, -(-down.columns // width)),
        **down.arguments("down"), columns=down.columns, room=room, **listed, partial=partial,
        AHEAD=tuning.ahead_of(down), BLOCK=width, num_warps=tuning.record_warps_of(down),
    )  # fmt: skip
    ops.launcher(
        "add_groups", (-(-down.columns // 128),),
        partial=partial, out=out, columns=down.columns, GROUPS=groups, BLOCK=128, num_warps=1,
    )  # fmt: skip


def _spread(ops: CudaOps, block: NeuronBlock, ids: Tensor, count: Tensor | None, limit: int, h: Tensor) -> Tensor:
    """Activations (1, neurons) by id, of h by position."""
    if count is not None:
        limit = int(count.item())
    full = ops.scratch.take("hidden", (1, block.neurons)).zero_()
    full[0, ids[:limit].long()] = h[:limit]
    return full


def _many(
    ops: CudaOps, x: Tensor, block: NeuronBlock, active: ActiveSet, out: Tensor,
    *, skip: bool, hidden: Tensor | None,
) -> FfnWork:  # fmt: skip
    tokens, n = len(x), block.neurons
    computed: Tensor | None = None
    ids, count, rows = _listed(ops, block, active)
    if ids is not None:
        rows = int(count.item()) if count is not None else rows
        computed = ops.scratch.take("computed", (n,), torch.uint8).zero_()
        computed[ids[:rows].long()] = 1
    if not rows:
        if hidden is not None:
            hidden.zero_()
        return NOTHING
    places = block.rows
    if places is not None and ids is not None and computed is not None:  # the others' rows are nowhere
        places = torch.where(computed != 0, places, places[ids[0].long()])
    h = ops.scratch.take("up", (tokens, n))
    ops.matmul(x, block.up, h, block.up_bias, rows=places)
    gate = None
    if block.gate is not None:
        gate = ops.scratch.take("gate", (tokens, n))
        ops.matmul(x, block.gate, gate, rows=places)
    seen = ops.scratch.take("seen", (2, n), torch.int32).zero_()
    work = ops.scratch.take("work", (4,), torch.int64).zero_()
    _activate(ops, h, gate, computed, block.kind, seen, work)
    if block.records:
        for start, part in ops.decoded(block.down, places):
            with ops.precision():
                out.addmm_(h[:, start : start + len(part)], part)
    else:
        ops.matmul(h, block.down, out, add=True)
    if hidden is not None:
        hidden.copy_(h)
    opened, touched = seen.sum(dim=1, dtype=torch.int64).unbind()
    work[0] = rows if gate is not None else 0
    work[1] = opened if skip and gate is not None else rows
    work[2] = touched if skip else rows
    if ops.counts is not None:
        ops.counts.add_(work)
        return NOTHING
    return FfnWork(*work.tolist())


def _activate(
    ops: CudaOps, up: Tensor, gate: Tensor | None, computed: Tensor | None, kind: FfnKind, seen: Tensor, work: Tensor
) -> None:
    """`up` becomes the activations; who opened and fired is marked in `seen`, fired activations are counted."""
    tokens, n = up.shape
    block, some = min(power_of_two(n), 1024), 8
    ops.launcher(
        "activate", (-(-n // block), -(-tokens // some)),
        gate=gate, up=up, computed=computed, tokens=tokens, neurons=n, threshold=float(kind.threshold),
        opened=seen[0], touched=seen[1], work=work, GATED=gate is not None, BOTH=kind.both,
        ACTIVATION=ACTIVATIONS[kind.activation], TOKENS=some, BLOCK=block, num_warps=4,
    )  # fmt: skip
