"""Which tensors a network has, by GGUF's canonical names, and the check that a file has exactly these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from thermocline.errors import ModelFormatError, printable
from thermocline.files.formats import F16, Q8_0, BlockFormat
from thermocline.files.weight import Weight
from thermocline.model.spec import ModelSpec

Shape = tuple[int, int]

SHOWN = 5
"""How many tensors an error lists."""


def expected_tensors(spec: ModelSpec, *, records: bool) -> dict[str, Shape]:
    """Every tensor of the network and its (rows, columns); vectors are one row.

    `records` asks for the down projection transposed, one row per neuron, under PowerInfer's name
    `ffn_down_t`; otherwise it is the standard `ffn_down`.
    """
    tensors: dict[str, Shape] = {"token_embd.weight": (spec.n_vocab, spec.n_embd)}
    if spec.n_positions:
        tensors["position_embd.weight"] = (spec.n_positions, spec.n_embd)
    for layer in range(spec.n_layer):
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in _layer_tensors(spec, records)}
    tensors |= dict(_norm("output_norm", spec))
    if not spec.tied_embeddings:
        tensors["output.weight"] = (spec.n_vocab, spec.n_embd)
    return tensors


def has_records(weights: Mapping[str, Weight]) -> bool:
    """Whether the down projections are stored as neuron records."""
    return "blk.0.ffn_down_t.weight" in weights


def record_format(down: Weight) -> BlockFormat:
    """The format of a down projection's records: its own, or F16 where n_embd is no whole number of blocks.

    K-quants become Q8_0: their scales would have to be searched for anew, which costs minutes, and Q8_0 adds an error
    far below theirs.
    """
    fmt = Q8_0 if down.format.block > Q8_0.block else down.format
    return fmt if down.rows % fmt.block == 0 else F16


def check_tensors(path: object, spec: ModelSpec, weights: Mapping[str, Weight]) -> None:
    """Hold the file's tensors, by canonical names, to the network's.

    Raises:
        ModelFormatError: tensors are missing, unknown or misshapen; the first five are listed.
    """
    wanted = expected_tensors(spec, records=has_records(weights))
    problems = [
        *(f"{name} is missing" for name in wanted if name not in weights),
        *(f"{printable(name)} does not belong to this network" for name in weights if name not in wanted),
        *(
            f"{name} is {_shape(weights[name].shape)}, wanted {_shape(shape)}"
            for name, shape in wanted.items()
            if name in weights and weights[name].shape != shape
        ),
    ]
    refuse(path, problems)


def refuse(path: object, problems: Sequence[str]) -> None:
    """Raise ModelFormatError with the first five problems, if there are any."""
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ModelFormatError(str(path), "tensors", "; ".join(problems[:SHOWN]) + more)


def _layer_tensors(spec: ModelSpec, records: bool) -> Iterator[tuple[str, Shape]]:
    yield from _norm("attn_norm", spec)
    yield "attn_q.weight", (spec.n_q, spec.n_embd)
    yield "attn_k.weight", (spec.n_kv, spec.n_embd)
    yield "attn_v.weight", (spec.n_kv, spec.n_embd)
    yield "attn_output.weight", (spec.n_embd, spec.n_q)
    if spec.qkv_bias:
        yield "attn_q.bias", (1, spec.n_q)
        yield "attn_k.bias", (1, spec.n_kv)
        yield "attn_v.bias", (1, spec.n_kv)
    if spec.out_bias:
        yield "attn_output.bias", (1, spec.n_embd)
    if spec.qk_norm:
        yield "attn_q_norm.weight", (1, spec.head_dim)
        yield "attn_k_norm.weight", (1, spec.head_dim)
    if not spec.shared_norm:
        yield from _norm("ffn_norm", spec)
    if spec.ffn.gated:
        yield "ffn_gate.weight", (spec.n_ff, spec.n_embd)
    yield "ffn_up.weight", (spec.n_ff, spec.n_embd)
    down = "ffn_down_t" if records else "ffn_down"
    yield f"{down}.weight", (spec.n_ff, spec.n_embd) if records else (spec.n_embd, spec.n_ff)
    if spec.ffn_bias:
        yield "ffn_up.bias", (1, spec.n_ff)
        yield f"{down}.bias", (1, spec.n_embd)


def _norm(name: str, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (1, spec.n_embd)
    if spec.layer_norm:
        yield f"{name}.bias", (1, spec.n_embd)


def _shape(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"
