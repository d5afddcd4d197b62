"""Tokens to text as they come, with stop strings that may lie across token borders."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ulm.tokenizers.tokenizer import Tokenizer


class TextStream:
    """Text of one answer. Holds back what may still become a stop string, and bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after this token. `stopped` is set when a stop string is complete; it is cut off."""
        return self._release(self._decoder.decode(self._bytes_of[token]))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
