"""Compares the perplexity that thermocline measures with llama.cpp's, on the very same GGUF file and text.

    python -m benchmarks.perplexity --llama-python llama/bin/python

where llama/ is an environment with llama-cpp-python.

The text is what the shipped model never saw: the held-out files of the standard library, joined. llama.cpp makes its
own tokens of it, and its logits are scored here as its `perplexity` tool scores them: chunks of n_ctx tokens, each a
sequence of its own whose first token is replaced by bos where the model adds one; the tokens after position n_ctx / 2
count. Beside it stands what `thermocline perplexity` says of a file with that text, dense and, where the model has a
predictor, predicted. The exit code is 1 where dense is farther from llama.cpp's than the standard error, or predicted
above dense by more than an audit allows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import thermocline
from benchmarks.agreement import held_out_text
from benchmarks.machine import facts
from benchmarks.peer import Peer, add_flag
from benchmarks.side_by_side import LLAMA
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline.activity.audit import PERPLEXITY_RATIO
from thermocline.activity.likelihood import Likelihood, log_probabilities
from thermocline.api import shipped_model
from thermocline.config import LoadSettings, Mode
from thermocline.files.companion import companion
from thermocline.files.sidecar import SidecarKind
from thermocline.hardware.cores import find_cores

AT_ONCE = 8
"""Chunks whose logits are held at a time."""


def chunks_of(tokens: Sequence[int], n_ctx: int, most: int) -> Iterator[list[int]]:
    """Whole chunks, at most `most` (0: all)."""
    count = len(tokens) // n_ctx
    for chunk in range(min(count, most) if most else count):
        yield list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])


def score(peer: Peer, path: Path, text: str, n_ctx: int, most: int) -> tuple[Likelihood, int]:
    """llama.cpp's likelihood of the text, and the number of chunks."""
    asked = peer.ask("tokenize", path=str(path), text=text)
    tokens, opening = asked["tokens"], asked["bos"]
    whole, total = list(chunks_of(tokens, n_ctx, most)), Likelihood()
    for start in range(0, len(whole), AT_ONCE):
        part = whole[start : start + AT_ONCE]
        fed = [chunk if opening is None else [opening, *chunk[1:]] for chunk in part]
        for chunk, logits in zip(part, peer.logits(path, fed), strict=True):
            first = n_ctx // 2
            total.add(log_probabilities(logits[first : n_ctx - 1]), np.array(chunk[first + 1 :], np.int32))
        print(f"{LLAMA}: {start + len(part)} of {len(whole)} chunks, perplexity {total.perplexity:.4f}", flush=True)
    return total, len(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=None, help="a GGUF file (default: the shipped model)")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=0, help="most chunks to read; 0 reads all")
    parser.add_argument("--modes", nargs="+", type=Mode, choices=Mode, default=None)
    parser.add_argument("-t", "--threads", type=int, default=0, help="of ours; they change no figure")
    add_keeping(parser)
    add_flag(parser)
    args = parser.parse_args()
    path, text = args.model or shipped_model(), held_out_text()
    predicts = companion(path, SidecarKind.PREDICTOR).is_file()
    modes = args.modes or ([Mode.DENSE, Mode.PREDICTED] if predicts else [Mode.DENSE])
    with Peer(args.llama_python) as peer:
        theirs, chunks = score(peer, path, text, args.ctx_size, args.chunks)
        about = peer.about
    found: dict[str, Any] = {LLAMA: {"perplexity": theirs.perplexity, "error": theirs.error, "tokens": theirs.tokens}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "held_out.txt"
        file.write_text(text)
        for mode in modes:
            settings = LoadSettings(ctx_size=args.ctx_size, mode=mode, threads=args.threads)
            ours = thermocline.perplexity(path, [file], settings, chunks=args.chunks)
            if (ours.chunks, ours.tokens) != (chunks, theirs.tokens):
                raise SystemExit(f"{ours.chunks} chunks, {ours.tokens} tokens here; {chunks}, {theirs.tokens} there")
            found[str(mode)] = {"perplexity": ours.perplexity, "error": ours.error, "tokens": ours.tokens}
    print_table(
        [{"engine": name, "perplexity": f"{r['perplexity']:.4f} +/- {r['error']:.4f}"} for name, r in found.items()]
    )
    if not args.dry:
        setup = {"model": path.name, "chunks": chunks, "n_ctx": args.ctx_size, "peer": about}
        write_results("perplexity", {**setup, "machine": facts(find_cores().threads), "measured": found}, args.into)
    judge({name: row["perplexity"] for name, row in found.items()}, theirs.error)


def judge(found: Mapping[str, float], error: float) -> None:
    """Ends the program where perplexities are farther apart than they may be."""
    dense = found.get(str(Mode.DENSE))
    if dense is None:
        return
    apart = abs(dense - found[LLAMA])
    if apart > error:
        raise SystemExit(f"dense is {apart:.4f} from {LLAMA}, more than its error {error:.4f}")
    ratio = found.get(str(Mode.PREDICTED), dense) / dense
    if ratio > PERPLEXITY_RATIO:
        raise SystemExit(f"predicted is {ratio:.4f} times dense, more than {PERPLEXITY_RATIO}")


if __name__ == "__main__":
    main()
