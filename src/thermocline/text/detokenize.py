"""Text from tokens as they come, and the end of text at a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from thermocline.errors import UsageError
from thermocline.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns a stream of tokens into text, never half a character.

    All that `push` gave, joined, and `finish` equal `tokenizer.decode` of all tokens. At most three bytes are held
    back. With `continuing` the tokens follow a prompt, so the space that begins the first of them is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continuing: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_next = tokenizer.strips_space and not continuing
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def held(self) -> bytes:
        """The bytes of an unfinished character, at most three."""
        return self._decoder.getstate()[0]

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished.

        Raises:
            UsageError: the id is outside the vocabulary; the state is as before.
        """
        data = self._tokenizer.text_bytes(token, skip_special=self._skip_special)
        if self._strip_next and data:
            self._strip_next = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing. The next push starts a character anew."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


class StopMatcher:
    """Ends a text where the first of some strings is complete, wherever the text was cut into chunks.

    What could still become a stop string is held back. Of the stop strings that are complete first, the longest
    counts. Each string has a Knuth-Morris-Pratt automaton, so a character costs the same however long they are.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Watch for `stops`.

        Raises:
            UsageError: one of them is empty.
        """
        self._stops = tuple(stops)
        if not all(self._stops):
            raise UsageError("a stop string is empty; it would end every text at once")
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text, None while it goes on."""

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not given before; nothing after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        for place in range(len(self._held), len(text)):
            complete = self._advance(text[place])
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return text[: place + 1 - len(self.matched)]
        shown = len(text) - max(self._states)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        rest, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return rest

    def _advance(self, character: str) -> list[str]:
        """Move every automaton by one character; the stop strings that end with it."""
        complete = []
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            state = self._states[i]
            while state and stop[state] != character:
                state = borders[state - 1]
            state += stop[state] == character
            self._states[i] = state
            if state == len(stop):
                complete.append(stop)
        return complete


def _borders(word: str) -> list[int]:
    """For each prefix of `word` the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    for end in range(1, len(word)):
        length = borders[end - 1]
        while length and word[length] != word[end]:
            length = borders[length - 1]
        borders[end] = length + (word[length] == word[end])
    return borders
