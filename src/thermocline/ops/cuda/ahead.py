"""Compile every kernel ahead of time, as models of common shapes call it, for a GPU that need not be there.

    python -m thermocline.ops.cuda.ahead sm_80 sm_90 gfx1100

What would be launched is recorded from a dry run over tensors without memory, so nothing that runs is left out; one
line of JSON for each compilation goes to stdout. `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thermocline.errors import UsageError
from thermocline.files.formats import BY_NAME, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.weight import Weight
from thermocline.ops.contract import ALL, Activation, FfnKind, KVLayer, NeuronBlock
from thermocline.ops.cuda.kernels import KERNELS
from thermocline.ops.cuda.launch import Recorder, Variant
from thermocline.ops.cuda.ops import CudaOps

WIDTH, NEURONS, HEADS, DIM, RANK, CONTEXT = 4096, 11008, 32, 128, 512, 4096
"""Sizes of a model of 7 billion parameters."""
ODD = 4544
"""The width of Falcon 7B, whose rows of Q8_0 and Q4_0 begin at multiples of 4 bytes."""
RELU = FfnKind(Activation.RELU, gated=True)
KINDS = (
    RELU,
    FfnKind(Activation.RELU, gated=True, both=True),
    FfnKind(Activation.RELU2, gated=False),
    FfnKind(Activation.SILU, gated=True),
    FfnKind(Activation.GELU, gated=False),
)


def variants() -> list[Variant]:
    """What is compiled for one token and for a prompt: every format, kind of FFN and shape of attention."""
    recorder = Recorder()
    ops = CudaOps("meta", launcher=recorder)
    with ops.counting(ops.array((4,), "int64")):
        _vectors(ops)
        for heads, dim in ((HEADS, DIM), (8, DIM), (4, 64)):
            _attention(ops, heads, dim)
        for fmt in BY_NAME.values():
            _matrices(ops, fmt)
            _neurons(ops, fmt, RELU)
        for kind in KINDS[1:]:
            _neurons(ops, F16, kind)
        for fmt in (Q8_0, Q4_0):
            _matrices(ops, fmt, ODD)
            _neurons(ops, fmt, RELU, ODD)
    return list(recorder.variants)


def _weight(ops: CudaOps, rows: int, columns: int, fmt: BlockFormat) -> Any:
    data: Any = ops.array((rows, fmt.row_bytes(columns)), "uint8")
    return ops.place(Weight("w", fmt, (rows, columns), data))


def _vectors(ops: CudaOps) -> None:
    x, w = ops.array((1, WIDTH)), ops.array((WIDTH,))
    ops.rms_norm(x, w, 1e-5, x)
    ops.layer_norm(x, w, w, 1e-5, x)
    table = ops.array((CONTEXT, 2, DIM // 2))
    for interleaved in (False, True):
        pair = ops.array((1, HEADS, DIM)), ops.array((1, 8, DIM))
        ops.rope(pair, table, ops.array((1,), "int32"), interleaved=interleaved)
    ops.select(ops.array((1, NEURONS)), 0.5, ops.array((NEURONS,), "int32"))


def _attention(ops: CudaOps, kv_heads: int, dim: int) -> None:
    q, k = ops.array((1, HEADS, dim)), ops.array((1, kv_heads, dim))
    many, more = ops.array((9, HEADS, dim)), ops.array((9, kv_heads, dim))
    for dtype, width in (("float16", dim), ("float32", dim), ("uint8", Q8_0.row_bytes(dim))):
        cache = KVLayer(*(ops.array((kv_heads, CONTEXT, width), dtype) for _ in range(2)))
        ops.attention(q, k, k, cache, ops.array((1,), "int32"), 0.1, 0, q)
        ops.attention(many, more, more, cache, 0, 0.1, 0, many)


def _matrices(ops: CudaOps, fmt: BlockFormat, width: int = WIDTH) -> None:
    matrix, bias = _weight(ops, width, width, fmt), ops.array((width,))
    for tokens in (1, 2, 3, 4, 512):
        x, out = ops.array((tokens, width)), ops.array((tokens, width))
        ops.linear(x, (matrix,), (out,))
        ops.linear(x, (matrix,) * 3, (out,) * 3)
        if fmt is F16:
            ops.linear(x, (matrix,), (out,), (bias,))
        ops.linear(x, (matrix,), (out,), add=True)
        ops.embed(matrix, np.zeros(tokens, np.int32), out)
    if fmt in (F32, F16, Q8_0):
        fc1, fc2 = _weight(ops, RANK, width, fmt), _weight(ops, NEURONS, RANK, fmt)
        ops.predict(ops.array((1, width)), fc1, fc2, ops.array((1, NEURONS)))


def _neurons(ops: CudaOps, fmt: BlockFormat, kind: FfnKind, width: int = WIDTH) -> None:
    first = _weight(ops, NEURONS, width, fmt)
    block = NeuronBlock(first if kind.gated else None, first, first, True, kind, NEURONS)
    x, out = ops.array((1, width)), ops.array((1, width))
    chosen = ops.select(ops.array((1, NEURONS)), 0.5, ops.array((NEURONS,), "int32"))
    for active in (ALL, chosen):
        if kind.sparse or active is ALL:
            ops.ffn(x, block, active, out, skip_zeros=kind.sparse)
    if fmt is F16:
        many, sums = ops.array((512, width)), ops.array((512, width))
        ops.ffn(many, block, ALL, sums, skip_zeros=kind.sparse)
    if fmt is F16 and kind is RELU:
        ops.ffn(x, replace(block, rows=ops.array((NEURONS,), "int32")), chosen, out, skip_zeros=True)


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The variant for a device; raises what Triton raises where it does not compile."""
    kernel = KERNELS[variant.name]
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs={at[name]: value for name, value in variant.constants},
        attrs={at[name]: [["tt.divisibility", 16]] for name in variant.aligned},
    )
    return triton.compile(source, target=target, options=dict(variant.options))


