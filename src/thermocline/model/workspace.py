"""The arrays of a step, made once, so that decoding allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.errors import UsageError
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Array, Ops


@dataclass(frozen=True, slots=True)
class Views:
    """The workspace's arrays cut to T tokens: flat (T, width), and by heads (T, heads, head_dim).

    `scores` is None where T is more than the workspace has scores for; `active` (n_ff) is not cut.
    """

    x: Array
    normed: Array
    qkv: tuple[Array, Array, Array]
    q: Array
    k: Array
    v: Array
    mixed: Array
    mixed_flat: Array
    hidden: Array | None
    scores: Array | None
    active: Array | None


class Workspace:
    """Activations of up to `max_tokens` tokens and logits of up to `max_outputs` of them.

    `observed` adds the hidden activations of the FFN, which only observers read; `scored` the scores of a predictor
    for up to so many tokens, and the list of neurons that they select. A workspace serves one step at a time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ops: Ops,
        max_tokens: int,
        max_outputs: int | None = None,
        *,
        observed: bool = False,
        scored: int = 0,
    ) -> None:
        outputs = max_tokens if max_outputs is None else max_outputs
        if max_tokens < 1 or outputs < 1:
            raise UsageError(f"a workspace of {max_tokens} tokens and {outputs} outputs is empty; allowed: 1 or more")
        self.max_tokens = max_tokens
        self.max_outputs = outputs
        self.scored = min(scored, max_tokens)
        self.x = ops.array((max_tokens, spec.n_embd))
        self.normed = ops.array((max_tokens, spec.n_embd))
        self.q = ops.array((max_tokens, spec.n_head, spec.head_dim))
        self.k = ops.array((max_tokens, spec.n_head_kv, spec.head_dim))
        self.v = ops.array((max_tokens, spec.n_head_kv, spec.head_dim))
        self.mixed = ops.array((max_tokens, spec.n_head, spec.head_dim))
        self.hidden = ops.array((max_tokens, spec.n_ff)) if observed else None
        self.scores = ops.array((self.scored, spec.n_ff)) if scored else None
        self.active = ops.array((spec.n_ff,), "int32") if scored else None
        self.last = ops.array((outputs, spec.n_embd))
        self.logits = ops.array((outputs, spec.n_vocab))
        self._views: dict[int, Views] = {}

    def views(self, tokens: int) -> Views:
        """The arrays for that many tokens; the cuts are kept, as making them costs more than using them."""
        views = self._views.get(tokens)
        if views is None:
            views = self._views[tokens] = self._cut(tokens)
        return views

    def _cut(self, n: int) -> Views:
        def flat(array: Array) -> Array:
            return array[:n].reshape(n, -1)

        return Views(
            x=self.x[:n],
            normed=self.normed[:n],
            qkv=(flat(self.q), flat(self.k), flat(self.v)),
            q=self.q[:n],
            k=self.k[:n],
            v=self.v[:n],
            mixed=self.mixed[:n],
            mixed_flat=flat(self.mixed),
            hidden=None if self.hidden is None else self.hidden[:n],
            scores=None if self.scores is None or n > self.scored else self.scores[:n],
            active=self.active,
        )


def workspace_bytes(
    spec: ModelSpec, max_tokens: int, max_outputs: int | None = None, *, observed: bool = False, scored: int = 0
) -> int:
    """Bytes that `Workspace` with the same arguments reserves."""
    outputs = max_tokens if max_outputs is None else max_outputs
    token = 2 * spec.n_embd + 2 * spec.n_q + 2 * spec.n_kv + (spec.n_ff if observed else 0)
    predicted = (min(scored, max_tokens) + 1) * spec.n_ff if scored else 0
    return 4 * (predicted + max_tokens * token + outputs * (spec.n_embd + spec.n_vocab))
