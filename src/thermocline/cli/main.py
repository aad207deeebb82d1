"""Entry point: finds the verb, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from thermocline import __version__
from thermocline.cli.environment import Environment
from thermocline.errors import Terminated, ThermoclineError, printable

USAGE = 2
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143
"""What a shell reports for a program that SIGINT, SIGPIPE or SIGTERM ended."""

VERBS = {
    "run": "Complete a prompt.",
    "chat": "Talk with a model.",
    "show": "Say what a model file is.",
    "bench": "Measure how fast a model runs here.",
    "profile": "Count which neurons of a model fire.",
    "activity": "Show which neurons fire, add up the statistics of several runs, or sort the neurons.",
    "report": "Draw which neurons fire, as a page of pictures.",
    "train-predictor": "Train what tells which neurons will fire.",
    "audit": "Hold a predictor to exact computing, and note whether it is good enough.",
    "perplexity": "Measure how well a model predicts a text.",
    "plan": "Decide what of a model lives in which memory, and predict its speed.",
    "convert": "Write a model as a GGUF file: ordered, quantised, with its predictor, for PowerInfer.",
    "quantize": "Write a model with its matrices in another format.",
    "predictor": "Bring in PowerInfer's predictors, or write some for it.",
    "doctor": "Say what this machine has and which kernels will run.",
}

HINTS = {
    "run": "a prompt is given with -p, a model with -m",
    "chat": "a model is given with -m",
    "bench": "a model is given with -m",
    "plan": "a model is given with -m",
    "profile": "a model is given with -m, a text with --text",
}
"""Where an argument without a flag belongs that a verb does not take."""

INTRODUCTION = """Runs large language models by computing only the neurons that fire.

For example:

  thermocline run -p 'def quicksort(items):' -n 128

  thermocline run -m model.gguf -f prompt.txt --temp 0

  thermocline show model.gguf

'thermocline VERB --help' tells a verb's flags. Every flag can also be set in the environment: --ctx-size is
THERMOCLINE_CTX_SIZE. The command line comes first."""


def build_app(verb: str = "") -> App:
    """The command line. Only `verb` is imported, and tells its own help; of the others there is one line."""
    app = App(
        name="thermocline",
        help=INTRODUCTION,
        help_format="plaintext",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(show_env_var=False),
    )
    app.config = (Environment(app),)
    for name, summary in VERBS.items():
        module = name.replace("-", "_")
        app.command(f"thermocline.cli.{module}:{module}", name=name, help=None if name == verb else summary)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    0: done. 1: the model, the machine or the disk refused. 2: the command line is wrong. 130: interrupted.
    141: whoever read our output stopped reading. 143: terminated, which ends things as an interrupt does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _ended_by_the_system():
            code = _dispatch(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except BrokenPipeError:
        _silence_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        what = "terminated" if terminated else "interrupted"
        complain(_with_notes(what, interrupt))
        return TERMINATED if terminated else INTERRUPTED
    except UnusedCliTokensError as error:
        extra = error.unused_tokens[0] if error.unused_tokens else ""
        instead = HINTS.get(arguments[0], f"'thermocline {printable(arguments[0])} --help' tells what it takes")
        complain(f"error: unexpected argument {printable(extra)!r}; {instead}")
        return USAGE
    except CycloptsError as error:
        complain(f"error: {' '.join(str(error).split())}")
        return USAGE
    except ThermoclineError as error:
        complain(_with_notes(f"error: {error}", error))
        return error.exit_code
    except OSError as error:
        complain(_with_notes(f"error: {error}", error))
        _silence_stdout()
        return 1
    except MemoryError as error:
        complain(_with_notes("error: out of memory; use a smaller --ctx-size or a smaller model", error))
        return 1


@contextmanager
def _ended_by_the_system() -> Iterator[None]:
    """The first SIGTERM raises `Terminated`; another one ends the program where it is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(line: str) -> None:
    """One line on standard error."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def _with_notes(what: str, error: BaseException) -> str:
    """What happened, and what was noted on it on its way here, such as what of the work is kept."""
    return "; ".join([what, *getattr(error, "__notes__", ())])


def _dispatch(arguments: list[str]) -> int:
    if sys.stdout is None:
        raise OSError("standard output is closed; nothing could be shown")
    result = build_app(*arguments[:1])(arguments, exit_on_error=False, print_error=False)
    return result if isinstance(result, int) else 0


def _silence_stdout() -> None:
    """Let the interpreter's last flush of standard output go nowhere instead of failing again."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
