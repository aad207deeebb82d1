"""Makes synthetic ReLU models of any family and size whose neurons fire as often as asked.

    python -m benchmarks.synthetic --shape 1.3b --active 0.12 --outtype f16 q8_0 q4_0 q4_k_m -o models/
    python -m benchmarks.synthetic --family opt --shape 1.3b --n-ff 8192 --n-layer 12 -o models/

writes each type twice: in the standard layout, which other engines read, and with down as neuron records,
ready to map; and the model's predictor beside each.

The numbers are random, the sparsity is honest: in every layer neuron n fires with its own frequency,
and the frequencies follow a power law. Every embedding contains a common direction u, which attention and
FFN never write to, so u·x > 0 everywhere. The gate is W = A·B - b·uᵀ, where the rows of B are orthonormal
and perpendicular to u; the offset b of each neuron is fitted on calibration tokens. Because a norm only
scales x, the sign of the gate is that of A·(B·x) - b·(u·x): a low-rank predictor with
fc1 = [B; -B; u] and fc2 = [A, -A, -b] is exact. A LayerNorm does no more than that either, for with one all that is
added to the residual stream has a mean of zero. Without a gate, up is made so; where up is activated too (dReLU), it
is made positive. Rounded to a block format it is not: its thresholds are set so that
it misses one firing neuron in two hundred of the calibration tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

from benchmarks.synthetic_families import KINDS, NORM_EPS, POSITIONS, ROPE_BASE, SHAPES, Shape, metadata
from thermocline.activity.predictor import Predictor, save_predictor
from thermocline.files.companion import companion
from thermocline.files.formats import BY_NAME, F32, Q4_K, Q5_K, Q6_K, BlockFormat
from thermocline.files.gguf_writer import write_gguf
from thermocline.files.open import open_model
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float, to_float
from thermocline.files.sidecar import SidecarKind
from thermocline.files.weight import Weight
from thermocline.model.families.opt import OFFSET

Floats = npt.NDArray[np.float32]

GATE_RANK = 255
CALIBRATION_TOKENS = 512
MISSED = 0.005
"""Share of the firing neurons of the calibration tokens whose score is below the threshold."""
RESIDUAL_SHARE = 0.25
"""What all layers add to the residual stream, against the embedding. It keeps the state of a token near what the
offsets were fitted on, even where a greedy text repeats itself and attention adds up."""
POSITION_SHARE = 0.1
"""What a learned position adds to the residual stream, against the embedding."""
UP_OVER_DEVIATION = 4.0
"""Mean of up where it must be positive, over its deviation."""


@dataclass(frozen=True, slots=True)
class GateFactors:
    """The gate of a layer as A·B - b·uᵀ: a (n_ff, r), b (n_ff), basis B (r, n_embd), u (n_embd)."""

    a: Floats
    b: Floats
    basis: Floats
    u: Floats

    def predictor(self) -> PredictorLayer:
        """The exact predictor of this gate, up to the scale of the norm."""
        fc1 = np.concatenate([self.basis, -self.basis, self.u[None]])
        fc2 = np.concatenate([self.a, -self.a, -self.b[:, None]], axis=1)
        return PredictorLayer(from_float("fc1", fc1, F32), from_float("fc2", fc2, F32))


def frequencies(n_ff: int, mean: float, rng: np.random.Generator) -> Floats:
    """How often each neuron fires: (rank + 64)^-1.42 with the wanted mean, clipped, in random order."""
    law = (np.arange(n_ff) + 64.0) ** -1.42
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(law * middle, 5e-4, 0.97).mean() < mean:
            low = middle
        else:
            high = middle
    return rng.permutation(np.clip(law * low, 5e-4, 0.97)).astype(np.float32)


class Generator:
    """Draws a model layer by layer while calibration tokens run through it."""

    def __init__(self, shape: Shape, active: float, seed: int, family: str = "llama") -> None:
        self.shape, self.active, self.family, self.kind = shape, active, family, KINDS[family]
        self.rng = np.random.default_rng(seed)
        self.u = self._unit(self._centred(self._normal(1, shape.n_embd)))[0]
        random = self._unit(self._off_u(self._normal(shape.n_vocab, shape.n_embd)))
        self.embedding = (random + self.u) * np.float32(np.sqrt(shape.n_embd))
        self.tokens = self.rng.integers(0, shape.n_vocab, CALIBRATION_TOKENS)
        """What the offsets are fitted on."""
        self.x = self.embedding[self.tokens]
        if self.kind.learned:
            random = self._normal(POSITIONS + OFFSET, shape.n_embd)
            self.positions = self._off_u(random) * np.float32(POSITION_SHARE)
            self.x = self.x + self.positions[OFFSET : OFFSET + CALIBRATION_TOKENS]
        self.measured: list[float] = []
        self.predictions: list[tuple[PredictorLayer, Floats, npt.NDArray[np.bool_]]] = []
        """Of every layer the exact predictor, the calibration tokens' residual streams, and which neurons fired."""

    def tensors(self) -> Iterator[tuple[str, Floats]]:
        """Names and values in the file's order; `ffn_down` comes as records (n_ff, n_embd)."""
        yield "token_embd", self.embedding
        if self.kind.learned:
            yield "position_embd", self.positions
        for layer in range(self.shape.n_layer):
            for name, value in self._layer():
                yield f"blk.{layer}.{name}", value
        yield from self._norm_tensors("output_norm")
        yield "output", self._normal(self.shape.n_vocab, self.shape.n_embd) / np.sqrt(self.shape.n_embd)

    def _layer(self) -> Iterator[tuple[str, Floats]]:
        s, kind = self.shape, self.kind
        spread = np.float32(1 / np.sqrt(s.n_embd))
        share = np.float32(RESIDUAL_SHARE / np.sqrt(s.n_layer))
        q = self._normal(s.n_head * s.head_dim, s.n_embd) * spread
        k, v = (self._normal(s.n_head_kv * s.head_dim, s.n_embd) * spread for _ in range(2))
        o = self._off_u((self._normal(s.n_embd, s.n_head * s.head_dim) * spread * share).T).T
        start = self.x.copy()
        self.x += self._attention(_norm(start), q, k, v) @ o.T
        seen = start if kind.parallel else self.x.copy()
        h = _norm(seen)
        factors = self._gate_factors(h)
        gate = factors.a @ factors.basis - np.outer(factors.b, factors.u)
        up = self._up() if kind.gated else gate
        down = self._off_u(self._normal(s.n_ff, s.n_embd) * share / np.float32(np.sqrt(s.n_ff)))
        hidden = self._hidden(h, gate, up)
        self.predictions.append((factors.predictor(), seen, hidden != 0))
        self.measured.append(float((hidden != 0).mean()))
        self.x += hidden @ down
        yield from self._norm_tensors("attn_norm")
        yield from self._attention_tensors(q, k, v, o)
        if not kind.parallel:
            yield from self._norm_tensors("ffn_norm")
        if kind.gated:
            yield "ffn_gate", gate
        yield from (("ffn_up", up), ("ffn_down", down))
        if kind.biases:
            yield from (("ffn_up.bias", _zeros(s.n_ff)), ("ffn_down.bias", _zeros(s.n_embd)))

    def _attention_tensors(self, q: Floats, k: Floats, v: Floats, o: Floats) -> Iterator[tuple[str, Floats]]:
        if self.kind.fused:
            yield from (("attn_qkv", np.concatenate([q, k, v])), ("attn_output", o))
            return
        for part, value in (("attn_q", q), ("attn_k", k), ("attn_v", v), ("attn_output", o)):
            yield part, value
            if self.kind.biases:
                yield f"{part}.bias", _zeros(len(value))
        if self.kind.qk_norm:
            ones = np.ones((1, self.shape.head_dim), np.float32)
            yield from (("attn_q_norm", ones), ("attn_k_norm", ones))

    def _norm_tensors(self, name: str) -> Iterator[tuple[str, Floats]]:
        yield name, np.ones((1, self.shape.n_embd), np.float32)
        if self.kind.layer_norm:
            yield f"{name}.bias", _zeros(self.shape.n_embd)

    def _up(self) -> Floats:
        s = self.shape
        up = self._normal(s.n_ff, s.n_embd) * np.float32(1 / np.sqrt(s.n_embd))
        if not self.kind.both:
            return up
        # Of a normed token, half of whose square lies along u, this takes a mean of 1.
        along = self.u / np.float32(np.sqrt(s.n_embd / 2))
        positive: Floats = self._off_u(up) / np.float32(UP_OVER_DEVIATION) + along
        return positive

    def _hidden(self, h: Floats, gate: Floats, up: Floats) -> Floats:
        kind = self.kind
        fired: Floats = np.maximum(h @ gate.T, np.float32(0))
        if kind.gated:
            other = h @ up.T
            fired *= np.maximum(other, np.float32(0)) if kind.both else other
        elif kind.activation == "relu2":
            fired *= fired
        return fired

    def _gate_factors(self, h: Floats) -> GateFactors:
        s = self.shape
        random = self._off_u(self._normal(GATE_RANK, s.n_embd))
        basis = np.linalg.qr(random.T.astype(np.float64))[0].T.astype(np.float32)
        a = self._normal(s.n_ff, GATE_RANK) / np.float32(np.sqrt(GATE_RANK))
        ratio = (h @ basis.T) @ a.T / (h @ self.u)[:, None]
        wanted = frequencies(s.n_ff, self.active, self.rng)
        ratio.sort(axis=0)
        rank = np.clip(((1 - wanted) * len(h)).astype(int), 0, len(h) - 1)
        return GateFactors(a, ratio[rank, np.arange(s.n_ff)], basis, self.u)

    def _attention(self, h: Floats, q: Floats, k: Floats, v: Floats) -> Floats:
        s, n = self.shape, len(h)
        angle = np.outer(np.arange(n), ROPE_BASE ** (-np.arange(0, s.head_dim, 2) / s.head_dim))
        turn = np.exp(1j * angle).astype(np.complex64)[:, None]

        def placed(w: Floats, heads: int) -> Floats:
            """With what says where a token stands; the order of a head's numbers does not matter to its products."""
            x = (h @ w.T).reshape(n, heads, s.head_dim)
            if self.kind.qk_norm:
                x = _norm(x)
            if self.kind.learned:
                return x
            if self.kind.halves:
                x = np.ascontiguousarray(x.reshape(n, heads, 2, -1).swapaxes(2, 3)).reshape(x.shape)
            turned: Floats = (x.view(np.complex64) * turn).view(np.float32)
            return turned

        group = s.n_head // s.n_head_kv
        queries = placed(q, s.n_head).swapaxes(0, 1)
        keys = placed(k, s.n_head_kv).swapaxes(0, 1).repeat(group, axis=0)
        values = (h @ v.T).reshape(n, s.n_head_kv, s.head_dim).swapaxes(0, 1).repeat(group, axis=0)
        scores = queries @ keys.swapaxes(1, 2) / np.float32(np.sqrt(s.head_dim))
        scores += np.triu(np.full((n, n), -np.inf, np.float32), 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Floats = np.ascontiguousarray((weights @ values).swapaxes(0, 1)).reshape(n, -1)
        return mixed

    def _normal(self, rows: int, columns: int) -> Floats:
        return self.rng.standard_normal((rows, columns), dtype=np.float32)

    def _off_u(self, rows: Floats) -> Floats:
        rows = self._centred(rows)
        return rows - np.outer(rows @ self.u, self.u)

    def _centred(self, rows: Floats) -> Floats:
        """Of mean zero, where a norm would take a mean off."""
        return rows - rows.mean(axis=1, keepdims=True) if self.kind.layer_norm else rows

    @staticmethod
    def _unit(rows: Floats) -> Floats:
        normal: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return normal


def _zeros(count: int) -> Floats:
    return np.zeros((1, count), np.float32)


def _norm(x: Floats) -> Floats:
    normal: Floats = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.float32(NORM_EPS))
    return normal


