"""Renders one chat template, in a process of its own that can be killed.

A template is a program by strangers. Jinja's sandbox keeps it from Python's internals, but not from looping or
filling memory, and no limit inside a process can stop that. So the parent (`chat.py`) runs this file as a script:
an empty environment, limits on memory and CPU time, no further file, process or write. It speaks JSON in frames of
an 8-byte big-endian length over the socket on descriptor 0, imports nothing of the package, and ends when the
socket does.

The language is the one that transformers gives to chat templates: `trim_blocks`, `lstrip_blocks`, loop controls,
`raise_exception`, `strftime_now`, a `tojson` without HTML escapes, `{% generation %}`.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from typing import Any, NoReturn

_IMPORTED_LATE = ("jinja2.debug", "jinja2.constants", "encodings.unicode_escape", "pprint", "textwrap")
"""What jinja imports only when a template needs it, and by then no file can be opened."""
_MAX_NODES = 20_000
_MAX_DEPTH = 150
_MAX_MESSAGE = 500


def receive(connection: socket.socket) -> Any:
    """The next frame; EOFError when the other side is gone."""
    size = int.from_bytes(_read(connection, 8), "big")
    return json.loads(_read(connection, size))


def send(connection: socket.socket, value: Any) -> None:
    """Send `value` as one frame. Non-ASCII is escaped, so lone surrogates pass."""
    data = json.dumps(value).encode()
    connection.sendall(len(data).to_bytes(8, "big") + data)


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def main(import_path: list[str]) -> None:
    """Answer frames until the socket ends: first the limits, then null to compile or a context to render."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process in its own way
    sys.path += import_path
    environment = _environment()
    for name in _IMPORTED_LATE:
        import_module(name)
    time.tzset()
    connection = socket.socket(fileno=0)
    try:
        setup = receive(connection)
        _confine(setup["memory"])
        send(connection, {"text": ""})
        template = None
        while True:
            context = receive(connection)
            _allow_cpu(setup["seconds"])
            try:
                template = template or _compile(environment, setup["source"])
                reply = {"text": "" if context is None else _render(template, context, setup["output"])}
            except Exception as error:
                reply = {"error": _describe(error)}
            send(connection, reply)
    except (EOFError, OSError):
        return


def _confine(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _allow_cpu(seconds: int) -> None:
    """A loop ends even if the parent was killed and cannot kill this process."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, hard))


def _compile(environment: Any, source: str) -> Any:
    tree = environment.parse(source)
    _check_size(tree)
    return environment.from_string(tree)


def _check_size(tree: Any) -> None:
    level, count, depth = [tree], 0, 0
    while level:
        count += len(level)
        depth += 1
        if count > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError(f"the template is too complex; allowed: {_MAX_NODES} nodes, nested {_MAX_DEPTH} deep")
        level = [child for node in level for child in node.iter_child_nodes()]


def _render(template: Any, context: Mapping[str, Any], limit: int) -> str:
    parts = []
    size = 0
    for part in template.generate(context):
        size += len(part)
        if size > limit:
            raise ValueError(f"the output is longer than {limit} characters")
        parts.append(part)
    return "".join(parts)


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks what the model wrote; here it only shows its body."""

        tags = {"generation"}  # noqa: RUF012  jinja's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

        def _show(self, caller: Any) -> Any:
            return caller()

    class PublicNamespace(Namespace):
        """A namespace whose names cannot reach into Python."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            for name in dict(*args, **kwargs):
                check_public(name)
            Namespace.__init__(self, *args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            check_public(name)
            super().__setitem__(name, value)

    def check_public(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PublicNamespace
    return environment


def _describe(error: Exception) -> str:
    kind = type(error).__name__
    line = getattr(error, "lineno", None)
    if kind == "TemplateError":
        words = f"the template refuses: {error}"
    elif kind == "TemplateSyntaxError":
        words = f"the template does not compile, line {line}: {error}"
    elif kind == "SecurityError":
        words = f"the sandbox refuses: {error}"
    elif isinstance(error, MemoryError):
        words = "the template needs too much memory"
    elif isinstance(error, RecursionError):
        words = "the template is nested too deep"
    else:
        words = str(error) if kind == "ValueError" else f"{kind}: {error}"
    return words[:_MAX_MESSAGE]


if __name__ == "__main__":
    main(sys.argv[1:])
