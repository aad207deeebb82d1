"""READ FIRST: load a model, generate, stream, chat; ask what a file is, what this machine has, how fast it runs.

    from thermocline import LLM

    with LLM.load("model.gguf") as llm:
        for item in llm.stream("def quicksort(items):", max_tokens=64):
            print(item.text, end="", flush=True)

`load` opens the file (`files`), reads its tokenizer (`text`) and its network (`model`), places the weights
(`memory`, `ops`), and hands all of it to an engine (`runtime`), which prefills and decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from thermocline.activity.audit import MIN_TOKENS, AuditResult
from thermocline.activity.order import By, Order, save_order
from thermocline.activity.pictures import Picture
from thermocline.activity.profile import Existing, Profiled, Progress
from thermocline.activity.report import write_report
from thermocline.activity.statistics import Activity, merge_all
from thermocline.activity.store import load_activity, save_activity
from thermocline.activity.training import Step, Trained
from thermocline.config import LoadSettings, SamplingSettings, TrainSettings
from thermocline.errors import ThermoclineError, UsageError, printable
from thermocline.files.open import open_model
from thermocline.files.source import ModelSource
from thermocline.hardware.catalogue import machine_names
from thermocline.hardware.probe import Probe, probe_machine
from thermocline.hardware.survey import Survey, examine
from thermocline.model.spec import ModelSpec
from thermocline.placement.explain import Table as PlanTable
from thermocline.placement.explain import gain_table, layer_table, plan_diff, sensitivities, speed_table, tier_table
from thermocline.placement.picture import placement_picture
from thermocline.placement.plan import Plan
from thermocline.placement.plan_file import load_plan, save_plan
from thermocline.runtime.auditing import Audited, audit_predictor
from thermocline.runtime.bench import BenchRow, run_bench
from thermocline.runtime.conversion import Converted, Wanted
from thermocline.runtime.conversion import convert_model as convert
from thermocline.runtime.conversion import quantize_model as quantize
from thermocline.runtime.describe import ModelInfo, PredictorInfo
from thermocline.runtime.describe import describe as describe_source
from thermocline.runtime.generation import FinishReason, Generation, Item, Stream
from thermocline.runtime.loading import LoadedModel, load_model
from thermocline.runtime.perplexity import Perplexity, Scored, measure_perplexity
from thermocline.runtime.planning import Planned, PlanSettings, export_gpu_index, import_gpu_index, plan_model
from thermocline.runtime.powerinfer import (
    Exchanged,
    export_activity,
    export_predictor,
    import_activity,
    import_predictor,
)
from thermocline.runtime.profiling import profile_model
from thermocline.runtime.report import RunReport
from thermocline.runtime.training import train_predictor as train_model
from thermocline.text.chat import ChatTemplate

__all__ = [
    "LLM", "Activity", "AuditResult", "Audited", "BenchRow", "By", "Converted", "Exchanged", "Existing",
    "FinishReason", "Generation", "Item", "LoadSettings", "ModelInfo", "Order", "Perplexity", "Plan", "PlanSettings",
    "PlanTable", "Planned", "PredictorInfo", "Probe", "Profiled", "Progress", "RunReport", "SamplingSettings",
    "Scored", "Step", "Stream", "Survey", "ThermoclineError", "TrainSettings", "Trained", "Wanted", "audit",
    "compare_plans", "convert", "describe", "examine", "explain", "export_activity", "export_gpu_index",
    "export_predictor", "import_activity", "import_predictor", "known_machines", "merge_activities", "order",
    "perplexity", "plan", "probe_machine", "profile", "quantize", "read_activity", "report", "save_order", "save_plan",
    "shipped_model", "train_predictor",
]  # fmt: skip

Settings = TypeVar("Settings", LoadSettings, SamplingSettings, PlanSettings, TrainSettings)
Messages = Sequence[Mapping[str, Any]]

SHIPPED = Path(__file__).parent / "shipped" / "epilimnion.q8_0.gguf"
"""The model that comes with the package: small, trained on the Python standard library's sources."""