def predictor(generator: Generator, fmt: BlockFormat) -> Predictor:
    """The model's predictor in `fmt`, with thresholds and shares that were measured in that format."""
    exact = Predictor(tuple(layer for layer, *_ in generator.predictions), (0.0,) * generator.shape.n_layer)
    small, thresholds, shares = exact.in_format(fmt), [], []
    for layer, (_, x, fired) in zip(small.layers, generator.predictions, strict=True):
        scores = np.maximum(x @ to_float(layer.fc1).T, 0) @ to_float(layer.fc2).T
        thresholds.append(float(np.quantile(scores[fired], MISSED)))
        shares.append(float((scores >= thresholds[-1]).mean()))
    return replace(small, thresholds=tuple(thresholds), active_shares=tuple(shares), info={"made_by": "synthetic"})


@dataclass(frozen=True, slots=True)
class Mixture:
    """Formats of a file: `common`, and of the tensors that quantisation hurts most `better`.

    Which these are in Q4_K_M and Q5_K_M is llama.cpp's choice (`llama_tensor_get_type`): the head, and attn_v and
    ffn_down in the first and the last eighth of the layers and in every third one between.
    """

    common: BlockFormat
    better: BlockFormat

    def format_of(self, name: str, n_layer: int) -> BlockFormat:
        """The format of a matrix by its name without suffix, such as blk.3.attn_v."""
        if name == "output":
            return self.better
        if not name.endswith(("attn_v", "ffn_down")):
            return self.common
        layer, eighth = int(name.split(".")[1]), n_layer // 8
        outer = layer < eighth or layer >= 7 * n_layer // 8
        return self.better if outer or (layer - eighth) % 3 == 2 else self.common


