"""How much memory the kernels' scratch takes at most, known without torch: plans reserve it."""

from __future__ import annotations

from typing import Final

DECODED: Final = 32 << 20
"""Bytes of a matrix decoded to float32 at a time: they stay in the second cache of large devices."""
ATTENDED: Final = 32 << 20
"""Bytes of scores, and of decoded keys and values, that a prompt's attention holds at once."""
PIECE: Final = 24 << 20
"""Bytes of cold neurons that are sent at once; two such buffers on either side."""
MOST_GROUPS: Final = 64
"""Groups that the positions of an FFN are dealt to, at most."""
PART: Final = 256
"""Positions of a program of one token's attention."""


def scratch_bytes(tokens: int, *, n_embd: int, n_ff: int, n_vocab: int, n_q: int, gated: bool, context: int) -> int:
    """Bytes that steps of up to `tokens` tokens take beside their workspace, at any position of the context.

    Heads are taken to have 32 elements or more.
    """
    prompt = 0
    if tokens > 1:
        neurons = tokens * n_ff * (1 + gated) + 3 * n_ff
        decoded = min(DECODED // 4, n_embd * max(n_ff, n_vocab)) + n_embd
        scores = min(ATTENDED // 4, -(-n_q // 32) * tokens * context)
        cached = max(min(ATTENDED // 4, 2 * n_q * context), min(2 * n_q, 512) * context)
        attention = scores + cached + 2 * tokens * n_q
        prompt = neurons + decoded + attention
    parts = -(-context // PART)
    single = 3 * n_q * parts + 5 * n_ff + (MOST_GROUPS + 16) * n_embd
    return 4 * (prompt + single)
