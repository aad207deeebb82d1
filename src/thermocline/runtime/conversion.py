"""From a model to a new file of it: converted, quantised, ordered, with its predictor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any, Final, TypedDict

from thermocline.activity.applied import activity_for
from thermocline.activity.inside import for_powerinfer, predictor_inside
from thermocline.activity.order import Order, load_order
from thermocline.activity.predictor import Predictor, load_predictor
from thermocline.activity.statistics import Activity
from thermocline.activity.store import activity_inside
from thermocline.errors import ThermoclineError, UsageError, printable
from thermocline.files.companion import companion
from thermocline.files.gguf import GgufFile
from thermocline.files.open import open_model
from thermocline.files.resumable import may_be_ours, require_new
from thermocline.files.sidecar import SidecarKind, read_sidecar, require_finite
from thermocline.files.source import ModelSource
from thermocline.hardware.cores import find_cores
from thermocline.memory.convert import OUTTYPES, TYPES, Progress, WriteReport, convert
from thermocline.memory.powerinfer import OUTTYPES as POWERINFER_TYPES
from thermocline.memory.powerinfer import write_powerinfer
from thermocline.memory.reblock import Reblocked
from thermocline.model.families import family_of
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import has_records
from thermocline.runtime.powerinfer import predictor_of_folder

AUTO = "auto"
"""Outtype that keeps each tensor's format."""
BESIDE: Final = (SidecarKind.ACTIVITY, SidecarKind.PREDICTOR, SidecarKind.AUDIT)
"""What is looked for beside a model when it is loaded."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and how.

    `powerinfer` says whether it is a file for PowerInfer, `read` and `written` are bytes, `rounded` what storing
    tensors anew did to them, `tokens` how many the activity inside was counted over (None: there is none).
    """

    path: Path
    powerinfer: bool
    read: int
    written: int
    seconds: float
    rounded: tuple[Reblocked, ...]
    notes: tuple[str, ...]
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to convert to.

    `outtype` is one of f32, f16, bf16, q8_0, q4_0, or auto, which keeps each tensor's format (for PowerInfer: f16).
    `predictor` is a sidecar or one of PowerInfer's folders; `threshold` is used in all layers instead of its own.
    `activity` is of this model, or of the one that it was converted from; it gives the neurons' order and goes inside.
    `order` is a sidecar with nothing but that. `standard` writes the down projection as other engines read it,
    `powerinfer` a file for PowerInfer. `force` replaces files that are there, `restart` forgets an unfinished run
    instead of going on with it.
    """

    outtype: str = AUTO
    predictor: str | Path | None = None
    threshold: float | None = None
    activity: Path | None = None
    order: str | Path | None = None
    standard: bool = False
    powerinfer: bool = False
    force: bool = False
    restart: bool = False


class _How(TypedDict):
    threads: int
    restart: bool
    replace: bool
    progress: Progress | None


def convert_model(
    model: str | Path,
    output: str | Path,
    wanted: Wanted | None = None,
    *,
    progress: Progress | None = None,
    **overrides: Any,
) -> Converted:
    """Write a model (a GGUF file or a Hugging Face folder) as a new GGUF file, tensor by tensor.

    `overrides` are single fields of `Wanted`: `convert_model("m", "m.gguf", outtype="q8_0")`. Models whose activation
    gives zeros are written as neuron records, unless `standard`. With an activity or an order, neurons are stored
    hottest first; the activity goes inside, by the new numbers, and so does a predictor. A second call goes on where
    one that was killed stopped.

    Raises:
        UsageError: what is wanted does not go together, or `output` is there and not to be replaced.
        FingerprintError: predictor, activity or order are of another model.
        ModelFormatError, UnsupportedModelError: something cannot be read, or the new file cannot say what it is.
        NumericalError: a number is NaN or infinite, or does not fit the outtype.
        OutputError: the file could not be written; the old one, if any, is untouched.
    """
    known = [field.name for field in fields(Wanted)]
    for name in overrides:
        if name not in known:
            raise UsageError(f"{printable(name)} is no setting; known are {', '.join(known)}")
    with open_model(model) as source:
        return _convert(source, Path(output), with_fields(wanted or Wanted(), **overrides), progress)


def _convert(source: ModelSource, path: Path, wanted: Wanted, progress: Progress | None) -> Converted:
    began = time.perf_counter()
    spec = family_of(source).spec(source)
    _check(path, spec, wanted)
    activity = None if wanted.activity is None else activity_for(source, spec, wanted.activity)
    order = Order.of(activity) if activity is not None else None
    if wanted.order is not None:
        order = load_order(wanted.order)
        order.require_model(source.fingerprint, spec.name, path=wanted.order)
    if order is not None and order.order.shape != (spec.n_layer, spec.n_ff):
        shape = " x ".join(map(str, order.order.shape))
        raise UsageError(f"the order is of {shape} neurons, the model has {spec.n_layer} x {spec.n_ff}")
    predictor = _predictor(source, spec, wanted)
    report = _write(source, path, spec, wanted, predictor, order, activity, progress)
    return _converted(source, report, wanted.powerinfer, began)


def quantize_model(
    model: str | Path,
    output: str | Path,
    kind: str,
    *,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a model anew with its matrices in the format `kind` (Q8_0, Q4_K, ...), in the layout that it has.

    PowerInfer's files stay PowerInfer's, as long as it computes with that format. A second call goes on where one that
    was killed stopped, unless `restart`.

    Raises:
        UsageError: there is no such format, or `output` is there and not to be replaced.
        ModelFormatError, UnsupportedModelError, NumericalError, OutputError: as `convert_model`.
    """
    kind = kind.lower()
    if kind not in TYPES:
        known = ", ".join(name.upper() for name in TYPES)
        hint = "; mixtures of types are not made" if kind.endswith(("_s", "_m", "_l")) else ""
        raise UsageError(f"type is {printable(kind.upper(), 40)}; allowed: {known}{hint}")
    _require_new(Path(output), force=force)
    with open_model(model) as source:
        return _quantize(source, Path(output), kind, progress, restart=restart, replace=force)