def target_of(name: str) -> GPUTarget:
    """The target called `name`, of NVIDIA's GPUs (sm_90) or of AMD's (gfx942).

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch(r"sm_\d+", name):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)  # CDNA's waves are of 64 threads
    raise UsageError(f"{name} is no target; allowed: sm_ and the compute capability, such as sm_90, or such as gfx942")


def compile_all(targets: Iterable[str], wanted: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    """Compile `wanted` for each of `targets` (see `target_of`); what became of each."""
    wanted = list(wanted)
    for target in targets:
        gpu = target_of(target)
        amd = gpu.backend == "hip"
        for variant in wanted:
            began = time.perf_counter()
            made = compiled(variant, gpu)
            yield {
                "kernel": variant.name,
                "target": target,
                "seconds": round(time.perf_counter() - began, 2),
                "binary": len(made.asm["hsaco" if amd else "cubin"]),
                "shared": made.metadata.shared,
                "wide": _widest_index(made.asm["ttir"]),
                "ordered": "acq_rel" in made.asm["llir"],
                "doubles": "double" in made.asm["llir"],
                "loads": _amd_loads(made.asm["amdgcn"]) if amd else _loads(made.asm["ptx"]),
                "kinds": sorted({value for name, value in variant.constants if name.endswith("_KIND")}),
                "align": min((value for name, value in variant.constants if name.endswith("_ALIGN")), default=16),
            }


def _widest_index(ir: str) -> bool:
    """Whether pointers are offset by 64-bit numbers."""
    return any("tt.addptr" in line and "i64" in line for line in ir.splitlines())


def _loads(ptx: str) -> dict[int, int]:
    """How many loads from the device's memory there are, by the bytes that a thread loads at once."""
    found = re.findall(r"ld\.global[a-z0-9_:.]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx, re.IGNORECASE)
    return dict(Counter(int(many or 1) * int(bits) // 8 for many, bits in found))


AMD_SIZES: Final = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "dword": 4}
"""Bytes of a load by its name in CDNA's assembly; RDNA's tells the bits."""


def _amd_loads(code: str) -> dict[int, int]:
    """As `_loads`, of AMD's assembly."""
    found = re.findall(r"\b(?:global|buffer)_load_(?:\w*?[biu](\d+)|([a-z]+)(?:x(\d))?)\b", code)
    return dict(Counter(int(bits) // 8 if bits else AMD_SIZES[name] * int(many or 1) for bits, name, many in found))


def main() -> None:
    """Compile for the targets of the command line; with `--few` the first variant of every kernel only."""
    few = "--few" in sys.argv
    found: dict[Any, Variant] = {}
    for variant in variants():
        found.setdefault(variant.name if few else variant, variant)
    for row in compile_all([a for a in sys.argv[1:] if a != "--few"] or ["sm_80", "sm_90"], found.values()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
