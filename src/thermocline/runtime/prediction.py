"""Which predictor a model has, and whether it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from thermocline.activity.inside import predictor_inside
from thermocline.activity.predictor import Audit, Predictor, load_predictor
from thermocline.config import LoadSettings, Mode
from thermocline.errors import WARNING, ThermoclineError, UsageError, printable
from thermocline.files.companion import companion
from thermocline.files.gguf import GgufFile
from thermocline.files.sidecar import SidecarKind, read_sidecar, update_info, write_sidecar
from thermocline.files.source import ModelSource
from thermocline.files.weight import Weight
from thermocline.model.spec import ModelSpec

INSIDE: Final = "the predictor inside the model"
VARIABLE: Final = "LLAMA_SPARSE_PRED_THRESHOLD"
"""PowerInfer's environment variable; honoured for predictors inside its own files."""
SHARES: Final = "active_share"


@dataclass(frozen=True, slots=True)
class Found:
    """A model's predictor, where it lies, how messages call it, and whether it has another threshold than its own."""

    predictor: Predictor
    path: Path
    name: str
    adjusted: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """The mode to run in (never `Mode.AUTO`), the predictor if it is predicted, and why, in words."""

    mode: Mode
    found: Found | None = None
    notices: tuple[str, ...] = ()

    @property
    def predictor(self) -> Predictor | None:
        """The predictor to compute with."""
        return self.found.predictor if self.found is not None else None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The predictor's matrices."""
        layers = () if self.predictor is None else self.predictor.layers
        return tuple(weight for layer in layers for weight in (layer.fc1, layer.fc2))


def choose_prediction(
    source: ModelSource, spec: ModelSpec, first_bytes: tuple[int, ...], settings: LoadSettings
) -> Prediction:
    """The mode that the settings and the model's predictor ask for.

    Mode auto predicts only where the predictor's audit passed with the thresholds that are used, and where it saves
    bytes (of `first_bytes`, see `Predictor.saves`). A predictor that nobody asked for and that is unusable is told
    of and not used.

    Raises:
        UsageError: what was asked for needs a predictor or an activation that the model has not.
        ModelFormatError, FingerprintError, UnsupportedModelError: the predictor that was asked for is unusable.
    """
    mode = settings.mode
    if mode in (Mode.DENSE, Mode.EXACT):
        return Prediction(mode)
    asked = mode is Mode.PREDICTED or settings.predictor is not None or settings.predictor_threshold is not None
    if not spec.ffn.sparse:
        if asked:
            raise UsageError(
                f"no neuron can be predicted to be zero: {spec.ffn.activation} gives no zeros; use --mode dense"
            )
        return Prediction(Mode.DENSE)
    if not asked and _only_inside(source):
        # Reading it takes seconds in a large model, and only what lies beside it tells of an audit.
        return _unused(_with_threshold(INSIDE, *_threshold(settings, source, inside=True)), _judged(None))
    try:
        found = find_predictor(source, spec, settings.predictor)
        if found is None and asked:
            raise _missing(source)
        if found is None:
            return Prediction(Mode.EXACT)
        decided = _decided(_adjusted(found, source, settings), mode, first_bytes)
        if asked and decided.mode is Mode.EXACT:
            return replace(decided, notices=tuple(WARNING + notice for notice in decided.notices))
        return decided
    except ThermoclineError as error:
        if asked:
            raise
        return Prediction(Mode.EXACT, notices=(f"mode exact: {error}",))


def find_predictor(source: ModelSource, spec: ModelSpec, path: Path | str | None = None) -> Found | None:
    """The predictor at `path`; without, the sidecar beside the model; else the one inside it; None if there is none.

    Raises:
        ModelFormatError: it is no predictor, or not of a network of these sizes.
        FingerprintError: it is another model's.
        UnsupportedModelError: it is of a kind that cannot be read.
        NumericalError: a number of one inside the model is NaN or infinite.
    """
    beside = companion(source.path, SidecarKind.PREDICTOR)
    if path is not None or beside.is_file():
        file = Path(path) if path is not None else beside
        predictor = load_predictor(file, source.fingerprint, model_name=spec.name)
        predictor.require_fits(file, spec)
        return Found(predictor, file, f"predictor {printable(file.name, 80)}")
    inside = predictor_inside(source) if isinstance(source, GgufFile) else None
    return None if inside is None else Found(_with_audit(inside, source), source.path, INSIDE)