MIXTURES = {name.lower(): Mixture(fmt, fmt) for name, fmt in BY_NAME.items()} | {
    "q4_k_m": Mixture(Q4_K, Q6_K),
    "q5_k_m": Mixture(Q5_K, Q6_K),
}


def packed(name: str, value: Floats, fmt: BlockFormat, records: bool) -> Weight:
    """One tensor as it is stored; norms and biases stay F32, down is transposed back unless `records`."""
    if records:
        name = name.replace("ffn_down", "ffn_down_t")
    if name.endswith(".bias"):
        return from_float(name, value, F32)
    if name.endswith("norm"):
        return from_float(f"{name}.weight", value, F32)
    if name.endswith("ffn_down"):
        value = value.T
    return from_float(f"{name}.weight", value, fmt)


def spooled(tensors: Iterator[tuple[str, Floats]], folder: Path) -> list[tuple[str, Floats]]:
    """The tensors as views on a nameless file in `folder`: memory keeps of them what it has room for."""
    kept: list[tuple[str, Floats]] = []
    with TemporaryFile(dir=folder) as spool:
        for name, value in tensors:
            offset = spool.tell()
            spool.write(np.ascontiguousarray(value, np.float32).data)
            spool.flush()
            kept.append((name, np.memmap(spool, np.float32, "r", offset, value.shape)))
    return kept


