"""Frozen settings. Flags, environment variables and help texts derive from these classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from thermocline.errors import SamplingError, UsageError, printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


class Mode(StrEnum):
    """How the FFN is computed.

    `AUTO` is `PREDICTED` where there is a predictor whose audit passed, else `EXACT` where the activation gives
    zeros, else `DENSE`.
    """

    AUTO = "auto"
    DENSE = "dense"
    EXACT = "exact"
    PREDICTED = "predicted"


class OpsKind(StrEnum):
    """Which implementation of the ops contract runs the model."""

    CPU = "cpu"
    REFERENCE = "reference"


class DeviceKind(StrEnum):
    """What computes beside the CPU.

    `AUTO` is nothing yet: the kernels of `CUDA` have not run on a GPU, so it is asked for by name. `EMULATED` is a
    second device that any machine has: it stands where a GPU would, with a memory and threads of its own.
    """

    AUTO = "auto"
    CPU = "cpu"
    EMULATED = "emulated"
    CUDA = "cuda"


class CacheType(StrEnum):
    """Number format of the KV cache."""

    F16 = "f16"
    F32 = "f32"
    Q8_0 = "q8_0"


class CrossingKind(StrEnum):
    """How a GPU and the CPU tell each other that a vector is there.

    `MEMORY`: the GPU's stream writes and polls words of pinned memory. `CALLS`: the stream calls functions of the host.
    `PLAIN`: Python waits for the stream. `AUTO` is the first of them that works.
    """

    AUTO = "auto"
    MEMORY = "memory"
    CALLS = "calls"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a model is loaded."""

    ctx_size: int = 0
    """Context length in tokens; 0 takes the model's own."""
    threads: int = 0
    """CPU threads; 0 takes one per physical core."""
    ubatch: int = 512
    """Most prompt tokens computed in one pass."""
    cache_type_k: CacheType = CacheType.F16
    """Number format of the cached keys."""
    cache_type_v: CacheType = CacheType.F16
    """Number format of the cached values."""
    mode: Mode = Mode.AUTO
    """How the FFN is computed."""
    predictor: str | Path | None = None
    """Predictor to compute with; without, the one beside the model (M.gguf: M.predictor.safetensors) or inside it."""
    predictor_threshold: float | None = None
    """Score from which on a neuron is computed, in all layers; without, as the predictor says."""
    ops: OpsKind = OpsKind.CPU
    """Implementation of the arithmetic."""
    isa: str = "auto"
    """Instruction set of the kernels, as `doctor` lists them; auto is the last."""
    mlock: bool = False
    """Keep the weights in memory: the system may neither swap them out nor drop them."""
    mmap: bool | None = None
    """Compute with the file as mapped, or with a copy in memory; without, copy where it pays and there is room."""
    device: DeviceKind = DeviceKind.AUTO
    """What computes beside the CPU: auto, cpu (nothing), emulated, cuda, or cuda:1 for the GPU of that number."""
    gpu: str | None = None
    """Which GPU, where there are several: its number, its UUID or a part of its name; without, the first."""
    crossing: CrossingKind = CrossingKind.AUTO
    """How a CUDA device and the CPU meet: auto, memory, calls or plain."""
    vram_budget: str | None = None
    """VRAM that may be used: 8GiB, 80% (of an emulated device: of the weights), auto (what is free), or GiB."""
    ram_budget: str | None = None
    """RAM that may be used, as for VRAM; without, weights stay mapped and the system decides what it keeps."""
    plan: str | Path | None = None
    """Plan to carry out, as `plan -o` wrote it; without, one is made."""
    activity: str | Path | None = None
    """What `profile` or `order` wrote, to place hot neurons; without, what lies beside the model."""
    replan: bool = False
    """Plan with what the last run on this machine measured, instead of the machine's own figures."""
    drift: str | None = None
    """Between requests, move neurons that fire more now to faster memory: bytes a second (64MiB), 5%, or auto (5%)."""
    count_activity: str | Path | None = None
    """Add what fires while generating to this activity file, which `activity merge` and `plan` take."""
    reset_gpu_index: bool = False
    """PowerInfer's: make the GPU index anew. Plans are made anew with every start."""
    disable_gpu_index: bool = False
    """PowerInfer's: do not use a GPU index. A plan takes its place."""

    def __post_init__(self) -> None:
        _check_numbers(self, LoadSettings, UsageError)
        device, gpu = device_and_gpu(self.device, self.gpu)
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "gpu", gpu)
        members = {"cache_type_k": CacheType, "cache_type_v": CacheType, "mode": Mode, "ops": OpsKind}
        for name, kind in (members | {"device": DeviceKind, "crossing": CrossingKind}).items():
            value = getattr(self, name)
            _check(value in list(kind), name, printable(str(value)), ", ".join(kind) + NUMBERED * (name == "device"))
            object.__setattr__(self, name, kind(value))  # strings are welcome, members are what is kept
        self._check_predictor()
        self._check_placement()
        _check(0 <= self.ctx_size <= 1 << 24, "ctx-size", self.ctx_size, "0 (the model's own) to 16777216")
        _check(0 <= self.threads <= 1024, "threads", self.threads, "0 (physical cores) to 1024")
        _check(1 <= self.ubatch <= 1 << 16, "ubatch-size", self.ubatch, "1 to 65536")

    def _check_placement(self) -> None:
        for name in ("plan", "activity", "count_activity"):
            path = getattr(self, name)
            if path is not None:
                _check(isinstance(path, str | Path) and str(path) != "", name, printable(repr(path)), "a file")
        for name in ("vram_budget", "ram_budget", "drift"):
            budget = getattr(self, name)
            if budget is not None:  # what it says is read where the memory is known
                kind = isinstance(budget, str) or _is_number(budget, Real)
                _check(kind, name.replace("_", "-"), printable(repr(budget)), "8GiB, 80%, auto, or a number of GiB")
                object.__setattr__(self, name, str(budget))
        if self.device is DeviceKind.CPU and self.vram_budget is not None:
            raise UsageError(NO_VRAM)
        if self.gpu is not None and self.device is not DeviceKind.CUDA:
            raise UsageError("--gpu chooses one of several: leave it out, or use --device cuda")
        if self.crossing is not CrossingKind.AUTO and self.device is not DeviceKind.CUDA:
            raise UsageError("--crossing is of a GPU's step: leave it out, or use --device cuda")
        if self.ops is OpsKind.REFERENCE and self.threads > 1:
            raise UsageError(f"threads is {self.threads}, and the reference has one: leave --threads or --ops out")
        if self.ops is OpsKind.REFERENCE and self.device is DeviceKind.CUDA:
            raise UsageError("the reference implementation computes on the CPU; use --device cpu or emulated")

    @property
    def watched(self) -> bool:
        """Whether what fires is counted."""
        return self.drift is not None or self.count_activity is not None

    def require_unwatched(self, verb: str) -> None:
        """Refuse to count and to move neurons where nothing is generated.

        Raises:
            UsageError: it is asked for.
        """
        for name in ("drift", "count_activity"):
            if getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is of runs that generate: {verb} has no use for it")

    def _check_predictor(self) -> None:
        path, threshold = self.predictor, self.predictor_threshold
        if path is not None:
            _check(isinstance(path, str | Path) and str(path) != "", "predictor", printable(repr(path)), "a file")
        if threshold is not None:
            fits = _is_number(threshold, Real) and not math.isnan(threshold)
            _check(
                fits, "predictor-threshold", printable(repr(threshold)), "a number, or -inf (all neurons) or inf (none)"
            )
        for name, value in (("predictor", path), ("predictor-threshold", threshold)):
            if value is not None and self.mode not in (Mode.AUTO, Mode.PREDICTED):
                raise UsageError(f"mode {self.mode} predicts nothing: leave --{name} out, or use --mode predicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen.

    The chain is: logit bias, penalties, top-k, top-p, min-p, temperature, draw.
    """

    temperature: float = 0.8
    """0 is greedy; larger is more varied."""
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the likeliest one; 0 drops none."""
    repeat_penalty: float = 1.0
    """Divide the logits of tokens seen lately by this; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens seen lately."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit once for each time it was seen lately."""
    repeat_last_n: int = 64
    """How many of the last tokens the penalties look at; 0 is none, -1 the whole context."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of single tokens; -inf forbids one."""
    seed: int = -1
    """Seed of the sampler; -1 draws one."""
    max_tokens: int = -1
    """Most tokens to generate; -1 goes on until a stop or the context's end."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    logprobs: int = 0
    """How many of the likeliest tokens to report with their log probabilities; 0 to 20."""

    def __post_init__(self) -> None:
        _check_numbers(self, SamplingSettings, SamplingError)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repeat_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            value = getattr(self, name)
            _sampling(math.isfinite(value), name, value, "a finite number")
        _sampling(0 <= self.temperature <= 100, "temperature", self.temperature, "0 to 100")
        _sampling(0 <= self.top_k <= 1 << 30, "top_k", self.top_k, "0 (all) to 1073741824")
        _sampling(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        _sampling(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _sampling(0 < self.repeat_penalty <= 10, "repeat_penalty", self.repeat_penalty, "more than 0, at most 10")
        for name in ("presence_penalty", "frequency_penalty"):
            _sampling(abs(getattr(self, name)) <= 100, name, getattr(self, name), "-100 to 100")
        _sampling(-1 <= self.repeat_last_n <= 1 << 24, "repeat_last_n", self.repeat_last_n, "-1 (all) to 16777216")
        _sampling(-1 <= self.seed < 1 << 63, "seed", self.seed, "-1 (drawn) to 2^63-1")
        _sampling(
            self.max_tokens == -1 or 1 <= self.max_tokens <= 1 << 24,
            "max_tokens",
            self.max_tokens,
            "-1 (until a stop) or 1 to 16777216",
        )
        _sampling(0 <= self.logprobs <= 20, "logprobs", self.logprobs, "0 to 20")
        stop: Any = self.stop
        biases: Any = self.logit_bias  # None is what clients send that have none
        object.__setattr__(self, "stop", () if stop is None else _strings(stop))
        object.__setattr__(self, "logit_bias", {} if biases is None else biases)
        _sampling(isinstance(self.logit_bias, Mapping), "logit_bias", printable(repr(biases), 60), "numbers by token")
        for token, bias in self.logit_bias.items():
            _sampling(_is_number(token, Integral) and token >= 0, "logit_bias", repr(token), "token ids from 0")
            fits = _is_number(bias, Real) and (bias == -math.inf or abs(bias) <= 1e6)
            _sampling(fits, f"logit_bias of token {token}", bias, "-1000000 to 1000000, or -inf")


class PredictorType(StrEnum):
    """Number format of a predictor's matrices."""

    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    F16 = "f16"


class TrainDevice(StrEnum):
    """What trains."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a predictor is trained."""

    tokens: int = 131072
    """Most tokens to read, of files in an order of chance; 0 reads all. Every eighth sequence is kept for measuring."""
    energy_recall: float = 0.99
    """Least share of the layer's energy, |activation| x norm of the down row, that the selected neurons carry."""
    recall: float = 0.0
    """Least share of the firing neurons that are selected, beside the energy recall."""
    rank: int = 0
    """Width of the hidden layers; 0 fits it layer by layer, so that a token reads the fewest bytes."""
    max_share: float = 0.09
    """Most numbers of the predictor for each weight of the model; 0 sets no limit."""
    epochs: float = 6.0
    """How often each token is looked at; fits of the search for the rank take a third of it."""
    batch: int = 1024
    """Tokens of a training step."""
    learning_rate: float = 0.01
    """Of AdamW, after a short warm-up; it falls linearly to zero."""
    outtype: PredictorType = PredictorType.Q8_0
    """Number format of the predictor; thresholds are set and qualities measured in it."""
    train_on: TrainDevice = TrainDevice.AUTO
    """What trains: auto takes a GPU where there is one; cpu, cuda, or cuda:1 for the GPU of that number."""
    train_gpu: str | None = None
    """Which GPU trains, where there are several: as --gpu, which must then be the same."""
    seed: int = 1
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        _check_numbers(self, TrainSettings, UsageError)
        device, gpu = device_and_gpu(self.train_on, self.train_gpu, "train-on", "train-gpu")
        object.__setattr__(self, "train_on", device)
        object.__setattr__(self, "train_gpu", gpu)
        for name, kind in (("outtype", PredictorType), ("train_on", TrainDevice)):
            value = getattr(self, name)
            allowed = ", ".join(kind) + NUMBERED * (kind is TrainDevice)
            _check(value in list(kind), name.replace("_", "-"), printable(str(value)), allowed)
            object.__setattr__(self, name, kind(value))
        if self.train_gpu is not None and self.train_on is TrainDevice.CPU:
            raise UsageError("--train-gpu chooses one of several GPUs: leave it out, or use --train-on cuda")
        _check(0 <= self.tokens <= 1 << 40, "tokens", self.tokens, "0 (all of the text) to 1099511627776")
        _check(0 < self.energy_recall < 1, "energy-recall", self.energy_recall, "more than 0, less than 1")
        _check(0 <= self.recall < 1, "recall", self.recall, "0 (no wish) to less than 1")
        _check(self.rank % 32 == 0 and 0 <= self.rank <= 1 << 16, "rank", self.rank, "0 (fit it) or a multiple of 32")
        _check(0 <= self.max_share <= 1, "max-share", self.max_share, "0 (no limit) to 1")
        _check(0 < self.epochs <= 1000, "epochs", self.epochs, "more than 0, at most 1000")
        _check(1 <= self.batch <= 1 << 16, "batch", self.batch, "1 to 65536")
        _check(0 < self.learning_rate <= 1, "learning-rate", self.learning_rate, "more than 0, at most 1")
        _check(0 <= self.seed < 1 << 63, "seed", self.seed, "0 to 2^63-1")


NO_VRAM: Final = "--device cpu has no VRAM: leave --vram-budget out, or use --device emulated"
NUMBERED: Final = ", cuda:1 (or another number)"
"""What a device may be too, for messages."""


def device_and_gpu(device: Any, gpu: str | None, name: str = "device", which: str = "gpu") -> tuple[Any, str | None]:
    """`cuda:1` as a device and its GPU; anything else as it is. `name` and `which` are what messages call them.

    Raises:
        UsageError: the GPU has no name, or both name one.
    """
    if isinstance(device, str) and device.startswith("cuda:"):
        if gpu is not None:
            raise UsageError(f"--{name} {printable(device)} names a GPU and --{which} too: leave one of them out")
        device, gpu = "cuda", device.removeprefix("cuda:")
    if gpu is not None:
        _check(isinstance(gpu, str) and gpu.strip() != "", which, printable(repr(gpu)), "a number, a UUID or a name")
    return device, gpu


def settings_of(kind: type[Settings], given: Settings | None, overrides: Mapping[str, Any]) -> Settings:
    """`given`, or the defaults, with `overrides`.

    Raises:
        UsageError: there is no such setting, or a value is out of its range.
    """
    known = [field.name for field in fields(kind)]
    for name in overrides:
        if name not in known:
            raise UsageError(f"{printable(name)} is no setting; known are {', '.join(known)}")
    return replace(given if given is not None else kind(), **overrides)


def _strings(value: object) -> tuple[str, ...]:
    """`value` as stop strings; a single one is welcome."""
    many = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    strings = tuple(s for s in many if isinstance(s, str) and 1 <= len(s) <= 1000)
    fits = len(strings) == len(many) <= 16
    _sampling(fits, "stop", printable(repr(value)), "at most 16 strings of 1 to 1000 characters")
    return strings


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_numbers(settings: object, declared: type, error: type[UsageError]) -> None:
    """Refuse values that are not of the declared kind, such as `top_k=1.5` or `seed=True`."""
    kinds = {"int": (Integral, "a whole number"), "float": (Real, "a number"), "bool": (bool, "True or False")}
    for declaration in fields(declared):
        kind, wanted = kinds.get(str(declaration.type), (object, ""))
        value = getattr(settings, declaration.name)
        if not (isinstance(value, bool) if kind is bool else _is_number(value, kind) or kind is object):
            raise error(f"{declaration.name} is {printable(repr(value))}; allowed: {wanted}")


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise UsageError(f"{name} is {value}; allowed: {allowed}")


def _sampling(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise SamplingError(f"{name} is {value}; allowed: {allowed}")