class LLM:
    """A loaded model. Make one with `LLM.load`; close it, or use it in a `with` block. Not safe between threads."""

    def __init__(self, model: LoadedModel, source: ModelSource) -> None:
        self._model: LoadedModel | None = model
        self._source = source
        self._template: ChatTemplate | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        settings: LoadSettings | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **overrides: Any,
    ) -> LLM:
        """Load a GGUF file or a Hugging Face folder; without `model`, the one that comes with the package.

        `overrides` are single fields of `LoadSettings`: `LLM.load("m.gguf", ctx_size=4096)`. `progress` is told how
        many bytes of how many were read, while the weights are.

        Raises:
            ThermoclineError: the file, the machine or a setting does not allow it; the subclass says which.
        """
        settings = _settings(LoadSettings, settings, overrides)
        source = open_model(shipped_model() if model is None else model)
        try:
            return cls(load_model(source, settings, progress), source)
        except BaseException:
            source.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        """Sizes and settings of the network."""
        return self._loaded.transformer.spec

    @property
    def n_ctx(self) -> int:
        """Context length in tokens."""
        return self._loaded.engine.n_ctx

    @property
    def mode(self) -> str:
        """How the FFN is computed: `dense`, `exact` or `predicted`."""
        return self._loaded.transformer.mode.value

    @property
    def ops(self) -> str:
        """Which implementation computes, such as `cpu/avx512`; of several devices all, fastest memory first."""
        devices = self._loaded.transformer.devices
        if len(devices) == 1:
            return devices[0].ops.name
        return ", ".join(f"{device.ops.name} in {device.tier.upper()}" for device in devices)

    @property
    def threads(self) -> int:
        """CPU threads that compute."""
        return self._loaded.threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, mapped and made."""
        return self._loaded.report.mapped_bytes + self._loaded.report.resident_bytes

    @property
    def predictor_bytes(self) -> int:
        """Bytes of the predictor that is used, 0 where the mode is not predicted."""
        return self._loaded.report.predictor_bytes

    @property
    def notices(self) -> tuple[str, ...]:
        """What was odd about the model or was decided while loading, one line each."""
        return self._loaded.notices

    @property
    def plan(self) -> Plan | None:
        """What places the model on several devices or under budgets; None where it is in RAM as it is."""
        return self._loaded.placing.plan

    def plan_tables(self) -> list[PlanTable]:
        """The plan as tables: layers, speed, bytes by tier; and what is reserved, once loaded. Empty without a plan."""
        if self.plan is None:
            return []
        reserved = tuple((t.value, p.value, size) for t, p, size in self._loaded.placing.memory.ledger.rows())
        title = "bytes reserved, once loaded"
        return [
            layer_table(self.plan),
            speed_table(self.plan),
            tier_table(self.plan),
            PlanTable(title, ("tier", "purpose", "bytes"), reserved),
        ]

    @property
    def load_seconds(self) -> float:
        """What loading took."""
        return self._loaded.seconds

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self._loaded.tokenizer.chat_template is not None

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`, with the model's bos and eos tokens around it unless `add_special` is off.

        `parse_special` reads the spelling of special tokens, such as <|im_end|>, as these tokens.
        """
        return self._loaded.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens have none."""
        return self._loaded.tokenizer.decode(tokens)

    def stream(self, prompt: str | Sequence[int], sampling: SamplingSettings | None = None, **overrides: Any) -> Stream:
        """Continue `prompt` (a text, or token ids as they are), token by token.

        `overrides` are single fields of `SamplingSettings`: `llm.stream("Hi", temperature=0, max_tokens=64)`.
        Starting a stream ends the streams that were started before.

        Raises:
            ContextError: the prompt does not fit the context.
            SamplingError: a setting is out of its range.
        """
        tokens = self._prompt(prompt) if isinstance(prompt, str) else list(prompt)
        return self._stream(tokens, _settings(SamplingSettings, sampling, overrides))

    def generate(
        self, prompt: str | Sequence[int], sampling: SamplingSettings | None = None, **overrides: Any
    ) -> Generation:
        """Continue `prompt` to the end; see `stream`."""
        with self.stream(prompt, sampling, **overrides) as stream:
            return stream.collect()

    def stream_chat(self, messages: Messages, sampling: SamplingSettings | None = None, **overrides: Any) -> Stream:
        """Answer `messages` ({"role": ..., "content": ...}) by the model's own chat template.

        What the messages have in common with those of the last call is not computed again.

        Raises:
            ChatTemplateError: the model has no template, or the template refuses the messages.
            ContextError, SamplingError: as for `stream`.
        """
        if self._template is None:
            self._template = ChatTemplate.of(self._loaded.tokenizer)
        tokens = self.tokenize(self._template.render(messages), add_special=False, parse_special=True)
        return self._stream(tokens, _settings(SamplingSettings, sampling, overrides), chat=True)

    def chat(self, messages: Messages, sampling: SamplingSettings | None = None, **overrides: Any) -> Generation:
        """Answer `messages` to the end; see `stream_chat`."""
        with self.stream_chat(messages, sampling, **overrides) as stream:
            return stream.collect()

    def bench(self, *, prompt: int = 512, generate: int = 128, repetitions: int = 5) -> Iterator[BenchRow]:
        """Measure prefill and decode speed; one row each, as they are done."""
        return run_bench(self._loaded.engine, prompt=prompt, generate=generate, repetitions=repetitions)

    def close(self) -> None:
        """Let go of the files and the memory; twice does no harm."""
        if self._template is not None:
            self._template.close()
        if self._model is not None:
            self._model.close()
        self._model = self._template = None
        self._source.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise UsageError("this model is closed; load it again")
        return self._model

    def _prompt(self, text: str) -> list[int]:
        """Tokens to continue: `text` with what the model puts before a text, and not what it puts after one."""
        tokenizer = self._loaded.tokenizer
        return [*tokenizer.prefix, *tokenizer.encode(text, add_special=False)]

    def _stream(self, tokens: list[int], settings: SamplingSettings, *, chat: bool = False) -> Stream:
        loaded = self._loaded
        return Stream(
            loaded.engine, loaded.tokenizer, tokens, settings, reuse=chat, chat=chat, load_seconds=loaded.seconds
        )


def shipped_model() -> Path:
    """The file of the model that comes with the package.

    Raises:
        UsageError: this installation lacks it.
    """
    if not SHIPPED.is_file():
        raise UsageError("this installation has no model of its own; name one with -m/--model FILE")
    return SHIPPED


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
    source = open_model(shipped_model() if model is None else model)
    try:
        return audit_predictor(
            source, texts, settings or LoadSettings(), tokens=tokens, notice=notice, progress=progress
        )
    finally:
        source.close()


def describe(model: str | Path | None = None) -> ModelInfo:
    """Say what a model file is, without loading it.

    Raises:
        ModelFormatError: it is none.
    """
    source = open_model(shipped_model() if model is None else model)
    try:
        return describe_source(source)
    finally:
        source.close()


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
    source = open_model(shipped_model() if model is None else model)
    try:
        return profile_model(
            source,
            texts,
            Path(output),
            settings or LoadSettings(),
            tokens=tokens,
            threshold=threshold,
            existing=Existing(existing),
            restart=restart,
            notice=notice,
            progress=progress,
        )
    finally:
        source.close()


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
    source = open_model(shipped_model() if model is None else model)
    try:
        return measure_perplexity(
            source,
            texts,
            settings or LoadSettings(),
            chunks=chunks,
            stride=stride,
            notice=notice,
            progress=progress,
        )
    finally:
        source.close()


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
    stopped, unless `restart`.

    Raises:
        ThermoclineError: the subclass and the message say what was in the way.
    """
    source = open_model(shipped_model() if model is None else model)
    try:
        return train_model(
            source,
            texts,
            Path(output),
            load or LoadSettings(),
            _settings(TrainSettings, settings, overrides),
            activity=activity,
            overwrite=overwrite,
            restart=restart,
            notice=notice,
            progress=progress,
        )
    finally:
        source.close()


