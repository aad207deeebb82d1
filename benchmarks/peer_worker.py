"""llama.cpp behind a pipe: reads one JSON request a line, answers with one JSON line. Started by `benchmarks.peer`.

Needs llama-cpp-python and numpy only, so that any environment that has them can run it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import numpy as np

try:
    import llama_cpp
except ImportError as error:
    print(json.dumps({"error": f"{sys.executable} has no llama-cpp-python: {error}"}), flush=True)
    raise SystemExit(1) from None

TYPES = {"f32": 0, "f16": 1, "q8_0": 8}


def keep_mapped() -> None:
    """Have every model that is loaded from now on read from its mapping."""
    names = llama_cpp.llama_cpp
    defaults = names.llama_model_default_params

    def params() -> Any:
        found = defaults()
        found.use_extra_bufts = False
        return found

    names.llama_model_default_params = params


class Worker:
    """One model in one context."""

    def __init__(self) -> None:
        self.llama: Any = None
        self.position = 0

    def hello(self) -> dict[str, Any]:
        about = llama_cpp.llama_print_system_info().decode()
        return {"name": "llama.cpp", "version": f"llama-cpp-python {llama_cpp.__version__}", "system": about.strip()}

    def load(
        self,
        path: str,
        n_ctx: int,
        threads: int,
        cache: str = "f16",
        batch: int = 512,
        logits_all: bool = False,
        mapped: bool = False,
        mmap: bool = True,
    ) -> dict[str, Any]:
        """`mapped` leaves the weights where the file's mapping has them: some processors have kernels for which they
        are copied in another order. Without `mmap` all are read to memory of its own.
        """
        began = time.perf_counter()
        if mapped:
            keep_mapped()
        self.llama = llama_cpp.Llama(
            path,
            n_ctx=n_ctx,
            n_batch=max(batch, 512),
            n_ubatch=batch,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=TYPES[cache],
            type_v=TYPES[cache],
            flash_attn=True,  # as its own tools have it, and faster
            logits_all=logits_all,
            use_mmap=mmap,
            verbose=False,
        )
        return {"seconds": time.perf_counter() - began}

    def reset(self) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)
        self.position = 0
        return {}

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        """Append tokens in batches; the last one's logits are computed."""
        size, seconds = self.llama.n_batch, 0.0
        for start in range(0, len(tokens), size):
            seconds += self._decode(tokens[start : start + size])
        return {"seconds": seconds}

    def decode(self, tokens: list[int]) -> dict[str, Any]:
        """Append tokens one by one."""
        return {"seconds": sum(self._decode([token]) for token in tokens)}

    def logits(self, tokens: list[int], output: str) -> dict[str, Any]:
        """Run a window and write its logits (tokens, vocabulary) as a .npy file."""
        self.llama.reset()
        self.llama.eval(tokens)
        np.save(output, np.array(self.llama.scores[: len(tokens)], np.float32))
        return {}

    def tokenize(self, path: str, text: str) -> dict[str, Any]:
        """The tokens that a file's own tokenizer makes of a text, and what it would put before it, if anything."""
        vocabulary = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        model = llama_cpp.llama_model_get_vocab(vocabulary.model)
        adds = llama_cpp.llama_vocab_get_add_bos(model)
        tokens = vocabulary.tokenize(text.encode(), add_bos=True, special=False)
        return {"tokens": tokens, "bos": llama_cpp.llama_vocab_bos(model) if adds else None}

    def _decode(self, tokens: list[int]) -> float:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        began = time.perf_counter()
        status = llama_cpp.llama_decode(self.llama.ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        llama_cpp.llama_synchronize(self.llama.ctx)
        seconds = time.perf_counter() - began
        if status:
            raise RuntimeError(f"llama_decode returned {status} at position {self.position}")
        self.position += len(tokens)
        return seconds


def main() -> None:
    worker = Worker()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
