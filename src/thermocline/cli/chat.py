"""`thermocline chat`: talk with a model."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import thermocline
from thermocline.cli.flags import ModelFlag, VerboseFlag, flag, with_settings
from thermocline.cli.loading import load as load_model
from thermocline.cli.output import notices, status, tell_report, write_stream
from thermocline.config import LoadSettings, SamplingSettings
from thermocline.errors import ChatTemplateError, ContextError, Terminated, ThermoclineError

if TYPE_CHECKING:
    from thermocline.api import Stream

HELP = "/clear forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer, /help says this"


@with_settings
def chat(
    *,
    model: ModelFlag = None,
    system: Annotated[
        str | None, flag("--system-prompt", "-sys", help="Instruction at the beginning.", hyphen=True)
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
    with load_model(model, load) as llm:
        notices(llm, always=verbose)
        if not plain and not llm.has_chat_template:
            raise ChatTemplateError(
                f"{llm.spec.name} has no chat template, so it was not trained to talk; "
                "complete text with 'thermocline run', or add --plain to take turns without a template"
            )
        status(f"{llm.spec.name}, context {llm.n_ctx} tokens. {HELP}")
        talk = PlainTalk(llm, sampling, system) if plain else TemplateTalk(llm, sampling, system)
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
        return self.llm.stream(f"{self.text}{line}\n", self.sampling)

    def keep(self, line: str, answer: str) -> None:
        """Remember a finished turn."""
        self.text += f"{line}\n{answer}\n"


def _converse(talk: TemplateTalk | PlainTalk, verbose: bool) -> int:
    if sys.stdin is not None and sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # line editing and history for input(), where Python has it
            import readline  # noqa: F401
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
                _turn(talk, line, verbose)
    return 0


def _turn(talk: TemplateTalk | PlainTalk, line: str, verbose: bool) -> None:
    try:
        with talk.ask(line) as stream:
            written = write_stream(stream)
    except ContextError as error:
        status(f"error: {error}; or start anew with /clear", always=True)
        return
    except ThermoclineError as error:
        status(f"error: {error}", always=True)
        return
    talk.keep(line, written.text)
    tell_report(stream.report, always=verbose)


def _read() -> str | None:
    """A line typed or piped in, None at its end; Ctrl-C gives the line up."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
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
