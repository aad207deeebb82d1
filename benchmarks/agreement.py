"""Compares the logits of thermocline and llama.cpp on the very same GGUF file, token by token.

    python -m benchmarks.agreement --llama-python llama/bin/python

where llama/ is an environment with llama-cpp-python.

The text is what the shipped model never saw: the held-out files of the standard library. Both engines read
the same token ids in windows of the same length; thermocline runs them once in prefill and once through the
decode path, one token at a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.peer import Peer, add_flag
from benchmarks.tables import add_keeping, write_results
from thermocline.api import shipped_model
from thermocline.config import LoadSettings, Mode
from thermocline.files.open import open_model
from thermocline.memory.kv_cache import KVCache
from thermocline.model.network import Outputs, Segment
from thermocline.model.workspace import Workspace
from thermocline.runtime.loading import LoadedModel, load_model
from training.data import collect, is_held_out, standard_library

Logits = npt.NDArray[np.float32]


def held_out_text() -> str:
    """The held-out files, one after another."""
    return "".join(s.text for s in collect(standard_library()) if is_held_out(s.path))


def ours(model: LoadedModel, window: list[int], *, decode: bool) -> Logits:
    """Logits (tokens, vocabulary) of a window; by single tokens if `decode`, else in one batch."""
    network = model.transformer
    cache = KVCache(network.spec, network.ops, len(window))
    workspace = Workspace(network.spec, network.ops, 1 if decode else len(window))
    size = 1 if decode else len(window)
    rows = []
    for start in range(0, len(window), size):
        tokens = np.asarray(window[start : start + size], np.int32)
        result = network.step(tokens, (Segment(cache, start, len(tokens)),), workspace, Outputs.ALL)
        rows.append(network.ops.to_host(result.logits).copy())
    return np.concatenate(rows)


def compare(a: Logits, b: Logits) -> dict[str, float]:
    """Agreement of `a` with the reference `b`: same likeliest token, and KL(b || a) in nats."""
    log_a, log_b = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b))
    divergence = (np.exp(log_b) * (log_b - log_a)).sum(axis=1)
    return {
        "top1": float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        "kl_mean": float(divergence.mean()),
        "kl_99": float(np.quantile(divergence, 0.99)),
        "kl_max": float(divergence.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=None, help="a GGUF file (default: the shipped model)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    add_keeping(parser)
    add_flag(parser)
    args = parser.parse_args()
    path = args.model or shipped_model()
    with open_model(path) as source:
        models = {mode: load_model(source, LoadSettings(mode=mode)) for mode in (Mode.DENSE, Mode.EXACT)}
        ids = models[Mode.EXACT].tokenizer.encode(held_out_text(), add_special=False)
        windows = [ids[i * args.length : (i + 1) * args.length] for i in range(args.windows)]
        with Peer(args.llama_python) as peer:
            reference, about = np.concatenate(peer.logits(path, windows)), peer.about
        result = {
            f"{name}/{mode}": compare(np.concatenate([ours(m, w, decode=decode) for w in windows]), reference)
            for mode, m in models.items()
            for name, decode in (("prefill", False), ("decode", True))
        }
    print(f"{args.windows * args.length} held-out tokens of {path.name}, thermocline against llama.cpp")
    for name, row in result.items():
        print(f"{name:16}" + "  ".join(f"{key} {value:.6f}" for key, value in row.items()))
    if not args.dry:
        write_results("agreement", {"model": path.name, "tokens": len(reference), "peer": about, **result}, args.into)


if __name__ == "__main__":
    main()