def _quantize(
    source: ModelSource, path: Path, kind: str, progress: Progress | None, *, restart: bool, replace: bool
) -> Converted:
    began = time.perf_counter()
    family = family_of(source)
    spec = family.spec(source)
    powerinfer = isinstance(source, GgufFile) and source.powerinfer
    notes: tuple[str, ...] = ()
    if powerinfer and kind not in POWERINFER_TYPES:
        powerinfer = False
        known = ", ".join(name.upper() for name in POWERINFER_TYPES)
        notes = (f"PowerInfer computes with {known} only: the file is for Thermocline",)
    predictor = predictor_inside(source) if powerinfer and isinstance(source, GgufFile) else None
    how: _How = {
        "threads": find_cores().threads,
        "restart": restart,
        "replace": replace,
        "progress": progress,
    }
    if predictor is not None:
        report = write_powerinfer(source, for_powerinfer(predictor), path, kind, **how)
    else:
        powerinfer = False
        report = convert(source, path, kind, records=has_records(family.weights(source, spec)), **how)
    return _converted(source, with_fields(report, notes=(*notes, *report.notes)), powerinfer, began)


def _check(path: Path, spec: ModelSpec, wanted: Wanted) -> None:
    """Refuse what does not go together, before any work."""
    types = POWERINFER_TYPES if wanted.powerinfer else OUTTYPES
    if wanted.outtype not in (AUTO, *types):
        whose = "PowerInfer computes with" if wanted.powerinfer else "allowed:"
        raise UsageError(f"outtype is {printable(wanted.outtype, 40)}; {whose} {', '.join((AUTO, *types))}")
    if wanted.activity is not None and wanted.order is not None:
        raise UsageError("give --activity or --order, not both: an activity has its own order")
    predicting = wanted.predictor is not None or wanted.threshold is not None
    ordered = wanted.activity is not None or wanted.order is not None
    if wanted.standard and (ordered or wanted.powerinfer or predicting):
        raise UsageError("--standard writes what other engines read: no order, no predictor, no PowerInfer")
    if (wanted.predictor is not None or wanted.powerinfer) and not spec.ffn.sparse:
        raise UsageError(f"no neuron can be predicted to be zero: {spec.ffn.activation} gives no zeros")
    _require_new(path, force=wanted.force)


