"""Training of predictors: read once, then fit layer by layer.

A predictor's hidden layer is as large as pays. For every rank the threshold is set so that the wanted recall is
reached; a larger rank selects fewer neurons for that, but is itself more to read. The rank is grown or shrunk until
predictor and selected rows of the first matrix are the fewest bytes a token. Source of the idea: PowerInfer, section
5.1 (Song et al., SOSP 2024). Where no rank is worth it, the layer gets the smallest predictor there is, which selects
every neuron. A layer's predictor pays where that is less than the first matrix, all of which mode exact reads.

What is done is kept in OUTPUT.work: the data read so far, every fit of a search, how far the current one is, every
finished layer. A run that was killed goes on from there; one with other settings goes on from the data, as far as these
do not depend on them. Where the disk has not room for the data of all layers at once, the texts are read several times,
for some layers each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.activity.calibration import Calibration, Quality, calibrate
from thermocline.activity.capture import STATE, Capture, LayerData, layers_at_once
from thermocline.activity.fit_state import FitState
from thermocline.activity.predictor import RANK_UNIT, Predictor, in_format, load_predictor, save_predictor
from thermocline.activity.profile import Runner
from thermocline.activity.statistics import Activity
from thermocline.activity.statistics import Floats as Wide
from thermocline.activity.texts import Corpus, Reading, Tokenize
from thermocline.config import TrainSettings
from thermocline.errors import NumericalError, ThermoclineError, UsageError, printable, skipped_words
from thermocline.files.atomic import existing_mode, require_kind
from thermocline.files.formats import BY_NAME, F32, BlockFormat
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float, to_float
from thermocline.files.sidecar import SidecarKind, is_sidecar, read_sidecar, write_sidecar
from thermocline.files.workplace import Workplace

Floats = npt.NDArray[np.float32]

GRID: Final = tuple(RANK_UNIT * k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256))
"""Ranks that are tried."""
SEARCH_SHARE: Final = 1 / 3
"""Share of the steps that a fit of the search takes."""
READING: Final = 1 / 3
"""Share of a layer's work that progress takes reading for; its fit is the rest."""
_FITTED: Final = "{}.layer.safetensors"
_FIT: Final = "{}.fit.safetensors"
_SEARCH: Final = "{}.search"


class Matrices(Protocol):
    """What a fit gives: `fc1` (rank, n_embd) and `fc2` (n_ff, rank), float32."""

    @property
    def fc1(self) -> Floats: ...

    @property
    def fc2(self) -> Floats: ...


class LayerFitter(Protocol):
    """Fits one layer; see `fitting.Fitter`."""

    def fit(
        self,
        rank: int,
        share: float = 1.0,
        tick: Callable[[int], None] | None = None,
        state: FitState | None = None,
    ) -> Matrices: ...

    def scores(self, fitted: Any, x: npt.NDArray[np.float16]) -> Floats: ...


MakeFitter = Callable[[LayerData, Floats, int, TrainSettings], LayerFitter]


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """The model that gets a predictor: its sizes, what its layers read without one, and what runs it.

    `down_norms` is (n_layer, n_ff); `first_rows(layer)` gives the first matrix times the norm's weights (n_ff, n_embd).
    """

    fingerprint: str
    name: str
    n_embd: int
    parameters: int
    first_bytes: tuple[int, ...]
    first_rows: Callable[[int], Floats]
    down_norms: Wide
    tokenize: Tokenize
    prefix: tuple[int, ...]
    runner: Runner


