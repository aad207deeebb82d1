"""Flags made from the settings classes: names here, types, defaults and help there."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter, Token

from thermocline.config import DeviceKind, LoadSettings, Mode, SamplingSettings, TrainSettings
from thermocline.errors import SamplingError, UsageError, printable

NAMES: dict[str, tuple[str, ...]] = {
    "ctx_size": ("--ctx-size", "-c"),
    "threads": ("--threads", "-t"),
    "ubatch": ("--ubatch-size", "-ub"),
    "cache_type_k": ("--cache-type-k", "-ctk"),
    "cache_type_v": ("--cache-type-v", "-ctv"),
    "mode": ("--mode", "--sparsity"),
    "temperature": ("--temperature", "--temp"),
    "logit_bias": ("--logit-bias", "-l"),
    "seed": ("--seed", "-s"),
    "tokens": ("--tokens", "-n"),
    "max_tokens": ("--n-predict", "--max-tokens", "-n"),
}
"""Names as llama.cpp has them, where they are not the field's. The first gives the environment variable's name."""

GROUPS: dict[type[Any], str] = {LoadSettings: "Loading", SamplingSettings: "Sampling", TrainSettings: "Training"}
"""Settings that become flags, and what help calls them."""

NOT_YET: dict[tuple[str, ...], str] = {
    ("--n-gpu-layers", "--gpu-layers", "-ngl"): (
        "neurons are placed, not layers: give --vram-budget, and --device cuda or emulated"
    ),
    ("--hf-repo", "-hf", "-hfr"): "download the model yourself and give its file or folder with -m",
    ("--lora",): "adapters are not implemented; merge it into the model",
    ("--model-draft", "-md"): "speculative decoding is not implemented",
    ("--batch-size", "-b"): "prompts are computed in passes of --ubatch-size (-ub) tokens",
    ("--threads-batch", "-tb"): "prompt and answer use the same --threads (-t)",
    ("--flash-attn", "-fa"): "there is one implementation of attention",
    ("--override-tensor", "-ot"): (
        "a plan says where tensors live: give --vram-budget and --ram-budget, or --plan with one of your own"
    ),
    ("--grammar", "--grammar-file"): "constrained output is not implemented",
    ("--json-schema", "-j"): "constrained output is not implemented",
    ("--chat-template", "--chat-template-file"): "only the template in the model's own file is used",
    ("--conversation", "-cnv", "--no-conversation", "-no-cnv"): (
        "'thermocline run' completes a text and 'thermocline chat' talks"
    ),
    ("--parallel", "-np"): "one sequence is computed at a time; only 'thermocline plan' plans for several",
    ("--reverse-prompt", "-r"): "--stop ends the text where a string begins",
    ("--escape", "-e", "--no-escape"): "a prompt is taken as it is; put its line ends in a file for -f",
    ("--color", "-co"): "on a terminal the prompt is dimmed in any case",
    ("--mirostat", "--mirostat-lr", "--mirostat-ent"): "the samplers are --temp, --top-k, --top-p and --min-p",
    ("-temp",): "write it with two hyphens, --temp",
    ("-pg",): "'thermocline bench' measures the prompt (-p) and the answer (-n) each by itself",
}
"""Flags of other engines that people will try, and what to do instead. They are refused, never ignored."""


_UNWATCHED: dict[str, str | None] = {"drift": None, "count_activity": None}
_UNPREDICTED: dict[str, str | None] = {
    "mode": "How the FFN is computed: exact or dense; auto is exact where the activation gives zeros.",
    "predictor": None,
    "predictor_threshold": None,
}

OWN_HELP: dict[str, dict[str, str | None]] = {
    "profile": _UNWATCHED | _UNPREDICTED,
    "train_predictor": {
        **_UNWATCHED,
        **_UNPREDICTED,
        "activity": "What `profile` wrote, not an order: it tells from which activation on a neuron fires, and near "
        "which rank to begin. What lies beside the model is not used for that.",
    },
    "audit": _UNWATCHED,
    "perplexity": _UNWATCHED,
    "bench": _UNWATCHED,
}
"""What a verb's help says of a setting where it is not what the settings' own says; None: nothing, as it is refused."""


def flag(*names: str, help: str, hyphen: bool = False) -> Parameter:  # noqa: A002
    """A flag's names and help; `hyphen` lets its value begin with one."""
    return Parameter(name=names, negative=(), help=help, allow_leading_hyphen=hyphen)


