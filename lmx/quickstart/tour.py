"""How the tour is taken: chapter after chapter, kept where nothing before it has changed, onto one page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lmx
from lmx import artifact
from lmx.data.store import explained
from lmx.report.page import Page, Section


@dataclass(frozen=True)
class Options:
    """english, hindi: text files of the user's own instead of the fetched ones. steps: updates of the model."""

    english: tuple[str, ...] = ()
    hindi: tuple[str, ...] = ()
    vocab_size: int = 2048
    steps: int = 600
    seed: int = 0


@dataclass
class Tour:
    """What a chapter sees: its folder, the user's options, a way to speak, the facts of the chapters before it, and the
    hash of all that it is made from."""

    folder: Path
    options: Options
    say: Callable[[str], None] = print
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    made_from: str = ""


@dataclass(frozen=True)
class Chapter:
    """run(tour) -> facts that fit into JSON, {"skipped": why} if there can be none now; show(tour, facts) -> its blocks
    on the page."""

    name: str
    title: str
    run: Callable[[Tour], dict[str, Any]]
    show: Callable[[Tour, dict[str, Any]], tuple]


def take(tour: Tour, chapters: tuple[Chapter, ...]) -> Path:
    """Goes through the chapters and returns the page's path. A chapter already done with the same options, chapters
    before it and version of lmx is kept, so a tour that was stopped goes on where it was; one that was skipped is
    tried again."""
    with explained(tour.folder):
        tour.folder.mkdir(parents=True, exist_ok=True)
    with artifact.alone(tour.folder / ".lock"):
        return _take(tour, chapters)


def _take(tour: Tour, chapters: tuple[Chapter, ...]) -> Path:
    own = [artifact.hash_path(path) for path in (*tour.options.english, *tour.options.hindi)]
    tour.made_from = artifact.hash_text(f"{lmx.__version__} {json.dumps([asdict(tour.options), own])}")
    sections, begun = [], time.monotonic()
    for number, chapter in enumerate(chapters, 1):
        tour.made_from = artifact.hash_text(f"{tour.made_from} {chapter.name}")
        file = tour.folder / f"{number}-{chapter.name}.json"
        facts = _kept(file, tour.made_from)
        tour.say(f"\n{number}. {chapter.title}" + (" (kept)" if facts is not None else ""))
        if facts is None:
            start = time.monotonic()
            facts = chapter.run(tour)
            if "skipped" not in facts:
                facts["seconds"] = round(time.monotonic() - start, 1)
                kept = {"made_from": tour.made_from, "facts": facts}
                artifact.write(file, json.dumps(kept, indent=1, ensure_ascii=False))
        tour.facts[chapter.name] = facts
        tour.made_from = artifact.hash_text(f"{tour.made_from} {json.dumps(facts, ensure_ascii=False)}")
        sections.append(Section(f"{number}. {chapter.title}", tuple(chapter.show(tour, facts))))
        page = Page(
            "lmx quickstart",
            tuple(sections),
            "From raw text to a trained language model, in English and Hindi",
        )
        artifact.write(tour.folder / "report.html", page.html())
    tour.say(f"\nall chapters in {time.monotonic() - begun:.0f} s")
    return tour.folder / "report.html"


def _kept(file: Path, made_from: str) -> dict[str, Any] | None:
    """The facts of an earlier tour, unless they were made from something else or what they name is gone."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = found["made_from"] == made_from and all(path.exists() for path in _named(found["facts"]))
        return found["facts"] if whole else None
    except (ValueError, KeyError, TypeError):
        return None


def _named(facts: Any) -> Iterator[Path]:
    """The files and folders that facts name, as `path` or `folder`."""
    for name, fact in facts.items() if isinstance(facts, dict) else ():
        if name in ("path", "folder"):
            yield Path(fact)
        yield from _named(fact)
