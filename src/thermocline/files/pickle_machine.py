"""An interpreter of the few pickle opcodes that describe tensors, which can do nothing but describe them.

Source of the opcodes: Python's pickletools. A pickle is a program for a stack machine; here it can make texts,
whole numbers, tuples and dictionaries, name the globals of an allow-list, and apply those of them that are
functions of this package. Nothing is imported, no attribute is set or looked up, and all that it can make is
bounded by the size of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from thermocline.errors import ModelFormatError, printable

MAX_PICKLE: Final = 1 << 20
"""Most bytes of a pickle; that of a predictor takes 500."""
MAX_STEPS: Final = 1 << 18
"""Most opcodes of a pickle."""

_NAMES: Final = {op.code.encode("latin-1")[0]: op.name for op in pickletools.opcodes}
_PROTOCOLS: Final = range(2, 6)


class RefusedError(Exception):
    """What a function of the allow-list raises over its arguments."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name of the allow-list on the stack. Without `apply` it only stands for itself."""

    name: str
    apply: Callable[[tuple[Any, ...]], Any] | None = None


class _Mark:
    """Where the arguments of the opcodes that take many begin."""


_MARK: Final = _Mark()


def run_pickle(
    content: bytes, path: Path | str, allowed: Mapping[str, Global], persistent: Callable[[object], Any]
) -> Any:
    """The object that the pickle `content` of the file `path` describes.

    `allowed` maps "module name" to globals, `persistent` makes an object of a persistent id. Both refuse what they
    do not take with RefusedError.

    Raises:
        ModelFormatError: anything else than tensors needs is in it; the opcode or the global is named, and
            nothing of it was run.
    """
    if len(content) > MAX_PICKLE:
        raise ModelFormatError(path, "pickle", f"{len(content)} bytes; allowed: at most {MAX_PICKLE}")
    return _Machine(content, path, allowed, persistent).run()


