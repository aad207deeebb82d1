"""The environment: --ctx-size is also THERMOCLINE_CTX_SIZE. The command line comes first, and empty is unset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from cyclopts import App, Argument, ArgumentCollection
from cyclopts.config import Env

from thermocline.cli.output import status
from thermocline.errors import WARNING, printable

PREFIX = "THERMOCLINE_"
NO_FLAGS = frozenset({"THERMOCLINE_HOME"})
"""Variables that are read elsewhere."""
RIVALS = (frozenset({"--prompt", "--file"}), frozenset({"MODEL", "--model"}))
"""Ways to say the same thing. One on the command line makes a verb deaf to the others' variables."""


class Environment(Env):
    """Gives flags that are not on the command line the values of their variables, and says which are nobody's."""

    def __init__(self, app: App) -> None:
        """`app` holds all verbs."""
        super().__init__(PREFIX, command=False)
        self._app = app

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Cyclopts calls this once the command line is read, with the arguments of the verb."""
        arguments[:] = [a for a in arguments if a.show or a.tokens]  # hidden flags are refused: suggest none of them
        _tell_unknown(self._app, arguments)
        given = {name for argument in arguments if argument.tokens for name in argument.names}
        rivals = {name for names in RIVALS if names & given for name in names}
        deaf = [a for a in arguments if not a.tokens and rivals.intersection(a.names)]
        super().__call__(app, commands, arguments)
        for argument in deaf:
            argument.tokens.clear()
        for argument in arguments:
            argument.tokens[:] = [token for token in argument.tokens if token.value or token.source != self.source]


def _tell_unknown(app: App, arguments: Iterable[Argument]) -> None:
    """Say which variables are no flag of any verb. Other verbs are imported only if this one lacks some."""
    left = {name for name in os.environ if name.startswith(PREFIX)} - NO_FLAGS - _variables(arguments)
    if not left:
        return
    known = NO_FLAGS | {name for verb in _verbs(app) for name in _variables(verb.assemble_argument_collection())}
    words = [name.removeprefix(PREFIX) for name in known]
    for name in sorted(left - known):
        near = get_close_matches(name.removeprefix(PREFIX), words, n=1)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        status(f"{WARNING}{printable(name)} is no flag of any verb and does nothing{hint}", always=True)


def _variables(arguments: Iterable[Argument]) -> set[str]:
    """What the flags that are shown are called in the environment."""
    names = (name for argument in arguments if argument.show for name in argument.names)
    return {PREFIX + name.lstrip("-").upper().replace("-", "_") for name in names}


def _verbs(app: App) -> Iterator[App]:
    """Every command below `app` that takes arguments."""
    for name in app:
        if not name.startswith("-"):
            if app[name].default_command is not None:
                yield app[name]
            yield from _verbs(app[name])
