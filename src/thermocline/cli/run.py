"""`thermocline run`: complete a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import thermocline
from thermocline.cli.flags import JsonFlag, ModelFlag, VerboseFlag, flag, with_settings
from thermocline.cli.loading import load as load_model
from thermocline.cli.output import INTERRUPTED, echo, notices, status, tell_report, write_json, write_stream
from thermocline.cli.prompt import read_prompt
from thermocline.config import LoadSettings, SamplingSettings
from thermocline.errors import UsageError

if TYPE_CHECKING:
    from thermocline.api import Generation

PROMPT = "def quicksort(items):"
"""What the model that comes with the package, which has read Python, continues if nothing else is asked."""
TOKENS = 256
"""How much of that it writes."""


@with_settings
def run(
    *,
    model: ModelFlag = None,
    prompt: Annotated[
        str | None, flag("--prompt", "-p", help="Text to continue; - reads standard input.", hyphen=True)
    ] = None,
    file: Annotated[str | None, flag("--file", "-f", help="Read the prompt from a file.")] = None,
    system: Annotated[
        str | None,
        flag("--system-prompt", "-sys", help="Answer as a chat message, under this instruction.", hyphen=True),
    ] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    load: LoadSettings,
    sampling: SamplingSettings,
) -> int:
    """Complete a prompt: the text goes to standard output, what is said about it to standard error.

    For example:

      thermocline run -p 'def quicksort(items):' -n 128

      thermocline run -m model.gguf -f prompt.txt --temp 0 --stop '###'

      git diff | thermocline run -m model.gguf -p - -sys 'Review this change.'

      thermocline run -m model.gguf -p 'Once upon a time' -n 64 --json
    """
    text = read_prompt(prompt, file)
    if text is None:
        if model is not None or system is not None:
            raise UsageError("there is no prompt; give one with -p TEXT, -p - or -f FILE")
        text = PROMPT
        sampling = replace(sampling, max_tokens=TOKENS) if sampling.max_tokens < 0 else sampling
        status("no prompt was given, so here is one; choose your own with -p", always=verbose)
    with load_model(model, load) as llm:
        notices(llm, always=verbose)
        if system is None:
            stream = llm.stream(text, sampling)
        else:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            stream = llm.stream_chat(messages, sampling)
        if as_json:
            with stream:
                write_json(generation_record(llm, stream.collect()))
            return 0
        if system is None:
            echo(text)
        with stream:
            interrupted = write_stream(stream).interrupted
        tell_report(stream.report, always=verbose)
        return INTERRUPTED if interrupted else 0


def generation_record(llm: thermocline.LLM, generation: Generation) -> dict[str, Any]:
    """A generation as one JSON object."""
    return {
        "model": llm.spec.name,
        "mode": llm.mode,
        "ops": llm.ops,
        "text": generation.text,
        "tokens": generation.tokens,
        "logprobs": generation.logprobs,
        "top_logprobs": generation.top,
        "finish_reason": generation.finish_reason,
        "notices": llm.notices,
        "report": generation.report.as_dict(),
    }
