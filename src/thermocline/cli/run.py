"""`thermocline run`: complete a prompt."""

from __future__ import annotations

from collections.abc import Sequence
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
    from thermocline.api import Item, Stream

PROMPT = "def quicksort(items):"
"""What the model that comes with the package, which has read Python, continues if nothing else is asked."""
TOKENS = 256
"""How much of that it writes."""
SYSTEM_HELP = "Answer as a chat message, under this instruction; '' is a chat message without one."


@with_settings
def run(
    *,
    model: ModelFlag = None,
    prompt: Annotated[
        str | None, flag("--prompt", "-p", help="Text to continue; - reads standard input.", hyphen=True)
    ] = None,
    file: Annotated[str | None, flag("--file", "-f", help="Read the prompt from a file.")] = None,
    system: Annotated[str | None, flag("--system-prompt", "-sys", help=SYSTEM_HELP, hyphen=True)] = None,
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
    if sampling.logprobs and not as_json:
        raise UsageError("--logprobs is told in JSON only: add --json, or leave it out")
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
            instruction = [{"role": "system", "content": system}] if system else []
            stream = llm.stream_chat([*instruction, {"role": "user", "content": text}], sampling)
        if as_json:
            _write_record(llm, stream)
            return 0
        if system is None:
            echo(text)
        with stream:
            interrupted = write_stream(stream).interrupted
        tell_report(stream.report, always=verbose)
        return INTERRUPTED if interrupted else 0


def _write_record(llm: thermocline.LLM, stream: Stream) -> None:
    """The whole of `stream` as one JSON object; after an interrupt, what there is of it."""
    items: list[Item] = []
    with stream:
        try:
            items.extend(stream)  # keeps what came before an exception
        except KeyboardInterrupt:
            write_json(generation_record(llm, stream, items) | {"finish_reason": "interrupted"})
            raise
        write_json(generation_record(llm, stream, items))


def generation_record(llm: thermocline.LLM, stream: Stream, items: Sequence[Item]) -> dict[str, Any]:
    """What came of a stream as one JSON object."""
    return {
        "model": llm.spec.name,
        "mode": llm.mode,
        "ops": llm.ops,
        "text": "".join(item.text for item in items),
        "tokens": [item.token for item in items],
        "logprobs": [item.logprob for item in items],
        "top_logprobs": [item.top for item in items],
        "finish_reason": stream.finish_reason,
        "notices": llm.notices,
        "report": stream.report.as_dict(),
    }
