"""Messages to the prompt a model was trained on, by the chat template it came with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from thermocline.errors import ChatTemplateError, printable
from thermocline.text.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 18
"""Most characters of a template; the longest in use have some 20,000."""
MAX_INPUT = 1 << 24
"""Most bytes of messages and tools, as JSON."""
MAX_OUTPUT = 1 << 24
"""Most characters of a prompt."""
MAX_MEMORY = 1 << 29
"""Address space of the process that renders, in bytes."""
RENDER_SECONDS = 2
"""Longest that compiling or rendering may take."""
START_SECONDS = 20
"""Longest that the rendering process may take to start; 0.1 is usual."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
OPTIONS = frozenset(
    {
        *("enable_thinking", "thinking", "thinking_budget", "reasoning_effort", "preserve_thinking"),
        *("date_string", "documents", "builtin_tools", "custom_tools", "tools_in_user_message"),
    }
)
"""What a caller may hand to a template besides messages and tools."""


class ChatTemplate:
    """A chat template, rendered in a process of its own (see `template_worker.py`).

    The process starts at the first `render` (or `start`), serves all later ones in about a millisecond, and is
    killed when a template takes too long; the next call starts another. Safe to share between threads.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """`source` in Jinja; `special_tokens` such as `bos_token` are variables the template can name.

        Raises:
            ChatTemplateError: the source is longer than MAX_TEMPLATE.
        """
        if len(source) > MAX_TEMPLATE:
            raise ChatTemplateError(f"the chat template has {len(source)} characters; allowed: {MAX_TEMPLATE}")
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that came with `tokenizer`.

        Raises:
            ChatTemplateError: there is none, or it is too long.
        """
        if tokenizer.chat_template is None:
            raise ChatTemplateError(
                "this model has no chat template: it completes plain text only, without a system prompt"
            )
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return cls(
            tokenizer.chat_template,
            special_tokens={name: tokenizer.piece(i) for name, i in named.items() if i is not None},
        )

    def start(self) -> None:
        """Start the process and compile the template, so that the first `render` is as fast as the others.

        Raises:
            ChatTemplateError: the template does not compile, is too complex or takes too long.
        """
        with self._lock:
            self._running()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The prompt for `messages` (`role`, `content`, and what else the template reads).

        `content` is a string, a list of text parts (joined by newlines), or None beside `tool_calls`.
        `options`: those of OPTIONS. The prompt holds its own special tokens: encode it with `parse_special` and
        without `add_special`.

        Raises:
            ChatTemplateError: bad messages or options, or the template fails, refuses them or takes too long.
        """
        context = {
            **self._special_tokens,
            "messages": [_message(i, message) for i, message in enumerate(messages)],
            "tools": None if tools is None else [_tool(i, tool) for i, tool in enumerate(tools)],
            "documents": None,
            **_options(options),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        if not messages:
            raise ChatTemplateError("there are no messages; give at least one")
        request = json.dumps(context).encode()
        if len(request) > MAX_INPUT:
            raise ChatTemplateError(f"the messages have {len(request)} bytes as JSON; allowed: {MAX_INPUT}")
        with self._lock:
            worker = self._running()
            try:
                return worker.ask(request, RENDER_SECONDS)
            except _WorkerLostError as error:
                self._drop()
                raise ChatTemplateError(f"chat template: {error}") from None

    def close(self) -> None:
        """End the process; a later `render` starts another."""
        with self._lock:
            self._drop()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> _Worker:
        if self._worker is None:
            worker = _Worker()
            try:
                setup = {
                    "source": self.source,
                    "memory": MAX_MEMORY,
                    "output": MAX_OUTPUT,
                    "seconds": RENDER_SECONDS,
                }
                worker.ask(json.dumps(setup).encode(), START_SECONDS)
                worker.ask(b"null", RENDER_SECONDS)
            except _WorkerLostError as error:
                worker.end()
                raise ChatTemplateError(f"chat template: {error}") from None
            except ChatTemplateError:
                worker.end()
                raise
            self._worker = worker
        return self._worker

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


def render_chat(
    template: str | ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    **options: Any,
) -> str:
    """Render once. A string is compiled in a new process, some 0.1 s; keep a ChatTemplate for more than one call.

    Raises:
        ChatTemplateError: as `ChatTemplate.render`.
    """
    if isinstance(template, ChatTemplate):
        return template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **options)
    with ChatTemplate(template, special_tokens={"bos_token": bos_token, "eos_token": eos_token}) as once:
        return once.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **options)


class _WorkerLostError(Exception):
    """The rendering process died, or had to be given up."""


class _Worker:
    """The other end of `template_worker.py`: one question, one answer."""

    def __init__(self) -> None:
        if not sys.executable:
            raise ChatTemplateError("chat templates are rendered by a Python process, and sys.executable names none")
        ours, theirs = socket.socketpair()
        script = Path(__file__).with_name("template_worker.py")
        kept = {name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ}
        with theirs:
            process = subprocess.Popen(  # noqa: S603  our own script
                [sys.executable, "-I", "-S", str(script), *_import_path()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=kept,
                cwd="/",
            )
        self._socket = ours
        self.end = weakref.finalize(self, _end, process, ours)

    def ask(self, request: bytes, seconds: float) -> str:
        """Send one frame and give the text of the answer.

        Raises:
            ChatTemplateError: the answer is an error.
            _WorkerLostError: no whole answer within `seconds`.
        """
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(len(request).to_bytes(8, "big") + request)
            size = int.from_bytes(self._receive(8, deadline), "big")
            reply = json.loads(self._receive(size, deadline))
        except TimeoutError:
            raise _WorkerLostError(f"took longer than {seconds:g} s and was stopped") from None
        except (OSError, EOFError):
            raise _WorkerLostError("its process died: too much memory or nesting") from None
        if "error" in reply:
            raise ChatTemplateError(f"chat template: {printable(reply['error'], 500)}")
        return str(reply["text"])

    def _receive(self, size: int, deadline: float) -> bytes:
        if size > 16 * MAX_OUTPUT:
            raise EOFError
        parts = bytearray()
        while len(parts) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _import_path() -> list[str]:
    """Where the script finds jinja2 and what it needs; found without importing them here."""
    folders = []
    for package in ("jinja2", "markupsafe"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ChatTemplateError(f"chat templates need the package {package}; install it with pip")
        folders.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(folders))


def _message(number: int, message: object) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where} is {_kind(message)}; it must map role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ChatTemplateError(f"{where}: role is {printable(repr(role), 40)}; allowed: {', '.join(ROLES)}")
    plain: dict[str, Any] = _plain(message, where)
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_text_part(where, part) for part in content)
    elif content is None and not plain.get("tool_calls"):
        raise ChatTemplateError(f"{where}: content is missing; allowed only beside tool_calls")
    elif content is not None and not isinstance(content, str):
        raise ChatTemplateError(f"{where}: content is {_kind(content)}; allowed: a string or a list of text parts")
    return plain


def _text_part(where: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = printable(repr(part.get("type")), 40) if isinstance(part, dict) else _kind(part)
    raise ChatTemplateError(f"{where}: content has a part of type {found}; this model reads only text")


def _tool(number: int, tool: object) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise ChatTemplateError(f"tool {number} is {_kind(tool)}; it must be a JSON schema")
    plain: dict[str, Any] = _plain(tool, f"tool {number}")
    return plain


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise ChatTemplateError(
            f"chat template option {printable(unknown[0], 40)!r} is not allowed; allowed: {', '.join(sorted(OPTIONS))}"
        )
    return {name: _plain(value, name) for name, value in options.items()}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` in the types of JSON, which are all that reaches the template."""
    if depth > 64:
        raise ChatTemplateError(f"{where} is nested deeper than 64")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise ChatTemplateError(f"{where} holds {_kind(value)}; allowed: JSON values with string keys")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
