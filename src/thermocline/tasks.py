"""What is done with a model's files, without keeping the model loaded: `api` has all of it under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from thermocline.activity.audit import MIN_TOKENS, AuditResult
from thermocline.activity.order import By, Order, save_order
from thermocline.activity.pictures import Picture
from thermocline.activity.profile import Existing, Profiled, Progress
from thermocline.activity.report import write_report
from thermocline.activity.statistics import Activity, merge_all
from thermocline.activity.store import find_activity, save_activity
from thermocline.activity.training import Step, Trained
from thermocline.config import LoadSettings, TrainSettings, settings_of
from thermocline.errors import UsageError
from thermocline.files.atomic import require_kind
from thermocline.files.open import open_model
from thermocline.files.sidecar import SidecarKind, is_sidecar
from thermocline.files.source import ModelSource
from thermocline.hardware.catalogue import machine_names
from thermocline.placement.explain import Table as PlanTable
from thermocline.placement.explain import gain_table, layer_table, plan_diff, sensitivities, speed_table, tier_table
from thermocline.placement.picture import placement_picture
from thermocline.placement.plan_file import load_plan
from thermocline.runtime.arguments import member, path_of, require_whole, settings_or_default, texts_of
from thermocline.runtime.auditing import Audited, audit_predictor
from thermocline.runtime.describe import ModelInfo
from thermocline.runtime.describe import describe as describe_source
from thermocline.runtime.gpu_index import import_gpu_index
from thermocline.runtime.perplexity import Perplexity, Scored, measure_perplexity
from thermocline.runtime.planning import Planned, PlanSettings, plan_model
from thermocline.runtime.profiling import profile_model
from thermocline.runtime.training import train_predictor as train_model

SHIPPED = Path(__file__).parent / "shipped" / "epilimnion.q8_0.gguf"
"""The model that comes with the package: small, trained on the Python standard library's sources."""


def shipped_model() -> Path:
    """The file of the model that comes with the package.

    Raises:
        UsageError: this installation lacks it.
    """
    if not SHIPPED.is_file():
        raise UsageError("this installation has no model of its own; name one with -m/--model FILE")
    return SHIPPED


def opened(model: str | Path | None) -> ModelSource:
    """A model's files; without `model`, those of the one that comes with the package.

    Raises:
        ModelFormatError: it is no model.
        UsageError: none is named, and this installation lacks its own; or it is no path.
    """
    return open_model(shipped_model() if model is None else path_of(model, "model"))


def audit(
    model: str | Path | None,
    texts: Sequence[str | Path],
    settings: LoadSettings | None = None,
    *,
    tokens: int = MIN_TOKENS,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Audited], None] | None = None,
) -> AuditResult:
    """Hold a model's predictor to exact computing over `tokens` tokens of texts, and note the result in its file.

    The predictor is the one beside the model, or `settings.predictor`. Mode auto goes by the note.

    Raises:
        ThermoclineError: the subclass and the message say what was in the way. Not passing is a result, no error.
    """
    require_whole(tokens=tokens)
    with closing(opened(model)) as source:
        return audit_predictor(
            source,
            texts_of(texts),
            settings_or_default(LoadSettings, settings),
            tokens=tokens,
            notice=notice,
            progress=progress,
        )


def describe(model: str | Path | None = None) -> ModelInfo:
    """Say what a model file is, without loading it.

    Raises:
        ModelFormatError: it is none.
    """
    with closing(opened(model)) as source:
        return describe_source(source)


def profile(
    model: str | Path | None,
    texts: Sequence[str | Path],
    output: str | Path,
    settings: LoadSettings | None = None,
    *,
    tokens: int = 0,
    threshold: float = 0.0,
    existing: Existing | str = Existing.REFUSE,
    restart: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Profiled:
    """Run texts (files, or folders of them) through a model, count which neurons fire, and write `output`.

    At most `tokens` are read (0: all). A neuron fires if its activation's magnitude is above `threshold`. A second
    call goes on where one that was killed stopped, unless `restart`.

    Raises:
        ThermoclineError: the subclass and the message say what was in the way.
    """
    require_whole(tokens=tokens)
    with closing(opened(model)) as source:
        return profile_model(
            source,
            texts_of(texts),
            Path(output),
            settings_or_default(LoadSettings, settings),
            tokens=tokens,
            threshold=threshold,
            existing=member(Existing, existing, "existing"),
            restart=restart,
            notice=notice,
            progress=progress,
        )


def perplexity(
    model: str | Path | None,
    texts: Sequence[str | Path],
    settings: LoadSettings | None = None,
    *,
    chunks: int = 0,
    stride: int = 0,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Scored], None] | None = None,
) -> Perplexity:
    """Measure how well a model predicts texts (files, or folders of them), as llama.cpp does.

    Chunks have `settings.ctx_size` tokens (0: 512), of which the second half is scored; at most `chunks` are read (0:
    all). With a `stride`, chunks overlap and every token is scored once.

    Raises:
        ThermoclineError: the subclass and the message say what was in the way.
    """
    require_whole(chunks=chunks, stride=stride)
    with closing(opened(model)) as source:
        return measure_perplexity(
            source,
            texts_of(texts),
            settings_or_default(LoadSettings, settings),
            chunks=chunks,
            stride=stride,
            notice=notice,
            progress=progress,
        )