class _Machine:
    """The stack, the memo, and a position in the pickle that never leaves it."""

    def __init__(
        self, content: bytes, path: Path | str, allowed: Mapping[str, Global], persistent: Callable[[object], Any]
    ) -> None:
        self._content = content
        self._path = path
        self._allowed = allowed
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._position = 0
        self._at = 0

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            self._at = self._position
            code = self._take(1)[0]
            if code == _STOP:
                return self._finish()
            step = _STEPS.get(code)
            if step is None:
                raise self._wrong(f"opcode {_NAMES.get(code, hex(code))} is refused: tensors do not need it")
            try:
                step(self)
            except RefusedError as error:
                raise self._wrong(f"opcode {_NAMES[code]}: {error}") from error
        raise self._wrong(f"more than {MAX_STEPS} opcodes")

    # What is read and what is held

    def _take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._content):
            raise self._wrong(f"is cut off: needs {end} bytes, has {len(self._content)}")
        taken = self._content[self._position : end]
        self._position = end
        return taken

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _text(self, size: int) -> str:
        raw = self._take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            refuse("a text is not UTF-8")

    def _line(self) -> str:
        end = self._content.find(b"\n", self._position)
        line = self._text((end if end >= 0 else len(self._content)) - self._position)
        self._take(1)
        return line

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            refuse("the stack is empty")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            refuse("the stack is empty")
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        for i in range(len(self._stack) - 1, -1, -1):
            if self._stack[i] is _MARK:
                taken = self._stack[i + 1 :]
                del self._stack[i:]
                return taken
        raise RefusedError("there is no mark")

    def _finish(self) -> Any:
        if self._position != len(self._content):
            raise self._wrong(f"{len(self._content) - self._position} bytes follow its end")
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise self._wrong(f"ends with {len(self._stack)} objects; allowed: one")
        return self._stack[0]

    def _wrong(self, problem: str) -> ModelFormatError:
        return ModelFormatError(self._path, "pickle", problem, offset=self._at)

    # The opcodes

    def protocol(self) -> None:
        version = self._number(1)
        if version not in _PROTOCOLS:
            refuse(f"found protocol {version}; allowed: {_PROTOCOLS.start} to {_PROTOCOLS.stop - 1}")

    def global_(self) -> None:
        self._named(self._line(), self._line())

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            refuse("a global's name must be two texts")
        self._named(module, name)

    def _named(self, module: str, name: str) -> None:
        found = self._allowed.get(f"{module} {name}")
        if found is None:
            shown = f"{printable(module, 60)}.{printable(name, 60)}"
            refuse(f"it names {shown}, which tensors do not need; nothing of it was run")
        self._push(found)

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or function.apply is None:
            refuse(f"it calls {_kind(function)}, which is no function")
        if not isinstance(arguments, tuple):
            refuse(f"the arguments of {function.name} are {_kind(arguments)}; allowed: a tuple")
        self._push(function.apply(arguments))

    def build(self) -> None:
        """A state dict of PyTorch carries `_metadata`, versions of its modules: looked at, then dropped."""
        state, target = self._pop(), self._top()
        if not isinstance(target, dict) or not isinstance(state, dict) or set(state) - {"_metadata"}:
            refuse(f"it sets the state of {_kind(target)}; allowed: _metadata of a dictionary")

    def persistent_id(self) -> None:
        self._push(self._persistent(self._pop()))

    def tuple_of(self, size: int) -> None:
        self._push(tuple(self._pop() for _ in range(size))[::-1])

    def set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            refuse(f"it fills {_kind(target)} with {len(items)} objects; allowed: a dictionary, with pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only texts: the hash of a nested tuple can take as long as its author likes.
            if not isinstance(key, str):
                refuse(f"a key is {_kind(key)}; allowed: texts")
            target[key] = value

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def put(self, index: int) -> None:
        self._memo[index] = self._top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            refuse(f"the memo has no entry {index}")
        self._push(self._memo[index])


def refuse(problem: str) -> NoReturn:
    """Raise RefusedError."""
    raise RefusedError(problem)


def _kind(value: object) -> str:
    """What `value` is, in words that do not depend on what it holds."""
    if isinstance(value, Global):
        return value.name
    kinds = {str: "a text", bool: "a truth value", int: "a whole number", tuple: "a tuple", dict: "a dictionary"}
    return "nothing" if value is None else kinds.get(type(value), "a tensor or a storage")


def _opcodes() -> dict[int, Callable[[_Machine], None]]:
    """The opcodes that are understood, by their code."""
    m = _Machine
    table: dict[str, Callable[[_Machine], None]] = {
        "PROTO": m.protocol,
        "FRAME": lambda s: void(s._number(8)),
        "MARK": lambda s: s._push(_MARK),
        "NONE": lambda s: s._push(None),
        "NEWTRUE": lambda s: s._push(True),
        "NEWFALSE": lambda s: s._push(False),
        "BININT": lambda s: s._push(s._number(4, signed=True)),
        "BININT1": lambda s: s._push(s._number(1)),
        "BININT2": lambda s: s._push(s._number(2)),
        "LONG1": lambda s: s._push(s._number(s._number(1), signed=True)),
        "BINUNICODE": lambda s: s._push(s._text(s._number(4))),
        "SHORT_BINUNICODE": lambda s: s._push(s._text(s._number(1))),
        "EMPTY_TUPLE": lambda s: s._push(()),
        "TUPLE": lambda s: s._push(tuple(s._to_mark())),
        "TUPLE1": lambda s: s.tuple_of(1),
        "TUPLE2": lambda s: s.tuple_of(2),
        "TUPLE3": lambda s: s.tuple_of(3),
        "EMPTY_DICT": lambda s: s._push({}),
        "SETITEM": m.set_item,
        "SETITEMS": lambda s: s.set_items(s._to_mark()),
        "GLOBAL": m.global_,
        "STACK_GLOBAL": m.stack_global,
        "REDUCE": m.reduce,
        "BUILD": m.build,
        "BINPERSID": m.persistent_id,
        "BINPUT": lambda s: s.put(s._number(1)),
        "LONG_BINPUT": lambda s: s.put(s._number(4)),
        "MEMOIZE": lambda s: s.put(len(s._memo)),
        "BINGET": lambda s: s.get(s._number(1)),
        "LONG_BINGET": lambda s: s.get(s._number(4)),
    }
    codes = {name: code for code, name in _NAMES.items()}
    return {codes[name]: step for name, step in table.items()}


def void(_: object) -> None:
    """Drop a value that was read only to be passed over."""


_STEPS: Final = _opcodes()
_STOP: Final = next(code for code, name in _NAMES.items() if name == "STOP")