def _require_new(path: Path, *, force: bool) -> None:
    """Refuse before any work; whether the file is this run's own, its writer finds out."""
    require_new(path, replace=force or may_be_ours(path))


def _predictor(source: ModelSource, spec: ModelSpec, wanted: Wanted) -> Predictor | None:
    """The predictor that was named; else, where its thresholds matter, the one inside the model."""
    found = None
    if wanted.predictor is not None and Path(wanted.predictor).is_dir():
        found, _ = predictor_of_folder(wanted.predictor, source, spec)
    elif wanted.predictor is not None:
        found = load_predictor(wanted.predictor, source.fingerprint, model_name=spec.name, verify=True)
        require_finite(wanted.predictor, {w.name: w for layer in found.layers for w in (layer.fc1, layer.fc2)})
    elif isinstance(source, GgufFile) and (wanted.powerinfer or wanted.threshold is not None):
        found = predictor_inside(source)
    if found is not None:
        found.require_fits(wanted.predictor or source.path, spec)
    elif wanted.powerinfer or wanted.threshold is not None:
        need = "PowerInfer's loader needs a predictor" if wanted.powerinfer else "a threshold is a predictor's"
        raise UsageError(f"{need}, and none is inside the model: name one with --predictor")
    if found is None or wanted.threshold is None:
        return found
    return found.with_threshold(wanted.threshold)


def _write(
    source: ModelSource,
    path: Path,
    spec: ModelSpec,
    wanted: Wanted,
    predictor: Predictor | None,
    order: Order | None,
    activity: Activity | None,
    progress: Progress | None,
) -> WriteReport:
    outtype = None if wanted.outtype == AUTO else wanted.outtype
    how: _How = {
        "threads": find_cores().threads,
        "restart": wanted.restart,
        "replace": wanted.force,
        "progress": progress,
    }
    if wanted.powerinfer and predictor is not None:
        scores = for_powerinfer(predictor)
        return write_powerinfer(source, scores, path, outtype or "f16", order=order, activity=activity, **how)
    records = not wanted.standard and (spec.ffn.sparse or order is not None)
    return convert(
        source,
        path,
        outtype,
        records=records,
        order=order,
        activity=activity,
        predictor=predictor,
        predicting=not wanted.standard,
        **how,
    )


def _converted(source: ModelSource, report: WriteReport, powerinfer: bool, began: float) -> Converted:
    with open_model(report.path) as written:
        inside = activity_inside(written) if isinstance(written, GgufFile) else None
        notes = (*report.notes, *_companions(written))
    return Converted(
        path=report.path,
        powerinfer=powerinfer,
        read=sum(len(tensor.data) for tensor in source.tensors.values()),
        written=report.nbytes,
        seconds=time.perf_counter() - began,
        rounded=report.reblocked,
        notes=notes,
        tokens=None if inside is None else inside.tokens,
    )


def _companions(written: ModelSource) -> Iterator[str]:
    """What there is to say of the sidecars beside a new file, and of one that it lacks."""
    beside = {kind: companion(written.path, kind) for kind in BESIDE}
    ours = {kind: _is_of(path, written.fingerprint) for kind, path in beside.items() if path.is_file()}
    predicting = "blk.0.fc1.weight" in written.tensors
    for kind, own in ours.items():
        hides = ", and hides the predictor inside" if predicting and kind is SidecarKind.PREDICTOR else ""
        if not own:
            yield f"{printable(str(beside[kind]))} is of another model: it will not be used with this one{hides}"
    if predicting and not (ours.get(SidecarKind.AUDIT) or ours.get(SidecarKind.PREDICTOR)):
        yield (
            "the predictor inside was not audited with this file's numbers: --mode auto does not use it until "
            "`thermocline audit` has passed"
        )


def _is_of(sidecar: Path, fingerprint: str) -> bool:
    try:
        return read_sidecar(sidecar, verify=False).model_fingerprint == fingerprint
    except ThermoclineError:
        return False
