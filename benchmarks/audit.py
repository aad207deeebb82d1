"""Audits the predictor of a synthetic model, as `thermocline audit` does, and keeps the result.

    python -m benchmarks.audit -m models/synthetic-1.3b.q4_0.records.gguf

The text is that of the other benchmarks, which the vocabulary spells byte by byte. The note in the predictor's file, by
which mode auto goes, is written to a copy unless --note is given.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import thermocline
from benchmarks.agreement import held_out_text
from benchmarks.machine import facts
from benchmarks.tables import add_keeping, write_results
from thermocline.config import LoadSettings
from thermocline.files.companion import companion
from thermocline.files.sidecar import SidecarKind
from thermocline.hardware.cores import find_cores
from thermocline.runtime.auditing import Audited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-n", "--tokens", type=int, default=8192)
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--note", action="store_true", help="note the result in the predictor's own file")
    add_keeping(parser)
    args = parser.parse_args()
    predictor = companion(args.model, SidecarKind.PREDICTOR)
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text.txt"
        text.write_text(held_out_text())
        if not args.note:
            predictor = Path(shutil.copy(predictor, name))
        settings = LoadSettings(threads=args.threads, predictor=str(predictor))
        found = thermocline.audit(args.model, [text], settings, tokens=args.tokens, progress=_tell)
    print("passed" if found.passed else "FAILED", found.summary)
    if not args.dry:
        about = {"model": args.model.stem.removesuffix(".records"), "seconds": found.seconds}
        machine = facts(args.threads or find_cores().threads)
        write_results("audit", {**about, **found.as_dict(), "machine": machine}, args.into)
    sys.exit(0 if found.passed else 1)


def _tell(done: Audited) -> None:
    print(f"{done.tokens:,} of {done.total:,} tokens, {done.tokens_per_second:.1f} a second", flush=True)


if __name__ == "__main__":
    main()
