"""`thermocline chat`: talk with a model."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import thermocline
from thermocline.cli.flags import ModelFlag, VerboseFlag, flag, with_settings
from thermocline.cli.loading import load as load_model
from thermocline.cli.output import notices, status, tell_report, write_stream
from thermocline.config import LoadSettings, SamplingSettings
from thermocline.errors import ChatTemplateError, ContextError, Terminated, ThermoclineError, UsageError

if TYPE_CHECKING:
    from thermocline.api import Stream

HELP = "/clear forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer, /help says this"


@with_settings
def chat(
    *,
    model: ModelFlag = None,
    system: Annotated[
        str | None, flag("--system-prompt", "-sys", help="Instruction at the beginning; '' is none.", hyphen=True)
    ] = None,
    plain: Annotated[
        bool, flag("--plain", help="No chat template: your lines and the model's make one text, which it continues.")
    ] = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
    sampling: SamplingSettings,
) -> int:
    r"""Talk with a model, turn by turn. Ctrl-C stops an answer, Ctrl-D ends; /help lists commands.

    For example:

      thermocline chat -m model.gguf

      thermocline chat -m model.gguf -sys 'Answer in one sentence.' --temp 0.2

      thermocline chat --plain --stop $'\n\n'
    """
    if sampling.logprobs:
        raise UsageError("a chat tells no --logprobs: leave it out, or ask 'thermocline run --json' for them")
    with load_model(model, load) as llm:
        notices(llm, always=verbose)
        if not plain and not llm.has_chat_template:
            raise ChatTemplateError(
                f"{llm.spec.name} has no chat template, so it was not trained to talk; "
                "complete text with 'thermocline run', or add --plain to take turns without a template"
            )
        status(f"{llm.spec.name}, context {llm.n_ctx} tokens. {HELP}")
        talk = (PlainTalk if plain else TemplateTalk)(llm, sampling, system or None)
        return _converse(talk, verbose)


@dataclass(slots=True)
class TemplateTalk:
    """A conversation by the model's chat template."""

    llm: thermocline.LLM
    sampling: SamplingSettings
    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all but the instruction."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, line: str) -> Stream:
        """The answer to `line`, to come."""
        return self.llm.stream_chat([*self.messages, {"role": "user", "content": line}], self.sampling)

    def keep(self, line: str, answer: str) -> None:
        """Remember a finished turn."""
        self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


@dataclass(slots=True)
class PlainTalk:
    """One text that both sides append to."""

    llm: thermocline.LLM
    sampling: SamplingSettings
    system: str | None
    text: str = ""

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all but the instruction."""
        self.text = "" if self.system is None else f"{self.system}\n"

    def ask(self, line: str) -> Stream:
        """The continuation, to come."""
        return self.llm.stream(f"{self.text}{line}\n", self.sampling, cache_prompt=True)

    def keep(self, line: str, answer: str) -> None:
        """Remember a finished turn."""
        self.text += f"{line}\n{answer}\n"


def _converse(talk: TemplateTalk | PlainTalk, verbose: bool) -> int:
    """Turns until the input ends; the exit code. To a script, unlike a person, a turn that failed is a failure."""
    failed = 0
    if _interactive():
        with contextlib.suppress(ImportError):  # line editing and history for input(), where Python has it
            import readline  # noqa: F401
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 costs its turn only, in every locale
    while (line := _read()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit" | "/bye":
                break
            case "/clear":
                talk.clear()
                status("the conversation is forgotten", always=verbose)
            case "/help" | "/?":
                status(HELP, always=True)
            case command if command.startswith("/"):
                status(f"unknown command; {HELP}", always=True)
            case _:
                failed += not _turn(talk, line, verbose)
    return int(failed > 0 and not _interactive())


def _turn(talk: TemplateTalk | PlainTalk, line: str, verbose: bool) -> bool:
    """Whether there was an answer."""
    try:
        with talk.ask(line) as stream:
            written = write_stream(stream)
    except ContextError as error:
        status(f"error: {error}; or start anew with /clear", always=True)
        return False
    except ThermoclineError as error:
        status(f"error: {error}", always=True)
        return False
    talk.keep(line, written.text)
    tell_report(stream.report, always=verbose)
    return True


def _interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _read() -> str | None:
    """A line typed or piped in, None at its end; Ctrl-C gives the line up."""
    interactive = _interactive()
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return None
        except RuntimeError:  # standard input is closed
            return None
        except KeyboardInterrupt as interrupt:
            if not interactive or isinstance(interrupt, Terminated):
                raise
            print()
