"""`thermocline quantize`: write a model with its matrices in another format."""

from __future__ import annotations

import thermocline
from thermocline.cli.convert import ForceFlag, RestartFlag, show, told
from thermocline.cli.flags import JsonFlag, VerboseFlag


def quantize(
    model: str,
    output: str,
    kind: str,
    /,
    *,
    force: ForceFlag = False,
    restart: RestartFlag = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Write MODEL to OUTPUT with its matrices as KIND, and tell what each of them lost.

    KIND is F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K. The errors are root mean squares, as a share of that of the
    weights. Embedding and head are kept finer than the four and five bit types.

    For example:

      thermocline quantize model.f16.gguf model.q4_0.gguf Q4_0
    """
    with told() as progress:
        done = thermocline.quantize(model, output, kind, force=force, restart=restart, progress=progress)
    show(done, as_json=as_json, verbose=verbose)
    return 0
