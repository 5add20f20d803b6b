"""From the bytes of tokens to text that may be shown: whole characters, whole clusters, no stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lmx.text.graphemes import split_complete


class Assembler:
    """The text of one completion, put together while its tokens arrive.

    A token may end inside a character, inside a grapheme cluster, or inside what may become a stop string.
    `push` therefore returns only text that no later token can change, `finish` the rest. All parts joined are
    the bytes up to the first stop string as UTF-8, with U+FFFD for what is no UTF-8.

    The completion stops at the first token that completes a stop string; its text ends where the earliest
    stop string found in the text so far begins. Bytes are matched, so a stop string may span any tokens.

    stopped: whether a stop string was found; then nothing more is to be pushed.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stopped = False
        self._stop = [s.encode() for s in stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = b""
        self._text = ""

    def push(self, piece: bytes) -> str:
        """Whole grapheme clusters that are now certain, perhaps none."""
        self._bytes += piece
        found = [at for at in map(self._bytes.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(self._bytes) - self._may_become_stop()
        self._text += self._decoder.decode(self._bytes[:certain])
        self._bytes = self._bytes[certain:]
        whole, self._text = split_complete(self._text)
        return whole

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        rest = b"" if self.stopped else self._bytes
        text = self._text + self._decoder.decode(rest, final=True)
        self._bytes, self._text = b"", ""
        return text

    def _may_become_stop(self) -> int:
        """Length of the longest end of the bytes that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(self._bytes)), 0, -1):
            if any(stop.startswith(self._bytes[-n:]) for stop in self._stop):
                return n
        return 0
