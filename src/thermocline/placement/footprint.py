"""What a model weighs: the bytes of everything that is placed, and the arithmetic that goes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from thermocline.errors import UsageError
from thermocline.files.formats import F32, BlockFormat
from thermocline.files.weight import Weight
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import record_format

NEURON_PARTS = ("gate.", "up.", "down.", "down_t.")
"""What of `blk.N.ffn_*` belongs to neurons, but for the bias of down, which is added once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes and sizes of a model, layer by layer; all that placement needs to know of it.

    `attention[l]` counts the bytes of a layer's attention matrices, biases and both norms. `records[l]` is the
    bytes of one neuron's gate row (0 without a gate), up row and down column. `predictor[l]` is the bytes of
    the layer's predictor, 0 for none. `head` counts the output norm too; with tied embeddings it is the
    embedding's matrix, stored once. `kv_token` is the bytes that one token takes in one layer's cache.
    `windows` are the sliding windows in tokens, 0 for none. `attention_params` is the number of weights of
    a layer's attention matrices. `positions` is the bytes of learned positions, which lie with the embedding;
    `rope_token` what one position takes in the table of rotations. `vectors` are the bytes of each layer's attention
    that are no matrices and `head_vectors` those of the head, which are in memory wherever the matrices are.
    `biases` is what those of all neurons take: with a disk tier they are in RAM. `fingerprint` identifies the model's
    file.
    """

    name: str
    fingerprint: str
    n_embd: int
    n_ff: int
    n_vocab: int
    n_q: int
    attention: tuple[int, ...]
    attention_params: int
    records: tuple[tuple[int, int, int], ...]
    predictor: tuple[int, ...]
    embedding: int
    head: int
    tied: bool
    kv_token: int
    windows: tuple[int, ...]
    positions: int = 0
    rope_token: int = 0
    vectors: tuple[int, ...] = ()
    head_vectors: int = 0
    biases: int = 0

    def __post_init__(self) -> None:
        layers = len(self.attention)
        object.__setattr__(self, "vectors", self.vectors or (0,) * layers)
        counted = {len(part) for part in (self.records, self.predictor, self.windows, self.vectors)}
        if not layers or counted != {layers}:
            raise UsageError(f"the footprint of {self.name} does not count the same layers everywhere")
        sizes = [getattr(self, f.name) for f in fields(self) if f.type == "int"]
        sizes += [*self.attention, *self.predictor, *self.windows, *self.vectors, *(b for r in self.records for b in r)]
        if min(sizes) < 0 or self.n_ff < 1:
            raise UsageError(f"the footprint of {self.name} has a negative or empty size")

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.attention)

    @property
    def gated(self) -> bool:
        """Whether neurons have a gate row."""
        return self.records[0][0] > 0

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, predictors included."""
        ffn = self.n_ff * sum(sum(record) for record in self.records)
        table = 0 if self.tied else self.embedding
        return sum(self.attention) + ffn + sum(self.predictor) + table + self.positions + self.head

    @property
    def trunk(self) -> int:
        """Bytes of what cannot be left on disk: everything but the neuron records."""
        return self.nbytes - self.n_ff * sum(sum(record) for record in self.records)

    def kv_layer(self, context: int, batch: int = 1) -> int:
        """Bytes of one layer's cache for `batch` sequences of up to `context` tokens."""
        return self.kv_token * context * batch

    @classmethod
    def of_sizes(
        cls,
        name: str,
        *,
        n_layer: int,
        n_embd: int,
        n_ff: int,
        n_vocab: int,
        n_head: int,
        n_head_kv: int,
        head_dim: int,
        gated: bool,
        fmt: BlockFormat,
        tied: bool = False,
        windows: Sequence[int] | None = None,
        kv_element: int = 2,
        predictor_rank: int = 0,
    ) -> Footprint:
        """The footprint of a network with all its matrices in one format and predictors of one rank.

        Its fingerprint is of the sizes: it stands for no file. `kv_element` is the bytes of a cached number.
        """
        n_q, n_kv = n_head * head_dim, n_head_kv * head_dim
        matrices = (2 * n_q + 2 * n_kv) * n_embd
        row = fmt.row_bytes(n_embd)
        attention = (n_q + 2 * n_kv) * row + n_embd * fmt.row_bytes(n_q) + 2 * n_embd * F32.block_bytes
        predictor = predictor_rank * row + n_ff * fmt.row_bytes(predictor_rank)
        sizes = (n_layer, n_embd, n_ff, n_vocab, n_head, n_head_kv, head_dim, gated, fmt.name, tied, predictor_rank)
        return cls(
            name=name,
            fingerprint=hashlib.sha256(repr((name, *sizes)).encode()).hexdigest(),
            n_embd=n_embd,
            n_ff=n_ff,
            n_vocab=n_vocab,
            n_q=n_q,
            attention=(attention,) * n_layer,
            attention_params=matrices,
            records=((row if gated else 0, row, row),) * n_layer,
            predictor=(predictor,) * n_layer,
            embedding=n_vocab * row,
            head=n_vocab * row + n_embd * F32.block_bytes,
            tied=tied,
            kv_token=2 * n_kv * kv_element,
            windows=tuple(windows) if windows is not None else (0,) * n_layer,
            vectors=(2 * n_embd * F32.block_bytes,) * n_layer,
            head_vectors=n_embd * F32.block_bytes,
        )


