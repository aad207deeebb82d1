"""What a run did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from thermocline.runtime.drift import Moved
from thermocline.runtime.split import SplitReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The measurements of one generation. Times are seconds of computing; the consumer's own time is left out.

    `cached_tokens` of the prompt were already in the KV cache. `decode_tokens` are the tokens after the first,
    each of which took one step. `bytes_read` and `fired` (neurons, all layers) sum over these steps, and so does
    `selected`: neurons of which at least the first row was read. `predictor_bytes` are what the predictor adds to
    the bytes of a step, 0 where the mode is not predicted. `split` tells of a run by a plan, `moved` of neurons that
    changed places before it.
    """

    prompt_tokens: int
    cached_tokens: int
    prompt_seconds: float
    first_token_seconds: float
    generated_tokens: int
    decode_tokens: int
    decode_seconds: float
    bytes_read: float
    fired: int
    selected: int
    neurons: int
    mode: str
    predictor_bytes: int
    load_seconds: float
    seed: int
    split: SplitReport | None = None
    moved: Moved | None = None

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second, those found in the cache not counted."""
        return _ratio(self.prompt_tokens - self.cached_tokens, self.prompt_seconds)

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return _ratio(self.decode_tokens, self.decode_seconds)

    @property
    def active_share(self) -> float:
        """Share of the FFN neurons that were not zero, averaged over decode steps."""
        return _ratio(self.fired, self.decode_tokens * self.neurons)

    @property
    def selected_share(self) -> float:
        """Share of the FFN neurons that were looked at, averaged over decode steps: 1 unless the mode is predicted."""
        return _ratio(self.selected, self.decode_tokens * self.neurons)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of weights, predictor and KV cache that a decode step read on average."""
        return _ratio(self.bytes_read, self.decode_tokens)

    @property
    def gigabytes_per_second(self) -> float:
        """Memory traffic of decoding, in 10⁹ bytes a second."""
        return _ratio(self.bytes_read, self.decode_seconds) / 1e9

    def as_dict(self) -> dict[str, Any]:
        """Everything, derived numbers included, for JSON."""
        derived = (
            "prompt_rate", "decode_rate", "active_share", "selected_share", "bytes_per_token", "gigabytes_per_second"
        )  # fmt: skip
        split = None if self.split is None else self.split.as_dict()
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"split": split}

    def lines(self) -> list[str]:
        """For people: a line, and more about a run by a plan."""
        moved = () if self.moved is None else (self.moved.line(),)
        return [self.line(), *(self.split.lines() if self.split is not None else ()), *moved]

    def line(self) -> str:
        """One line for people."""
        parts = [f"prompt {self.prompt_tokens} tokens at {self.prompt_rate:.1f} tok/s"]
        if self.cached_tokens:
            parts[0] += f" ({self.cached_tokens} from cache)"
        wait = self.first_token_seconds * 1e3
        parts.append(f"first token after {wait:.{0 if wait >= 10 else 1}f} ms")
        if self.decode_tokens:
            parts.append(f"{self.generated_tokens} tokens at {self.decode_rate:.1f} tok/s")
            parts.append(self._sparsity())
            parts.append(f"{self.bytes_per_token / 1e6:.1f} MB a token, {self.gigabytes_per_second:.1f} GB/s")
        return " · ".join(parts)

    def _sparsity(self) -> str:
        active = f"{self.active_share:.1%} of FFN neurons active"
        if not self.predictor_bytes:
            return f"{active} (mode {self.mode})"
        return f"{active} of {self.selected_share:.1%} selected (mode {self.mode})"


def _ratio(amount: float, over: float) -> float:
    return amount / over if over else 0.0