def train_predictor(
    model: str | Path | None,
    texts: Sequence[str | Path],
    output: str | Path,
    load: LoadSettings | None = None,
    settings: TrainSettings | None = None,
    *,
    activity: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[Step], None] | None = None,
    **overrides: Any,
) -> Trained:
    """Train a predictor on texts (files, or folders of them) and write `output`; needs torch (the extra `train`).

    `overrides` are single fields of `TrainSettings`. `activity`, what `profile` wrote, tells where the search for each
    layer's size begins, and from which magnitude on a neuron fires. A second call goes on where one that was killed
    stopped, unless `restart`; with settings that do not bear on what was read, from that.

    Raises:
        ThermoclineError: the subclass and the message say what was in the way.
    """
    with closing(opened(model)) as source:
        return train_model(
            source,
            texts_of(texts),
            Path(output),
            settings_or_default(LoadSettings, load),
            settings_of(TrainSettings, settings_or_default(TrainSettings, settings), overrides),
            activity=activity,
            overwrite=overwrite,
            restart=restart,
            notice=notice,
            progress=progress,
        )


def read_activity(path: str | Path) -> Activity:
    """Read the statistics that `profile` wrote, or those inside a model that `convert` wrote.

    Raises:
        UsageError: it is a model without any.
        ModelFormatError: the file holds none, or is damaged.
    """
    return find_activity(path)


def merge_activities(paths: Sequence[str | Path], output: str | Path) -> Activity:
    """Add up the statistics of several runs over one model and write them to `output`.

    Raises:
        FingerprintError: they are of different models.
        UsageError: they cannot be merged for another reason, such as a run that is in two of them, or `output` is
            there and no activity.
    """
    require_kind(output, "activity", partial(is_sidecar, kind=SidecarKind.ACTIVITY))
    merged = merge_all([(path, find_activity(path)) for path in paths])
    save_activity(merged, output)
    return merged


def order(path: str | Path, output: str | Path, *, by: By | str = By.FREQUENCY) -> Order:
    """Take the hottest-first order of each layer's neurons from an activity and write it to `output`.

    Raises:
        ModelFormatError: `path` is no activity.
        UsageError: the activity does not know what the order is asked by, or `output` is there and no order.
        OutputError: the file could not be written.
    """
    by = member(By, by, "by")
    made = Order.of(find_activity(path), by)
    save_order(made, output)
    return made


def report(
    path: str | Path,
    output: str | Path | None,
    *,
    predictor: str | Path | None = None,
    pictures: str | Path | None = None,
    plan: str | Path | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[Path]:
    """Draw an activity: one self-contained page `output`, and single pictures (SVG) in the folder `pictures`.

    `predictor` is drawn too; without, the one that lies beside the activity, or `notice` hears why not. `plan` is drawn
    over the activity's heat map. Returns the files that were written.

    Raises:
        FingerprintError: the predictor belongs to another model than the activity.
        PlanError: the plan does, or is damaged.
        UsageError: what is there in the place of the page or of a picture is none.
        OutputError: a file could not be written.
    """
    placed = None if plan is None else load_plan(plan)

    def more(activity: Activity) -> list[Picture]:
        return [] if placed is None else [placement_picture(placed, activity, str(plan))]

    return write_report(path, output, predictor=predictor, pictures=pictures, more=more, notice=notice)


def plan(
    model: str | Path | None = None,
    settings: PlanSettings | None = None,
    load: LoadSettings | None = None,
    *,
    activity: str | Path | None = None,
    gpu_index: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Planned:
    """Decide what of a model lives in which memory, and predict how fast it runs.

    `overrides` are single fields of `PlanSettings`: `plan("m.gguf", vram_budget="8GiB")`. `activity` says which
    neurons are hot (without, what lies beside the model). With `gpu_index`, PowerInfer's choice of neurons is taken.
    `tell` hears what is being done.

    Raises:
        BudgetError: nothing fits; the message has the account and the budget that would do.
        ThermoclineError: the subclass and the message say what was in the way.
    """
    with closing(opened(model)) as source:
        wanted = settings_of(PlanSettings, settings_or_default(PlanSettings, settings), overrides)
        planned = plan_model(source, wanted, settings_or_default(LoadSettings, load), activity=activity, tell=tell)
        return planned if gpu_index is None else import_gpu_index(planned, gpu_index)


def explain(planned: Planned, *, what_helps: bool = True) -> list[PlanTable]:
    """A plan as tables: layers, tiers, speed, and with `what_helps` what more memory or bandwidth would buy."""
    tables = [layer_table(planned.plan), tier_table(planned.plan), speed_table(planned.plan)]
    return [*tables, gain_table(sensitivities(planned.problem, planned.seconds))] if what_helps else tables


def compare_plans(first: str | Path, second: str | Path) -> PlanTable:
    """What differs between two plans of one model, as a table without rows if nothing does.

    Raises:
        PlanError: a file holds no plan.
        UsageError: they are of models that cannot be compared.
    """
    return plan_diff(load_plan(first), load_plan(second))


def known_machines() -> Mapping[str, tuple[str, ...]]:
    """Names of the catalogue of machines that one can plan for, by kind of part."""
    return machine_names()