def footprint_of(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    fingerprint: str,
    *,
    kv_token: int,
    predictor: Sequence[int] | None = None,
) -> Footprint:
    """The footprint of a model as its file stores it.

    `weights` go by canonical names. `kv_token` is the bytes of one token in one layer's cache. `predictor`
    gives the bytes of each layer's predictor; None means that there are none. A down matrix in the standard
    layout is counted as the records that it is turned into: n_ff rows of n_embd elements.
    """
    layers = range(spec.n_layer)

    def row(layer: int, name: str) -> int:
        weight = weights.get(f"blk.{layer}.{name}.weight")
        return 0 if weight is None else weight.format.row_bytes(weight.columns)

    def record(layer: int) -> tuple[int, int, int]:
        down = weights.get(f"blk.{layer}.ffn_down.weight")
        if down is None:
            column = row(layer, "ffn_down_t")
        else:
            column = (record_format(down) if spec.ffn.sparse else down.format).row_bytes(spec.n_embd)
        bias = F32.block_bytes if f"blk.{layer}.ffn_up.bias" in weights else 0
        return row(layer, "ffn_gate"), row(layer, "ffn_up") + bias, column

    def rest(layer: int) -> list[Weight]:
        prefix, neurons = f"blk.{layer}.", tuple(f"blk.{layer}.ffn_{part}" for part in NEURON_PARTS)
        own = [w for name, w in weights.items() if name.startswith(prefix) and not name.startswith(neurons)]
        return own + [w for name, w in weights.items() if name.startswith(f"{prefix}ffn_down") and w.rows == 1]

    others = [rest(layer) for layer in layers]
    norm = sum(_resident(w) for name, w in weights.items() if name.startswith("output_norm."))
    embedding = weights["token_embd.weight"].nbytes
    head = embedding if spec.tied_embeddings else weights["output.weight"].nbytes
    return Footprint(
        name=spec.name,
        fingerprint=fingerprint,
        n_embd=spec.n_embd,
        n_ff=spec.n_ff,
        n_vocab=spec.n_vocab,
        n_q=spec.n_q,
        attention=tuple(sum(map(_resident, parts)) for parts in others),
        attention_params=spec.n_embd * (2 * spec.n_q + 2 * spec.n_kv),
        records=tuple(record(layer) for layer in layers),
        predictor=tuple(predictor) if predictor is not None else (0,) * spec.n_layer,
        embedding=embedding,
        head=head + norm,
        tied=spec.tied_embeddings,
        kv_token=kv_token,
        windows=spec.windows,
        positions=weights["position_embd.weight"].nbytes if spec.n_positions else 0,
        rope_token=F32.block_bytes * spec.rope.rotary_dim if spec.rope is not None else 0,
        vectors=tuple(sum(_resident(w) for w in parts if w.rows == 1) for parts in others),
        head_vectors=norm,
        biases=F32.row_bytes(spec.n_ff) * sum(f"blk.{layer}.ffn_up.bias" in weights for layer in layers),
    )


def _resident(weight: Weight) -> int:
    """Bytes of a tensor in memory: vectors are float32, whatever the file has."""
    return F32.row_bytes(weight.columns) if weight.rows == 1 else weight.nbytes
