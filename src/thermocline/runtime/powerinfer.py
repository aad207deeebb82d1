"""PowerInfer's folders of PyTorch files, in and out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.activity.applied import applied_order
from thermocline.activity.inside import for_powerinfer, predictor_inside
from thermocline.activity.predictor import Predictor, predictor_of, save_predictor
from thermocline.activity.statistics import Activity
from thermocline.activity.store import MAX_TOKENS, find_activity, save_activity
from thermocline.errors import FingerprintError, ModelFormatError, UsageError, printable
from thermocline.files.atomic import require_kind
from thermocline.files.gguf import GgufFile
from thermocline.files.open import open_model
from thermocline.files.powerinfer_folder import (
    read_activation_folder,
    read_predictor_folder,
    write_activation_folder,
    write_predictor_folder,
)
from thermocline.files.sidecar import SidecarKind, is_sidecar, named, read_sidecar
from thermocline.files.source import ModelSource
from thermocline.model.families import family_of
from thermocline.model.spec import ModelSpec

SOLVED = 256
"""PowerInfer's solver takes neurons in groups of so many."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What was written, and what there is to say about it, one line each."""

    path: Path
    n_layer: int
    n_ff: int
    notes: tuple[str, ...]


def import_activity(
    model: str | Path, folder: str | Path, output: str | Path, *, tokens: int = 0, force: bool = False
) -> Exchanged:
    """Read PowerInfer's `activation_0.pt` and so on, by their numbers, as the activity of `model`, and write it.

    The files do not say how many `tokens` were read; 0 takes the largest count for it, and the activity says so.

    Raises:
        UsageError: fewer tokens than a neuron fired or more than `MAX_TOKENS`, the model's neurons were put in another
            order, or `output` is there and not to be replaced.
        ModelFormatError: the folder is not of this model's layers and neurons, or holds anything but whole numbers up
            to `MAX_TOKENS`.
        OutputError: the file could not be written.
    """
    path, folder = _new(output, SidecarKind.ACTIVITY, force=force), Path(folder)
    with open_model(model) as source:
        spec, fingerprint = family_of(source).spec(source), source.fingerprint
        _require_own_numbers(folder, source, spec, "what is counted there serves this one too")
    found = read_activation_folder(folder, n_layer=spec.n_layer, n_ff=spec.n_ff)
    fired = np.stack([_whole(folder, layer, counts) for layer, counts in enumerate(found.counts)])
    most, notes = int(fired.max()), list(found.warnings)
    if tokens and tokens < most:
        raise UsageError(f"tokens is {tokens}, but a neuron fired {most} times")
    if not 0 <= tokens <= MAX_TOKENS:
        raise UsageError(f"tokens is {tokens}; allowed: 0 (the largest count) to {MAX_TOKENS}")
    if not tokens:
        notes.append(f"the files do not say how many tokens were read: taken for {max(most, 1)}, the largest count")
    activity = Activity.from_counts(fingerprint, spec.name, fired, tokens or max(most, 1))
    save_activity(replace(activity, tokens_known=tokens != 0), path)
    return Exchanged(path, spec.n_layer, spec.n_ff, tuple(notes))


