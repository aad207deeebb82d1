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
SHORTEST_PART: Final = 64
"""Positions of a program of one token's attention, at least."""
MOST_PARTS: Final = 256


def part_of(context: int) -> int:
    """Positions of a program of one token's attention: few, so that programs are many and each is soon done.

    In long contexts more, so that there are at most `MOST_PARTS`, whose sums are held.
    """
    return max(SHORTEST_PART, 1 << max(-(-context // MOST_PARTS) - 1, 0).bit_length())


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
    parts = -(-context // part_of(context))
    single = 3 * n_q * parts + 5 * n_ff + (MOST_GROUPS + 16) * n_embd
    return 4 * (prompt + single)
