"""From a model's files and texts to an activity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from thermocline.activity.accumulator import down_norms
from thermocline.activity.profile import Existing, Profiled, Progress, Subject, journal_of, profile, require_replaceable
from thermocline.activity.texts import find_texts
from thermocline.config import LoadSettings, Mode
from thermocline.errors import UsageError, printable
from thermocline.files.source import ModelSource
from thermocline.model.families import family_of
from thermocline.model.spec import ModelSpec
from thermocline.runtime.loading import load_model
from thermocline.runtime.observed import ObservedRunner

WINDOW = 2048
"""Longest sequence where the context is left to us: the cost of attention grows with it, the counts hardly change."""


def profile_model(
    source: ModelSource,
    texts: Sequence[Path | str],
    output: Path,
    settings: LoadSettings,
    *,
    tokens: int = 0,
    threshold: float = 0.0,
    existing: Existing = Existing.REFUSE,
    restart: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Profiled:
    """Load `source`, run `texts` through it and write its activity; see `activity.profile.profile`.

    Raises:
        UsageError: every neuron of this model would count as firing, or a text or a setting is not usable.
        ThermoclineError: what `load_model` and `profile` raise.
    """
    corpus = find_texts(texts)
    if not output.parent.is_dir():
        raise UsageError(f"the folder {printable(str(output.parent))} is not there; make it first")
    require_replaceable(output, existing)
    if output.exists() and existing is Existing.REFUSE and not journal_of(output).exists():
        raise UsageError(f"{printable(str(output))} is there already; --merge adds to it, --overwrite makes it anew")
    family = family_of(source)
    spec = family.spec(source)
    if not spec.ffn.sparse and not threshold:
        raise UsageError(
            f"{spec.ffn.activation} gives no zeros, so every neuron would count as firing: "
            "say with --threshold from which magnitude on one does"
        )
    window = settings.ctx_size or min(spec.n_ctx_train, WINDOW)
    settings.require_unwatched("profile")
    load = replace(settings, ctx_size=window, mode=_mode(settings.mode, spec))
    with closing(load_model(source, load, check=True)) as loaded:
        if notice is not None:
            for line in loaded.notices:
                notice(line)
        tokenizer = loaded.tokenizer
        subject = Subject(
            fingerprint=source.fingerprint,
            name=spec.name,
            down_norms=down_norms(family.weights(source, spec), spec),
            tokenize=lambda text: tokenizer.encode(text, add_special=False),
            prefix=tokenizer.prefix,
            runner=ObservedRunner(loaded.transformer, window, settings),
        )
        return profile(
            subject,
            corpus,
            output,
            tokens=tokens,
            threshold=threshold,
            existing=existing,
            restart=restart,
            progress=progress,
        )


def _mode(mode: Mode, spec: ModelSpec) -> Mode:
    """One that computes every neuron that fires.

    Raises:
        UsageError: a mode was asked for that leaves neurons out.
    """
    if mode is Mode.AUTO:
        return Mode.EXACT if spec.ffn.sparse else Mode.DENSE
    if mode not in (Mode.EXACT, Mode.DENSE):
        raise UsageError(f"mode {mode} does not compute every neuron that fires; profile with exact or dense")
    return mode