def _whole(folder: Path, layer: int, counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Counts of a layer, as numbers that an activity may hold."""
    field = f"activation_{layer}.pt"
    if counts.max() > MAX_TOKENS:
        raise ModelFormatError(folder, field, f"counts {counts.max():.0f} firings; allowed: 0 to {MAX_TOKENS}")
    fired = counts.astype(np.int64)
    if (fired != counts).any():
        raise ModelFormatError(folder, field, "holds counts that are no whole numbers")
    return fired


def export_activity(activity_file: str | Path, folder: str | Path) -> Exchanged:
    """Write an activity's counts as PowerInfer's `activation_0.pt` and so on, in a new folder.

    Raises:
        ModelFormatError: the file holds no activity.
        OutputError: the folder is there and not empty, or cannot be written.
    """
    activity, folder = find_activity(activity_file), Path(folder)
    write_activation_folder(folder, list(activity.fired))
    notes = []
    if activity.n_ff % SOLVED:
        notes.append(f"PowerInfer solves only for a multiple of {SOLVED} neurons; these are {activity.n_ff}")
    return Exchanged(folder, activity.n_layer, activity.n_ff, tuple(notes))


def import_predictor(model: str | Path, folder: str | Path, output: str | Path, *, force: bool = False) -> Exchanged:
    """Read PowerInfer's `model_0.pt` and so on, and its `config.json`, as the predictor of `model`, and write it.

    Raises:
        UsageError: `output` is there and not to be replaced.
        UsageError, FingerprintError, ModelFormatError, NumericalError: as `predictor_of_folder`.
        OutputError: the file could not be written.
    """
    path = _new(output, SidecarKind.PREDICTOR, force=force)
    with open_model(model) as source:
        spec, fingerprint = family_of(source).spec(source), source.fingerprint
        predictor, warnings = predictor_of_folder(folder, source, spec)
    save_predictor(predictor, path, fingerprint, model_name=spec.name)
    return Exchanged(path, spec.n_layer, spec.n_ff, warnings)


def predictor_of_folder(folder: str | Path, source: ModelSource, spec: ModelSpec) -> tuple[Predictor, tuple[str, ...]]:
    """The predictor of a model in one of PowerInfer's folders, and names of files that were not read.

    Raises:
        UsageError: the folder does not say whose it is, and the model's neurons were put in another order.
        FingerprintError: it says that it is another model's.
        ModelFormatError: it is not of this model's layers and sizes, or holds anything but matrices.
        NumericalError: a number is NaN or infinite.
    """
    found = read_predictor_folder(folder, n_layer=spec.n_layer)
    predictor = Predictor.of_powerinfer(found.predictor)
    predictor.require_fits(folder, spec)
    if not found.model:
        _require_own_numbers(Path(folder), source, spec, "convert that one with --predictor")
    elif found.model != source.fingerprint:
        remedy = "give the folder that was exported for this model, or train a predictor"
        raise FingerprintError(folder, found.model[:12], named(spec.name, source.fingerprint), remedy)
    return predictor, found.warnings


def export_predictor(predictor_file: str | Path, folder: str | Path, *, threshold: float | None = None) -> Exchanged:
    """Write a predictor, a sidecar or what a model file has inside, as PowerInfer's `model_0.pt` and so on.

    `threshold`, if given, is used in all layers.

    Raises:
        UsageError: the thresholds of its layers cannot be made one, or the model has no predictor inside.
        ModelFormatError: the file holds no predictor.
        OutputError: the folder is there and not empty, or cannot be written.
    """
    predictor, model = _predictor(Path(predictor_file))
    if threshold is not None:
        predictor = predictor.with_threshold(threshold)
    write_predictor_folder(folder, for_powerinfer(predictor), model=model)
    return Exchanged(Path(folder), len(predictor.layers), predictor.layers[0].fc2.rows, ())


def _predictor(path: Path) -> tuple[Predictor, str]:
    """A predictor, and the fingerprint of its model."""
    if path.suffix == ".safetensors":
        sidecar = read_sidecar(path, SidecarKind.PREDICTOR)
        return predictor_of(sidecar), sidecar.model_fingerprint
    file = GgufFile.open(path)
    inside = predictor_inside(file)
    if inside is None:
        raise UsageError(f"{printable(str(path))} has no predictor inside")
    return inside, file.fingerprint


def _require_own_numbers(folder: Path, source: ModelSource, spec: ModelSpec, remedy: str) -> None:
    """Refuse what numbers neurons as the published model does, where the file has put them in another order."""
    if applied_order(source.metadata, spec) is not None:
        raise UsageError(
            f"{printable(str(folder))}: does not say which of {spec.n_ff} neurons is which in "
            f"{printable(str(source.path))}, whose neurons were put in another order: give it with the model that "
            f"this one was converted from; {remedy}"
        )


def _new(path: str | Path, kind: SidecarKind, *, force: bool) -> Path:
    path = Path(path)
    if path.exists() and not force:
        raise UsageError(f"{printable(str(path))} is there already; --force replaces it")
    require_kind(path, str(kind), partial(is_sidecar, kind=kind))
    return path