def read_activity(path: str | Path) -> Activity:
    """Read the statistics that `profile` wrote.

    Raises:
        ModelFormatError: the file holds none, or is damaged.
    """
    return load_activity(path)


def merge_activities(paths: Sequence[str | Path], output: str | Path) -> Activity:
    """Add up the statistics of several runs over one model and write them to `output`.

    Raises:
        FingerprintError: they are of different models.
        UsageError: they cannot be merged for another reason, such as a run that is in two of them.
    """
    merged = merge_all([load_activity(path) for path in paths])
    save_activity(merged, output)
    return merged


def order(path: str | Path, output: str | Path, *, by: By | str = By.FREQUENCY) -> Order:
    """Take the hottest-first order of each layer's neurons from an activity and write it to `output`.

    Raises:
        ModelFormatError: `path` is no activity.
        UsageError: the activity does not know what the order is asked by.
        OutputError: the file could not be written.
    """
    try:
        by = By(by)
    except ValueError:
        raise UsageError(f"by is {printable(str(by))}; allowed: {', '.join(By)}") from None
    made = Order.of(load_activity(path), by)
    save_order(made, output)
    return made


def report(
    path: str | Path,
    output: str | Path | None,
    *,
    predictor: str | Path | None = None,
    pictures: str | Path | None = None,
    plan: str | Path | None = None,
) -> list[Path]:
    """Draw an activity: one self-contained page `output`, and single pictures (SVG) in the folder `pictures`.

    `plan` is drawn over the activity's heat map. Returns the files that were written.

    Raises:
        FingerprintError: the predictor belongs to another model than the activity.
        PlanError: the plan does, or is damaged.
        OutputError: a file could not be written.
    """
    placed = None if plan is None else load_plan(plan)

    def more(activity: Activity) -> list[Picture]:
        return [] if placed is None else [placement_picture(placed, activity, str(plan))]

    return write_report(path, output, predictor=predictor, pictures=pictures, more=more)


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
    source = open_model(shipped_model() if model is None else model)
    try:
        wanted = _settings(PlanSettings, settings, overrides)
        planned = plan_model(source, wanted, load or LoadSettings(), activity=activity, tell=tell)
        return planned if gpu_index is None else import_gpu_index(planned, gpu_index)
    finally:
        source.close()


def explain(planned: Planned, *, what_helps: bool = True) -> list[PlanTable]:
    """A plan as tables: layers, tiers, speed, and with `what_helps` what more memory or bandwidth would buy."""
    tables = [layer_table(planned.plan), tier_table(planned.plan), speed_table(planned.plan)]
    return [*tables, gain_table(sensitivities(planned.problem))] if what_helps else tables


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


def _settings(kind: type[Settings], given: Settings | None, overrides: Mapping[str, Any]) -> Settings:
    """`given`, or the defaults, with `overrides`.

    Raises:
        UsageError: there is no such setting, or a value is out of its range.
    """
    known = [field.name for field in fields(kind)]
    for name in overrides:
        if name not in known:
            raise UsageError(f"{printable(name)} is no setting; known are {', '.join(known)}")
    return replace(given if given is not None else kind(), **overrides)
