"""READ FIRST: load a model, generate, stream, chat; ask what a file is, what this machine has, how fast it runs.

    from thermocline import LLM

    with LLM.load("model.gguf") as llm:
        for item in llm.stream("def quicksort(items):", max_tokens=64):
            print(item.text, end="", flush=True)

`load` opens the file (`files`), reads its tokenizer (`text`) and its network (`model`), places the weights
(`memory`, `ops`), and hands all of it to an engine (`runtime`), which prefills and decodes. What needs a model's files
only, such as to profile or to plan, is in `tasks`, and here under the same names.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thermocline.activity.audit import AuditResult
from thermocline.activity.order import By, Order, save_order
from thermocline.activity.profile import Existing, Profiled, Progress
from thermocline.activity.statistics import Activity
from thermocline.activity.training import Step, Trained
from thermocline.config import LoadSettings, SamplingSettings, TrainSettings, settings_of
from thermocline.errors import ThermoclineError, UsageError
from thermocline.files.source import ModelSource
from thermocline.hardware.probe import Probe
from thermocline.hardware.survey import Survey, examine
from thermocline.model.spec import ModelSpec
from thermocline.placement.explain import Table as PlanTable
from thermocline.placement.explain import layer_table, speed_table, tier_table
from thermocline.placement.plan import Plan
from thermocline.placement.plan_file import save_plan
from thermocline.runtime.arguments import prompt_ids, settings_or_default
from thermocline.runtime.auditing import Audited
from thermocline.runtime.bench import BenchRow, run_bench
from thermocline.runtime.conversion import Converted, Wanted
from thermocline.runtime.conversion import convert_model as convert
from thermocline.runtime.conversion import quantize_model as quantize
from thermocline.runtime.describe import ModelInfo, PredictorInfo
from thermocline.runtime.generation import FinishReason, Generation, Item, Stream
from thermocline.runtime.gpu_index import export_gpu_index
from thermocline.runtime.loading import LoadedModel, load_model, smaller_plan
from thermocline.runtime.perplexity import Perplexity, Scored
from thermocline.runtime.planning import Planned, PlanSettings
from thermocline.runtime.powerinfer import (
    Exchanged,
    export_activity,
    export_predictor,
    import_activity,
    import_predictor,
)
from thermocline.runtime.report import RunReport
from thermocline.runtime.step_costs import probe_machine
from thermocline.tasks import (
    audit,
    compare_plans,
    describe,
    explain,
    known_machines,
    merge_activities,
    opened,
    order,
    perplexity,
    plan,
    profile,
    read_activity,
    report,
    shipped_model,
    train_predictor,
)
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

CLOSED = "this model is closed; load it again"
Messages = Sequence[Mapping[str, Any]]


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
        settings = settings_of(LoadSettings, settings_or_default(LoadSettings, settings), overrides)
        source = opened(model)
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

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingSettings | None = None,
        *,
        cache_prompt: bool = False,
        **overrides: Any,
    ) -> Stream:
        """Continue `prompt` (a text, or token ids as they are), token by token.

        With `cache_prompt`, the tokens with which the last prompt and its answer began too are not computed again. What
        was computed in other batches may round otherwise, so that the same prompt need not give the same text.
        `overrides` are single fields of `SamplingSettings`: `llm.stream("Hi", temperature=0, max_tokens=64)`.
        Starting a stream ends the streams that were started before.

        Raises:
            ContextError: the prompt does not fit the context.
            SamplingError: a setting is out of its range.
            UsageError: the prompt is neither a text nor ids of the vocabulary.
        """
        return self._stream(self._prompt(prompt), sampling, overrides, reuse=cache_prompt)

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingSettings | None = None,
        *,
        cache_prompt: bool = False,
        **overrides: Any,
    ) -> Generation:
        """Continue `prompt` to the end; see `stream`."""
        with self.stream(prompt, sampling, cache_prompt=cache_prompt, **overrides) as stream:
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
        tokens = self._tokens(self._template.render(messages), parse_special=True)
        return self._stream(tokens, sampling, overrides, reuse=True, chat=True)

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
        model, self._model, self._template = self._model, None, None
        try:
            if model is not None:
                model.engine.end(CLOSED)
                model.close()
        finally:
            self._source.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise UsageError(CLOSED)
        return self._model

    def _keep_budget(self) -> None:
        """Where the first prompt made a GPU hold more than its budget, go on with a plan that is smaller by as much."""
        smaller = smaller_plan(self._loaded)
        if smaller is None:
            return
        settings, why = smaller
        self._loaded.close()
        self._loaded.engine.end("the model was loaded anew since this generation was asked for; ask again")
        self._model = None
        gc.collect()  # what is planned anew must find the memory free
        loaded = load_model(self._source, settings)
        self._model = replace(loaded, notices=(*loaded.notices, why))

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Tokens to continue: of a text with what the model puts before one, and not what it puts after one."""
        tokenizer = self._loaded.tokenizer
        if isinstance(prompt, str):
            return [*tokenizer.prefix, *self._tokens(prompt)]
        return prompt_ids(prompt, tokenizer)

    def _tokens(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The tokens of a prompt's text, unless it is so long that they cannot fit."""
        loaded = self._loaded
        loaded.engine.require_room(loaded.tokenizer.fewest_tokens(text), at_least=True)
        return loaded.tokenizer.encode(text, add_special=False, parse_special=parse_special)

    def _stream(
        self,
        tokens: list[int],
        sampling: SamplingSettings | None,
        overrides: Mapping[str, Any],
        *,
        reuse: bool = False,
        chat: bool = False,
    ) -> Stream:
        settings = settings_of(SamplingSettings, settings_or_default(SamplingSettings, sampling), overrides)
        self._keep_budget()
        loaded = self._loaded
        return Stream(
            loaded.engine, loaded.tokenizer, tokens, settings, reuse=reuse, chat=chat, load_seconds=loaded.seconds
        )