def keep_audit(source: ModelSource, found: Found, note: Mapping[str, Any], selected: Sequence[float]) -> None:
    """Note what an audit found: in the predictor's file, or beside a model that has it inside.

    There the shares of neurons that were `selected` in each layer are kept too, as nothing else tells of them.

    Raises:
        OutputError: it could not be written.
    """
    if found.path != source.path:
        update_info(found.path, {"audit": note})
        return
    shares = {SHARES: np.array(selected, np.float32)}
    path = companion(source.path, SidecarKind.AUDIT)
    write_sidecar(path, SidecarKind.AUDIT, source.fingerprint, {"audit": note}, shares)


def _with_audit(predictor: Predictor, source: ModelSource) -> Predictor:
    """With what an audit left beside the model; what is of no use there counts as an audit that failed."""
    path = companion(source.path, SidecarKind.AUDIT)
    if not path.is_file():
        return predictor
    try:
        kept = read_sidecar(path, SidecarKind.AUDIT)
        kept.require_model(source.fingerprint)
        shares = kept.arrays[SHARES].reshape(-1).tolist()
        return replace(predictor, active_shares=tuple(shares), info={**predictor.info, "audit": kept.info["audit"]})
    except (ThermoclineError, KeyError) as error:
        why = "it tells of no audit" if isinstance(error, KeyError) else str(error)
        note = {"passed": False, "summary": f"{printable(path.name)} is of no use: {why}"}
        return replace(predictor, info={**predictor.info, "audit": note})


def threshold_of_environment(environment: Mapping[str, str]) -> float | None:
    """PowerInfer's variable, if it is set.

    Raises:
        UsageError: it is no number.
    """
    text = environment.get(VARIABLE)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UsageError(f"{VARIABLE} is {printable(text, 40)}; allowed: a number, or unset")
    return value


def _missing(source: ModelSource) -> UsageError:
    beside = companion(source.path, SidecarKind.PREDICTOR).name
    return UsageError(
        f"{printable(str(source.path))} has no predictor inside, and no {printable(beside)} beside it: "
        "name one with --predictor, train one, or use --mode exact"
    )


def _adjusted(found: Found, source: ModelSource, settings: LoadSettings) -> Found:
    """With the threshold that was asked for, by the settings or by PowerInfer's variable."""
    threshold, origin = _threshold(settings, source, inside=found.path == source.path)
    if threshold is None:
        return found
    name, other = _with_threshold(found.name, threshold, origin), found.predictor.with_threshold(threshold)
    if other.thresholds == found.predictor.thresholds:
        return replace(found, name=name)
    return Found(other, found.path, name, adjusted=True)


def _threshold(settings: LoadSettings, source: ModelSource, *, inside: bool) -> tuple[float | None, str]:
    """The threshold that was asked for, None for the predictor's own, and from where it is."""
    if settings.predictor_threshold is None and inside and isinstance(source, GgufFile) and source.powerinfer:
        return threshold_of_environment(os.environ), f" from {VARIABLE}"
    return settings.predictor_threshold, ""


def _with_threshold(name: str, threshold: float | None, origin: str) -> str:
    return name if threshold is None else f"{name} with threshold {threshold:g}{origin}"


def _decided(found: Found, mode: Mode, first_bytes: tuple[int, ...]) -> Prediction:
    """Predicted if it was asked for, or if mode auto has no reason against it; told in one line."""
    audit = found.predictor.audit
    judged = _judged(audit)
    if mode is Mode.AUTO:
        passed = audit is not None and audit.passed
        if not passed or not found.predictor.saves(first_bytes):
            why = "it would read more bytes than it saves" if passed else judged
            return _unused(found.name, why)
    return Prediction(Mode.PREDICTED, found, (f"mode predicted by {found.name}: {judged}",))


def _only_inside(source: ModelSource) -> bool:
    beside = (companion(source.path, kind).is_file() for kind in (SidecarKind.PREDICTOR, SidecarKind.AUDIT))
    return "blk.0.fc1.weight" in source.tensors and not any(beside)


def _unused(name: str, why: str) -> Prediction:
    notice = f"mode exact, for {name}: {why}; --mode predicted uses it all the same"
    return Prediction(Mode.EXACT, notices=(notice,))


def _judged(audit: Audit | None) -> str:
    if audit is None:
        return "not audited"
    summary = f" ({audit.summary})" if audit.summary else ""
    return f"its audit {'passed' if audit.passed else 'failed'}{summary}"
