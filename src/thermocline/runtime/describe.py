"""What a model file is, without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from thermocline.activity.statistics import Activity
from thermocline.activity.store import activity_inside
from thermocline.errors import ThermoclineError
from thermocline.files.gguf import GgufFile
from thermocline.files.source import ModelSource
from thermocline.model.families import family_of
from thermocline.model.spec import ModelSpec
from thermocline.runtime.prediction import find_predictor
from thermocline.text.load import load_tokenizer
from thermocline.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TypeCount:
    """How many tensors of a file have one format, and their bytes."""

    format: str
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PredictorInfo:
    """A model's predictor: where it lies, its bytes, its numbers for each weight of the model, and each layer's rank.

    `audit` says in one line what its audit found, and `passed` whether it was good enough (None: not audited).
    """

    path: str
    bytes: int
    share: float
    ranks: tuple[int, ...]
    passed: bool | None
    audit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model file in words and numbers.

    `kind` is gguf, hf, or powerinfer for one of its sparse models (magic PWRI). `spec` and `tokenizer` are None where
    `problems` say why the model cannot be run. `activity_tokens` is over how many tokens the activity inside was
    counted (None: there is none).
    """

    path: str
    kind: str
    name: str
    spec: ModelSpec | None
    types: tuple[TypeCount, ...]
    tokenizer: str | None
    bos: int | None
    eos: tuple[int, ...]
    chat_template: str | None
    fingerprint: str
    predictor: PredictorInfo | None
    activity_tokens: int | None
    warnings: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return sum(t.tensors for t in self.types)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.bytes for t in self.types)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        parameters = self.spec.parameters if self.spec else None
        return asdict(self) | {"tensors": self.tensors, "bytes": self.bytes, "parameters": parameters}


def describe(source: ModelSource) -> ModelInfo:
    """Read what `source` says about itself. What cannot be run is described as far as it goes."""
    problems: list[str] = []
    doubts: list[str] = []
    spec: ModelSpec | None = _attempt(lambda: family_of(source).spec(source), problems)
    tokenizer: Tokenizer | None = _attempt(lambda: load_tokenizer(source), problems)
    predictor = None if spec is None else _attempt(lambda: _predictor(source, spec), doubts)
    activity: Activity | None = None
    if isinstance(source, GgufFile):
        activity = _attempt(lambda: activity_inside(source), doubts)
    return ModelInfo(
        path=str(source.path),
        kind="powerinfer" if isinstance(source, GgufFile) and source.powerinfer else source.kind,
        name=spec.name if spec else source.path.name,
        spec=spec,
        types=_count_types(source),
        tokenizer=tokenizer.kind if tokenizer else None,
        bos=tokenizer.bos_id if tokenizer else None,
        eos=tuple(sorted(tokenizer.eos_ids)) if tokenizer else (),
        chat_template=tokenizer.chat_template if tokenizer else None,
        fingerprint=source.fingerprint,
        predictor=predictor,
        activity_tokens=None if activity is None else activity.tokens,
        warnings=source.warnings + (tokenizer.warnings if tokenizer else ()) + tuple(doubts),
        problems=tuple(problems),
    )


def _predictor(source: ModelSource, spec: ModelSpec) -> PredictorInfo | None:
    found = find_predictor(source, spec)
    if found is None:
        return None
    predictor, audit = found.predictor, found.predictor.audit
    passed, summary = (None, "") if audit is None else (audit.passed, audit.summary)
    return PredictorInfo(str(found.path), predictor.nbytes, predictor.share(spec), predictor.ranks, passed, summary)


def _count_types(source: ModelSource) -> tuple[TypeCount, ...]:
    counts: dict[str, tuple[int, int]] = {}
    for tensor in source.tensors.values():
        tensors, size = counts.get(tensor.format.name, (0, 0))
        counts[tensor.format.name] = tensors + 1, size + len(tensor.data)
    ordered = sorted(counts.items(), key=lambda item: -item[1][1])
    return tuple(TypeCount(name, tensors, size) for name, (tensors, size) in ordered)


def _attempt(read: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return read()
    except ThermoclineError as error:
        problems.append(str(error))
        return None
