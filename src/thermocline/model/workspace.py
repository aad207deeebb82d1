"""The arrays of a step, made once, so that decoding allocates nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Array, Arrays

_ALONE: Mapping[Tier, Workspace] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Views:
    """The workspace's arrays cut to T tokens: flat (T, width), and by heads (T, heads, head_dim).

    What the workspace lacks is None. `scores` is None where T is more than the workspace has scores for; `active`
    (n_ff) is not cut.
    """

    x: Array
    normed: Array
    qkv: tuple[Array, Array, Array]
    q: Array
    k: Array
    v: Array
    mixed: Array
    mixed_flat: Array
    hidden: Array
    scores: Array
    active: Array


class Workspace:
    """Activations of up to `max_tokens` tokens and logits of up to `max_outputs` of them, on one device.

    `observed` adds the hidden activations of the FFN, which only observers read; `scored` the scores of a predictor
    for up to so many tokens, and the list of neurons that they select. A device that computes only parts of FFNs
    needs no `trunk`, and one without the output head no `logits`. `others` are the workspaces of the other devices.
    A workspace serves one step at a time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ops: Arrays,
        max_tokens: int,
        max_outputs: int | None = None,
        *,
        observed: bool = False,
        scored: int = 0,
        trunk: bool = True,
        logits: bool = True,
        others: Mapping[Tier, Workspace] = _ALONE,
    ) -> None:
        outputs = max_tokens if max_outputs is None else max_outputs
        if max_tokens < 1 or outputs < 1:
            raise UsageError(f"a workspace of {max_tokens} tokens and {outputs} outputs is empty; allowed: 1 or more")
        self._others = others
        self.max_tokens = max_tokens
        self.max_outputs = outputs
        self.scored = min(scored, max_tokens)
        self.x = ops.array((max_tokens, spec.n_embd))
        self.normed = ops.array((max_tokens, spec.n_embd))
        heads, heads_kv = (max_tokens, spec.n_head, spec.head_dim), (max_tokens, spec.n_head_kv, spec.head_dim)
        self.q, self.k, self.v, self.mixed = (
            _array(ops, shape, wanted=trunk) for shape in (heads, heads_kv, heads_kv, heads)
        )
        self.hidden = _array(ops, (max_tokens, spec.n_ff), wanted=observed)
        self.scores = _array(ops, (self.scored, spec.n_ff), wanted=scored > 0)
        self.active = _array(ops, (spec.n_ff,), "int32", wanted=scored > 0)
        self.last = _array(ops, (outputs, spec.n_embd), wanted=logits)
        self.logits = _array(ops, (outputs, spec.n_vocab), wanted=logits)
        self._views: dict[int, Views] = {}

    def on(self, tier: Tier) -> Workspace:
        """The workspace of a device."""
        return self._others.get(tier, self)

    def views(self, tokens: int) -> Views:
        """The arrays for that many tokens; the cuts are kept, as making them costs more than using them."""
        views = self._views.get(tokens)
        if views is None:
            views = self._views[tokens] = self._cut(tokens)
        return views

    def _cut(self, n: int) -> Views:
        def cut(array: Array) -> Array:
            return None if array is None else array[:n]

        def flat(array: Array) -> Array:
            return None if array is None else array[:n].reshape(n, -1)

        return Views(
            x=self.x[:n],
            normed=self.normed[:n],
            qkv=(flat(self.q), flat(self.k), flat(self.v)),
            q=cut(self.q),
            k=cut(self.k),
            v=cut(self.v),
            mixed=cut(self.mixed),
            mixed_flat=flat(self.mixed),
            hidden=cut(self.hidden),
            scores=None if self.scores is None or n > self.scored else self.scores[:n],
            active=self.active,
        )


def _array(ops: Arrays, shape: tuple[int, ...], dtype: str = "float32", *, wanted: bool) -> Array:
    return ops.array(shape, dtype) if wanted else None


def workspace_bytes(
    spec: ModelSpec,
    max_tokens: int,
    max_outputs: int | None = None,
    *,
    observed: bool = False,
    scored: int = 0,
    trunk: bool = True,
    logits: bool = True,
) -> int:
    """Bytes that `Workspace` with the same arguments reserves."""
    outputs = (max_tokens if max_outputs is None else max_outputs) if logits else 0
    heads = 2 * spec.n_q + 2 * spec.n_kv if trunk else 0
    token = 2 * spec.n_embd + heads + (spec.n_ff if observed else 0)
    predicted = (min(scored, max_tokens) + 1) * spec.n_ff if scored else 0
    return 4 * (predicted + max_tokens * token + outputs * (spec.n_embd + spec.n_vocab))