def count(*names: str, help: str) -> Parameter:  # noqa: A002
    """The same for a flag that takes a whole number."""
    return Parameter(name=names, help=help, converter=whole_number)


def mode_flag(help: str) -> Parameter:  # noqa: A002
    """The flag of a mode where it is the verb's own, and not one of the settings'."""
    return Parameter(name=NAMES["mode"], help=help, converter=mode_name, n_tokens=1, name_transform=_choice)


def whole_number(_: Any, tokens: Sequence[Token]) -> int:
    """Reads an int flag; cyclopts would round 1.5 without a word."""
    token = tokens[-1]
    try:
        return int(token.value)
    except ValueError:
        raise UsageError(f"{token.keyword} is {printable(token.value)}; allowed: whole numbers") from None


MODEL_HELP = "GGUF file or Hugging Face folder; without it, the small model that comes with thermocline."
VERBOSE_HELP = "Tell measurements and notices even where standard error is no terminal."

ModelFlag = Annotated[str | None, flag("--model", "-m", help=MODEL_HELP)]
TextFlag = Annotated[
    tuple[str, ...],
    Parameter(name="--text", negative=(), consume_multiple=True, help="Files to read, and folders to read all of."),
]
JsonFlag = Annotated[bool, flag("--json", help="Print one JSON object instead.")]
VerboseFlag = Annotated[bool, flag("--verbose", "-v", help=VERBOSE_HELP)]

Verb = Callable[..., int]


def with_settings(verb: Verb) -> Verb:
    """Give `verb` one flag for each field of its parameters that are settings, and refuse the flags in NOT_YET.

    A parameter annotated with one of GROUPS becomes flags; the verb gets the finished object.
    """
    hints = get_type_hints(verb, include_extras=True)
    own = inspect.signature(verb).parameters
    settings = {name: hints[name] for name in own if hints[name] in GROUPS}
    parameters = [p.replace(annotation=hints[name]) for name, p in own.items() if name not in settings]
    owners: dict[str, str] = {}
    for name, kind in settings.items():
        for parameter in _flags(kind, OWN_HELP.get(verb.__name__, {})):
            owners[parameter.name] = name
            parameters.append(parameter)
    refused = {_identifier(names): (names, why) for names, why in NOT_YET.items()}
    taken = {name for parameter in parameters for name in _names(parameter)}
    parameters += [_refused_flag(name, names, taken) for name, (names, _) in refused.items()]

    @functools.wraps(verb)
    def run(**values: Any) -> int:
        for name, (names, why) in refused.items():
            if values.pop(name, None) is not None:
                raise UsageError(f"{names[0]} is not available: {why}")
        given: dict[str, dict[str, Any]] = {name: {} for name in settings}
        for field, owner in owners.items():
            if field in values:
                value = values.pop(field)
                given[owner][field] = dict(map(_bias, value)) if field == "logit_bias" else value
        return verb(**values, **{name: kind(**given[name]) for name, kind in settings.items()})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # inspect would look through to the verb's own signature
    return run