def write_models(
    generator: Generator, tensors: list[tuple[str, Floats]], outtype: str, stem: str, folder: Path, scorer: str = ""
) -> None:
    """The model in one type, in both layouts, and its predictor, of the type `scorer` or its own, beside each."""
    shape, mixture = generator.shape, MIXTURES[outtype]
    made = predictor(generator, BY_NAME[scorer.upper()] if scorer else mixture.common)
    print(f"predictor: {made.nbytes / 1e6:.0f} MB, selects {np.mean(made.active_shares or 0):.1%}")
    kept: dict[str, Weight] = {}
    for layout in ("standard", "records"):
        weights = []
        for name, value in tensors:
            weight = kept.get(name) or packed(name, value, mixture.format_of(name, shape.n_layer), layout == "records")
            if "ffn_down" not in name:
                kept[name] = weight
            weights.append(weight)
        path = folder / f"{stem}.{outtype}{'.records' * (layout == 'records')}.gguf"
        size = write_gguf(path, metadata(path.stem, shape, generator.active, generator.family), weights)
        with open_model(path) as source:
            save_predictor(made, companion(path, SidecarKind.PREDICTOR), source.fingerprint, model_name=path.stem)
        print(f"{path}: {size / 1e9:.2f} GB", flush=True)


def unfit(shape: Shape, outtypes: Sequence[str]) -> str:
    """Why no such model can be made; empty if one can."""
    for size in fields(Shape):
        if getattr(shape, size.name) < 1:
            return f"{size.name} is {getattr(shape, size.name)}; allowed: 1 and more"
    if shape.n_embd <= GATE_RANK + 2 or shape.n_embd % (2 * shape.n_head):
        return f"n_embd is {shape.n_embd}; allowed: even multiples of {shape.n_head} heads above {GATE_RANK + 2}"
    if shape.n_head % shape.n_head_kv:
        return f"n_head_kv is {shape.n_head_kv}; allowed: divisors of {shape.n_head} heads"
    if shape.n_vocab < 260:
        return f"n_vocab is {shape.n_vocab}; allowed: 260 and more"
    for outtype in outtypes:
        block = max(MIXTURES[outtype].common.block, MIXTURES[outtype].better.block)
        if shape.n_embd % block or shape.n_ff % block:
            return f"{outtype} has blocks of {block}; n_embd {shape.n_embd} and n_ff {shape.n_ff} must be multiples"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=KINDS, default="llama", help="GGUF's name of the architecture")
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="sizes, but for those that are given")
    for size in fields(Shape):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int)
    parser.add_argument("--name", help="of the files, after synthetic-; without, the shape and the family")
    parser.add_argument("--active", type=float, default=0.12, help="mean share of neurons that fire")
    parser.add_argument("--outtype", nargs="+", default=["q8_0"], choices=MIXTURES)
    parser.add_argument(
        "--predictor",
        default="",
        choices=["f16", "q8_0", "q4_0"],
        help="the predictors' type; without, the model's own",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path(), help="folder of the files")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Shape) if getattr(args, f.name) is not None}
    shape = replace(SHAPES[args.shape], **given)
    if KINDS[args.family].learned:
        shape = replace(shape, n_head_kv=shape.n_head)
    problem = unfit(shape, args.outtype)
    if problem:
        parser.error(problem)
    name = args.name or "-".join(
        [args.shape, *(f"{size}{given[size]}" for size in given), *([args.family] * (args.family != "llama"))]
    )
    start = time.monotonic()
    generator = Generator(shape, args.active, args.seed, args.family)
    args.output.mkdir(parents=True, exist_ok=True)
    tensors = spooled(generator.tensors(), args.output)
    fired = np.mean(generator.measured)
    print(f"{fired:.1%} of neurons fire on the calibration tokens, {time.monotonic() - start:.0f} s", flush=True)
    for outtype in args.outtype:
        write_models(generator, tensors, outtype, f"synthetic-{name}", args.output, args.predictor)


if __name__ == "__main__":
    main()
