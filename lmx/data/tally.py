"""What was read and what was passed over: counted by reason, with the first places of each."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field

EXAMPLES = 3


@dataclass
class Report:
    """Counts of one preparation. `skipped` was left out; `noted` was used, but is worth knowing.

    documents, text_bytes: usable documents and their UTF-8 bytes, before any split or cleaning.
    """

    documents: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, where: str, n: int = 1) -> None:
        """Counts something left out, for example skip("broken_line", "a.jsonl:7 Expecting value")."""
        self.skipped[reason] = self.skipped.get(reason, 0) + n
        self._remember(reason, where)

    def note(self, reason: str, where: str, n: int = 1) -> None:
        """Counts something worth knowing that was used all the same."""
        self.noted[reason] = self.noted.get(reason, 0) + n
        self._remember(reason, where)

    def add(self, other: Report) -> None:
        """Adds another report's counts to this one."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        for mine, theirs in ((self.skipped, other.skipped), (self.noted, other.noted)):
            for reason, n in theirs.items():
                mine[reason] = mine.get(reason, 0) + n
        for reason, places in other.examples.items():
            for place in places:
                self._remember(reason, place)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict) -> Report:
        return cls(**found)

    def __str__(self) -> str:
        head = f"{self.documents:,} documents, {self.text_bytes:,} bytes of text"
        return "\n".join((head, *self._lines("skipped", self.skipped), *self._lines("noted", self.noted)))

    def warn(self, of: str) -> None:
        """Warns, in one line that begins with `of`, if anything was left out."""
        if self.skipped:
            warnings.warn(f"{of}: {'; '.join(self._lines('skipped', self.skipped))}", stacklevel=2)

    def _lines(self, word, counts):
        for reason, n in counts.items():
            places = "; ".join(self.examples.get(reason, ()))
            yield f"{word} {n:,} {reason.replace('_', ' ')}" + (f": {places}" if places else "")

    def _remember(self, reason, where):
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES and where not in places:
            places.append(where)