def _flags(kind: type[Any], own: Mapping[str, str | None]) -> list[inspect.Parameter]:
    """One keyword-only parameter for each field, which help tells of as `own` has it."""
    hints, docs = get_type_hints(kind), field_docs(kind)
    group = Group(GROUPS[kind], sort_key=1 + list(GROUPS).index(kind))
    flags = []
    for field in fields(kind):
        hint, default, extra = hints[field.name], _default(field), SPECIAL.get(field.name, {})
        if hint is int:
            extra = {"converter": whole_number}
        if field.name == "logit_bias":
            hint, default = tuple[str, ...], ()
        names = NAMES.get(field.name, (f"--{field.name.replace('_', '-')}",))
        help_text: str | None = f"{docs[field.name]} {_extra_help(field.name)}".rstrip()
        if field.name in own:
            help_text = own[field.name]
            extra = {**extra, "show": help_text is not None, "show_choices": False}
        common: dict[str, Any] = {"negative": (), "name_transform": _choice}
        about = Parameter(name=names, help=help_text, group=group, **(common | extra))
        flags.append(_keyword(field.name, Annotated[hint, about], default))
    return flags


def _refused_flag(name: str, names: tuple[str, ...], taken: set[str]) -> inspect.Parameter:
    """A flag with or without values, by the names that mean nothing else here."""
    free = tuple(name for name in names if name not in taken)
    about = Parameter(name=free, show=False, negative=(), consume_multiple=True)
    return _keyword(name, Annotated[tuple[str, ...] | None, about], None)


def _names(parameter: inspect.Parameter) -> tuple[str, ...]:
    """What a parameter is called on the command line."""
    abouts = [about for about in getattr(parameter.annotation, "__metadata__", ()) if isinstance(about, Parameter)]
    return tuple(name for about in abouts for name in about.name or ())


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _choice(name: str) -> str:
    """A member of an enum as its value is written: q8_0, which cyclopts would show as q8-0; both are taken."""
    return name.lower().replace("-", "_")


def _whole(_: Any, value: str, *, delimiter: str | None = None) -> list[str]:
    return [value]


def _identifier(names: tuple[str, ...]) -> str:
    return names[0].lstrip("-").replace("-", "_")


def _extra_help(name: str) -> str:
    if name == "logit_bias":
        return "Written 15043+1 or 15043-inf; repeat the flag for more tokens."
    if name == "mode":
        return "auto is predicted by an audited predictor, else exact where the activation gives zeros, else dense."
    return "Repeat the flag for more than one." if name == "stop" else ""


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = str(ast.literal_eval(text.value))
    return docs


def mode_name(_: Any, tokens: Sequence[Token]) -> Mode:
    """Reads a mode, with the word that --sparsity is given."""
    word = tokens[-1].value.lower()
    if word == "off":  # as in --sparsity off
        return Mode.DENSE
    if word not in list(Mode):
        raise UsageError(f"--mode is {printable(word)}; allowed: {', '.join(Mode)}")
    return Mode(word)


def device_name(_: Any, tokens: Sequence[Token]) -> str:
    """Reads a device, which may have a number: what it is, the settings say."""
    kind, *number = tokens[-1].value.split(":", 1)
    return ":".join([kind.lower() if kind.lower() in list(DeviceKind) else kind, *number])


def _bias(text: str) -> tuple[int, float]:
    """`15043+1`, `15043-0.5`, `15043-inf`, as llama.cpp writes them."""
    place = next((i for i, character in enumerate(text) if i and character in "+-"), len(text))
    try:
        return int(text[:place]), float(text[place:])
    except ValueError:
        raise SamplingError(
            f"logit-bias is {printable(text)}; wanted a token id, a sign and a number, such as 15043+1 or 15043-inf"
        ) from None


SPECIAL: dict[str, dict[str, Any]] = {
    "mode": {"converter": mode_name, "n_tokens": 1},
    "mmap": {"negative": "--no-mmap"},
    "device": {"converter": device_name, "n_tokens": 1},
    "train_on": {"converter": device_name, "n_tokens": 1},
    "predictor_threshold": {"allow_leading_hyphen": True},
    "logit_bias": {"allow_leading_hyphen": True},
    "stop": {"allow_leading_hyphen": True, "env_var_split": _whole},
}
"""What else cyclopts has to know about a flag."""
