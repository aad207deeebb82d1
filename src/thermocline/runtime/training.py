"""From a model's files and texts to a predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.activity.accumulator import down_norms
from thermocline.activity.applied import activity_for
from thermocline.activity.texts import find_texts
from thermocline.activity.training import Learner, MakeFitter, Step, Trained, train
from thermocline.config import LoadSettings, Mode, TrainSettings
from thermocline.errors import MissingPackageError, UsageError, printable
from thermocline.files.quantize import to_float
from thermocline.files.source import ModelSource
from thermocline.hardware.gpu_choice import choose_gpu, find_gpu
from thermocline.memory.checks import first_bytes
from thermocline.model.families import family_of
from thermocline.runtime.loading import LoadedModel, load_model
from thermocline.runtime.observed import ObservedRunner
from thermocline.runtime.placing import ACTIVITY_UNUSED
from thermocline.runtime.profiling import WINDOW


def train_predictor(
    source: ModelSource,
    texts: Sequence[Path | str],
    output: Path,
    load: LoadSettings,
    settings: TrainSettings,
    *,
    activity: Path | str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Trained:
    """Load `source`, run `texts` through it, train its predictor and write it; see `activity.training.train`.

    Raises:
        MissingPackageError: torch is not installed.
        UsageError: no neuron of this model is ever zero, or a text or a setting is not usable.
        HardwareError: a GPU was asked for and there is none.
        ThermoclineError: what `load_model` and `train` raise.
    """
    corpus = find_texts(texts)
    if not output.parent.is_dir():
        raise UsageError(f"the folder {printable(str(output.parent))} is not there; make it first")
    spec = family_of(source).spec(source)
    if not spec.ffn.sparse:
        raise UsageError(f"{spec.ffn.activation} gives no zeros, so that there is nothing to predict")
    if load.mode not in (Mode.AUTO, Mode.EXACT, Mode.DENSE):
        raise UsageError(f"mode {load.mode} does not compute every neuron that fires; train with exact or dense")
    load = one_gpu(load, settings)
    make_fitter = _fitter(settings, notice)
    counted = None if activity is None else activity_for(source, spec, activity)
    window = load.ctx_size or min(spec.n_ctx_train, WINDOW)
    mode = Mode.EXACT if load.mode is Mode.AUTO else load.mode
    load.require_unwatched("train-predictor")
    with closing(load_model(source, replace(load, ctx_size=window, mode=mode), check=True)) as loaded:
        if notice is not None:
            for line in loaded.notices:
                if activity is None or line != ACTIVITY_UNUSED:  # training uses it
                    notice(line)
        return train(
            _learner(source, loaded, ObservedRunner(loaded.transformer, window, load)),
            corpus,
            output,
            settings,
            make_fitter,
            activity=counted,
            overwrite=overwrite,
            restart=restart,
            notice=notice,
            progress=progress,
        )


def one_gpu(load: LoadSettings, settings: TrainSettings) -> LoadSettings:
    """Choose the GPU that trains; `load` names the same where it names one.

    Raises:
        HardwareError: there is no such GPU.
        UsageError: two are named.
    """
    if settings.train_gpu is None:
        return load
    if load.gpu is not None and find_gpu(load.gpu).uuid != find_gpu(settings.train_gpu).uuid:
        raise UsageError(
            f"GPU {printable(load.gpu)} is to compute and {printable(settings.train_gpu)} to train, but a process uses "
            "one GPU: name the same"
        )
    chosen = choose_gpu(settings.train_gpu)
    return load if load.gpu is None else replace(load, gpu=chosen)


def _learner(source: ModelSource, loaded: LoadedModel, runner: ObservedRunner) -> Learner:
    """What training has to know of a loaded model."""
    spec, tokenizer = loaded.transformer.spec, loaded.tokenizer
    weights = family_of(source).weights(source, spec)
    first = "ffn_gate" if spec.ffn.gated else "ffn_up"

    def first_rows(layer: int) -> npt.NDArray[np.float32]:
        rows = to_float(weights[f"blk.{layer}.{first}.weight"])
        shared = weights[f"blk.{layer}.attn_norm.weight"]  # where the FFN has no norm of its own
        return rows * to_float(weights.get(f"blk.{layer}.ffn_norm.weight", shared)).reshape(-1)

    return Learner(
        fingerprint=source.fingerprint,
        name=spec.name,
        n_embd=spec.n_embd,
        parameters=spec.parameters,
        first_bytes=first_bytes(spec, weights),
        first_rows=first_rows,
        down_norms=down_norms(weights, spec),
        tokenize=lambda text: tokenizer.encode(text, add_special=False),
        prefix=tokenizer.prefix,
        runner=runner,
    )


def _fitter(settings: TrainSettings, notice: Callable[[str], None] | None) -> MakeFitter:
    """What fits, if torch is there.

    Raises:
        MissingPackageError: it is not.
        HardwareError: a GPU was asked for and there is none.
    """
    try:
        from thermocline.activity.fitting import fitters  # torch takes seconds and may be missing
    except (ImportError, OSError) as error:
        raise MissingPackageError("training a predictor", "torch", "train") from error
    return fitters(settings, notice)