class Step(NamedTuple):
    """How far a run is: `share` of all (0 to 1, never less than before), what it does, and tokens a second at that."""

    share: float
    doing: str
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run gave. `layers` tell of each layer what the predictor's info does; `share` is that of the model.

    To find the neurons that fire, a token reads `predicted_bytes`, the predictor and the rows that it selects; without
    one `exact_bytes`, the first matrices. `saves` is what mode auto goes by, beside the audit.
    """

    predictor: Predictor
    layers: tuple[Mapping[str, Any], ...]
    share: float
    predicted_bytes: int
    exact_bytes: int
    saves: bool
    tokens: int
    resumed: bool
    skipped: tuple[Path, ...]
    seconds: float


def train(
    learner: Learner,
    corpus: Corpus,
    output: Path,
    settings: TrainSettings,
    make_fitter: MakeFitter,
    *,
    activity: Activity | None = None,
    overwrite: bool = False,
    restart: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Trained:
    """Train a predictor for every layer on `corpus`, at most `settings.tokens` of it, and write it to `output`.

    Raises:
        UsageError: `output` is there, the text is too short, an unfinished run read something else, or the settings
            allow no rank.
        FingerprintError: `activity` is another model's.
        OutputError: something could not be written; what was there before is untouched.
        NumericalError: the model or the training computes NaN.
    """
    existing_mode(output)  # a folder of this name shows before the work, not after
    if overwrite:
        require_kind(output, "predictor", partial(is_sidecar, kind=SidecarKind.PREDICTOR))
    if activity is not None:
        activity.require_model(learner.fingerprint, learner.name)
    ranks = _ranks(learner, settings)  # what is refused leaves no folder
    reading = _reading(learner, corpus, settings, activity)
    identity = {**_identity(settings, activity), **reading}
    finished = _finished(output, learner, identity)
    place = Workplace(output, identity)
    if finished is not None and place.folder.exists():  # killed between the last two steps of a run
        place.remove()
        return _told(finished, learner, resumed=True)
    if output.exists() and not overwrite:
        raise UsageError(
            f"{printable(str(output))} is there already: --overwrite makes it anew, or name another file with -o"
        )

    def useless(found: Mapping[str, Any]) -> list[Path] | None:
        if any(found.get(name) != value for name, value in reading.items()):
            return None
        read = place.read_state(STATE).get("tokens", 0)
        if read and notice is not None:
            notice(_other_settings(read, found, identity))
        made = (_FITTED, _FIT, _SEARCH + ".json")
        return [file for name in made for file in place.folder.glob(name.format("*"))]

    with place.occupied(restart=restart, useless=useless):
        run = _Run(learner, corpus, settings, ranks, make_fitter, place, activity, progress)
        with place.kept(run.begun, lambda: run.fits):
            predictor = run.go(identity)
            save_predictor(predictor, output, learner.fingerprint, model_name=learner.name)
        place.remove()
    told = _told(predictor, learner, resumed=run.resumed)
    return replace(told, tokens=run.tokens, skipped=tuple(run.skipped), seconds=time.perf_counter() - run.began)


class _Run:
    """One run, from its texts to its predictor."""

    def __init__(
        self,
        learner: Learner,
        corpus: Corpus,
        settings: TrainSettings,
        ranks: tuple[int, ...],
        make_fitter: MakeFitter,
        place: Workplace,
        activity: Activity | None,
        progress: Callable[[Step], None] | None,
    ) -> None:
        self._learner, self._corpus, self._settings, self._ranks = learner, corpus, settings, ranks
        self._make_fitter, self._place, self._activity, self._progress = make_fitter, place, activity, progress
        self.began = time.perf_counter()
        self.tokens = int(place.read_state(STATE).get("tokens", 0))
        self.skipped: list[Path] = []
        self.fits = False
        """Whether what is read will do, so that a run with other settings can go on with it too."""
        self._n_layer, self._n_ff = learner.down_norms.shape
        self.resumed = self.begun()
        self._missing = [layer for layer in range(self._n_layer) if not self._checkpoint(layer).exists()]
        self._read_layers = 0.0
        """Of how many of the missing layers the data are there; in part while reading."""

    def go(self, identity: Mapping[str, Any]) -> Predictor:
        """All layers."""
        while self._missing:
            capture = self._read(self._missing)
            self.fits = True
            waiting = [layer for layer in capture.layers if layer in self._missing]
            for count, layer in enumerate(waiting):
                self._read_layers = len(waiting) - count
                self._fit(layer, capture.data(layer))
                self._missing.remove(layer)
            self._read_layers = 0.0
        layers, thresholds, told = [], [], []
        for layer in range(self._n_layer):
            sidecar = read_sidecar(self._checkpoint(layer), SidecarKind.JOURNAL)
            sidecar.require_model(self._learner.fingerprint, self._learner.name)
            layers.append(PredictorLayer(sidecar.weights["fc1"], sidecar.weights["fc2"]))
            told.append(sidecar.info["layer"])
            thresholds.append(float(told[-1]["threshold"]))
        shares = tuple(float(layer["selected"]) for layer in told)
        info = {"layers": told, "training": {**identity, "read": self.tokens}}
        return Predictor(tuple(layers), tuple(thresholds), shares, info)

    def begun(self) -> bool:
        """Whether there is anything that a second start need not do."""
        fitted = any(self._checkpoint(layer).exists() for layer in range(self._n_layer))
        return fitted or bool(self._place.read_state(STATE))

    def _checkpoint(self, layer: int) -> Path:
        return self._place.folder / _FITTED.format(layer)

    def _read(self, missing: Sequence[int]) -> Capture:
        """The data of as many of the missing layers as the disk holds; of those that were begun, if there are."""
        learner, runner = self._learner, self._learner.runner
        begun = self._place.read_state(STATE).get("layers", [])
        if not set(begun) & set(missing):
            Capture.remove(self._place)
            tokens = min(self._settings.tokens or self._corpus.nbytes, self._corpus.nbytes)
            need = Capture.bytes_per_layer(learner.n_embd, self._n_ff, tokens, runner.window)
            begun = list(missing[: layers_at_once(self._place.folder, missing, need)])
        threshold = 0.0 if self._activity is None else self._activity.threshold
        capture = Capture(self._place, begun, learner.n_embd, learner.down_norms, threshold, runner.to_host)
        if not capture.done:
            self._gather(capture)
        self.tokens = capture.tokens
        if not capture.trained or not capture.checked:
            more = f" ({skipped_words(self.skipped)})" if self.skipped else ""
            raise UsageError(
                f"the text is too short: it makes {capture.tokens} tokens in {capture.sequences} sequences of up to "
                f"{runner.window}{more}; training takes two sequences at least: give more text, or a smaller --ctx-size"
            )
        return capture

    def _gather(self, capture: Capture) -> None:
        learner, began, before = self._learner, time.perf_counter(), capture.tokens
        corpus = self._corpus.shuffled()
        reading = Reading(corpus, learner.tokenize, learner.prefix, learner.runner.window, self._settings.tokens)
        waiting = len(set(capture.layers) & set(self._missing))
        with capture.writing():
            for number, window in enumerate(reading):
                if number < capture.sequences:
                    continue
                capture.begin_sequence()
                learner.runner.run(np.asarray(window.tokens, np.int32), capture)
                capture.end_sequence(len(window.tokens))
                rate = (capture.tokens - before) / (time.perf_counter() - began)
                self._read_layers = waiting * reading.share
                self._tell(f"reading, {reading.share:.0%}: {capture.tokens:,} tokens", rate)
            capture.finish()
        self.skipped = reading.skipped

    def _fit(self, layer: int, data: LayerData) -> None:
        """One layer, to its checkpoint."""
        learner, settings = self._learner, self._settings
        fitter = self._make_fitter(data, self._first_rows(layer), self._n_ff, settings)
        tried: dict[str, Any] = self._place.read_state(_SEARCH.format(layer))
        rank = settings.rank or self._search(layer, data, fitter, tried)
        made, found = self._measured(layer, rank, data, fitter, 1.0)
        first = learner.first_bytes[layer]
        cost = _cost(made, found.quality.selected, first)
        everything = _everything(learner.n_embd, self._n_ff, self._format)
        if not settings.rank and cost >= _cost(everything, 1.0, first):
            active = found.quality.active
            made, found = everything, Calibration(0.0, Quality(1.0, 1.0, active, 1.0, active), ())
        told = {
            "rank": made.rank,
            "bytes": made.fc1.nbytes + made.fc2.nbytes,
            **found.quality.as_dict(),
            "threshold": found.threshold,
            "pays": cost < first,
            "tried": sorted(tried.values(), key=lambda t: int(t["rank"])),
            "curve": [list(point) for point in found.curve],
        }
        tensors = {"fc1": made.fc1, "fc2": made.fc2}
        path, info = self._checkpoint(layer), {"layer": told}
        write_sidecar(path, SidecarKind.JOURNAL, learner.fingerprint, info, tensors, model_name=learner.name)
        self._state(layer).forget()

    def _first_rows(self, layer: int) -> Floats:
        rows = self._learner.first_rows(layer)
        if not np.isfinite(rows).all():
            self.fits = False
            raise NumericalError(
                f"layer {layer}: the FFN's first matrix, or the norm before it, holds NaN or infinity; the model's "
                "file is damaged or badly converted"
            )
        return rows

    def _search(self, layer: int, data: LayerData, fitter: LayerFitter, tried: dict[str, Any]) -> int:
        """The rank of the grid from which neither neighbour is cheaper, beginning at what the activity suggests."""

        def cost(place: int) -> float:
            rank = self._ranks[place]
            if str(rank) not in tried:
                made, found = self._measured(layer, rank, data, fitter, SEARCH_SHARE)
                tried[str(rank)] = {
                    "rank": rank, "bytes": made.fc1.nbytes + made.fc2.nbytes, "selected": found.quality.selected,
                    "read": _cost(made, found.quality.selected, self._learner.first_bytes[layer]),
                }  # fmt: skip
                self._place.write_state(_SEARCH.format(layer), tried)
            return float(tried[str(rank)]["read"])

        place = self._first_guess(layer)
        while True:
            near = range(max(place - 1, 0), min(place + 2, len(self._ranks)))
            best = min(near, key=cost)
            if best == place:
                return self._ranks[place]
            place = best

    def _first_guess(self, layer: int) -> int:
        """The fewer neurons give most activations, the smaller a predictor can be."""
        share = 0.4 if self._activity is None else float(self._activity.coverage(0.8)[0][layer])
        wanted = share * self._learner.n_embd / 2
        return min(range(len(self._ranks)), key=lambda place: abs(self._ranks[place] - wanted))

    def _measured(
        self, layer: int, rank: int, data: LayerData, fitter: LayerFitter, share: float
    ) -> tuple[PredictorLayer, Calibration]:
        """A fit in the format that it will be stored in, and its threshold."""
        began, done = time.perf_counter(), 0

        def tick(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = done / (time.perf_counter() - began)
            self._tell(f"layer {layer + 1} of {self._n_layer}, rank {rank}", rate)

        fitted = fitter.fit(rank, share, tick, self._state(layer))
        made = in_format(_layer(fitted.fc1, fitted.fc2), self._format)
        rounded = _Rounded(to_float(made.fc1), to_float(made.fc2))
        goals = {"energy_recall": self._settings.energy_recall, "recall": self._settings.recall}
        return made, calibrate(partial(fitter.scores, rounded), data.check, data.energy, **goals)

    def _state(self, layer: int) -> FitState:
        return FitState(self._place.folder / _FIT.format(layer), self._learner.fingerprint, self._learner.name)

    @property
    def _format(self) -> BlockFormat:
        return BY_NAME[self._settings.outtype.upper()]

    def _tell(self, doing: str, rate: float) -> None:
        if self._progress is not None:
            done = self._n_layer - len(self._missing) + READING * self._read_layers
            self._progress(Step(done / self._n_layer, doing, rate))


class _Rounded(NamedTuple):
    fc1: Floats
    fc2: Floats


def _ranks(learner: Learner, settings: TrainSettings) -> tuple[int, ...]:
    """The ranks that are allowed; of one that was asked for, this.

    Raises:
        UsageError: there is none.
    """
    n_layer, n_ff = learner.down_norms.shape
    one = n_layer * (learner.n_embd + n_ff)
    most = settings.max_share * learner.parameters if settings.max_share else math.inf
    if settings.rank:
        if settings.rank * one > most:
            share = settings.rank * one / learner.parameters
            raise UsageError(
                f"a predictor of rank {settings.rank} has {share:.2%} of the model's numbers; --max-share allows "
                f"{settings.max_share:.2%}: lower --rank, or allow more, or 0 for no limit"
            )
        return (settings.rank,)
    ranks = tuple(rank for rank in GRID if rank * one <= most and rank <= 2 * learner.n_embd + RANK_UNIT)
    if not ranks:
        raise UsageError(
            f"a predictor of the smallest rank, {RANK_UNIT}, has {RANK_UNIT * one / learner.parameters:.1%} of the "
            f"model's numbers; --max-share allows {settings.max_share:.1%}: allow more, or 0 for no limit"
        )
    return ranks


def _reading(learner: Learner, corpus: Corpus, settings: TrainSettings, activity: Activity | None) -> dict[str, Any]:
    """All that the data depend on."""
    return {
        "model": learner.fingerprint,
        "texts": corpus.digest,
        "window": learner.runner.window,
        "tokens": settings.tokens,
        "threshold": 0.0 if activity is None else activity.threshold,
    }


def _identity(settings: TrainSettings, activity: Activity | None) -> dict[str, Any]:
    """What makes a run what it is, beside its data."""
    known = {name: getattr(settings, name) for name in settings.__slots__}
    values = {name: value if isinstance(value, int | float) else str(value) for name, value in known.items()}
    return {**values, "activity": 0 if activity is None else activity.tokens}


def _other_settings(read: int, found: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    changed = [
        f"{name.replace('_', '-')} {value}, was {found.get(name)}"
        for name, value in identity.items()
        if found.get(name) != value
    ]
    return f"goes on with {read:,} tokens that were read before, and fits all layers anew: {'; '.join(changed)}"


def _finished(output: Path, learner: Learner, identity: Mapping[str, Any]) -> Predictor | None:
    """The predictor in `output`, if this very run made it."""
    if not output.exists():
        return None
    try:
        predictor = load_predictor(output, learner.fingerprint, verify=True)
    except ThermoclineError:
        return None
    made = predictor.info.get("training")
    same = isinstance(made, Mapping) and {k: v for k, v in made.items() if k != "read"} == identity
    return predictor if same else None


def _told(predictor: Predictor, learner: Learner, *, resumed: bool) -> Trained:
    layers = tuple(predictor.info["layers"])
    tokens = int(predictor.info["training"]["read"])
    first = learner.first_bytes
    return Trained(
        predictor,
        layers,
        predictor.parameters / learner.parameters,
        predicted_bytes=round(predictor.read_bytes(first)),
        exact_bytes=sum(first),
        saves=predictor.saves(first),
        tokens=tokens,
        resumed=resumed,
        skipped=(),
        seconds=0.0,
    )


def _layer(fc1: Floats, fc2: Floats) -> PredictorLayer:
    return PredictorLayer(from_float("fc1", fc1, F32), from_float("fc2", fc2, F32))


def _everything(n_embd: int, n_ff: int, fmt: BlockFormat) -> PredictorLayer:
    """A predictor that selects all neurons at a threshold of 0."""
    zeros = np.zeros((RANK_UNIT, n_embd), np.float32), np.zeros((n_ff, RANK_UNIT), np.float32)
    return in_format(_layer(*zeros), fmt)


def _cost(made: PredictorLayer, selected: float, first: int) -> float:
    """Bytes that a token reads: the predictor, and the selected rows of the first matrix."""
    return made.fc1.nbytes + made.fc2.nbytes + selected * first
