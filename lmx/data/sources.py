"""Where documents come from: a source is a value that can be read any number of times, and never whole in memory.

A document is a dict {"text": str, "id": str}. One longer than about a megabyte comes in parts, one after the
other: every part but the last has "more": True, and their texts joined are the document. A conversation (chat.py) has
"messages" instead of "text", and is always whole; so is a question, which has an "answer" beside its "text", that goes
on where the text ends or is the number of a class.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from lmx import artifact
from lmx.text.graphemes import clusters

from . import files
from .files import expand, hash_of, lines, pieces, text_blocks
from .tally import Report

Document = dict[str, Any]
MAX_LINE = 64 << 20
MANY_FILES = 64


def texts_of(document: Document) -> list[str]:
    """The text of a document; that of each message of a conversation, of the one rejected for it too; or those of a
    question and its answer."""
    if "messages" in document:
        return [m["content"] for m in messages_in(document)]
    return [document["text"], *([x] if isinstance(x := document.get("answer"), str) else [])]


def messages_in(document: Document) -> list[dict[str, str]]:
    """The messages of a conversation, then those of the one rejected for it, if it is a pair (see `Preferences`)."""
    return [*document["messages"], *document.get("rejected", ())]


class NoDocument(ValueError):
    """A source has not one usable document; `report` has the counts."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Source(ABC):
    """Base of all sources: iterate it for documents, or call `documents(report)` to have its problems
    counted.

    masked: whether a part of each document alone is learned; such a source has `keep`, which end of a document that is
    longer than a row is kept. conversations: whether documents are some. scored: whether each has a "score" in [0, 1].
    """

    masked: ClassVar[bool] = False
    conversations: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    def __iter__(self) -> Iterator[Document]:
        return self.documents(Report())

    def documents(self, report: Report) -> Iterator[Document]:
        """All documents in a fixed order; what is passed over is counted in `report`.

        Raises: ValueError that names the files and the counts if not one document is usable;
          FileNotFoundError, or ValueError for a file that is not of its format.
        """
        here = Report()
        continues = False
        for document in self._read(here):
            here.documents += not continues
            here.text_bytes += sum(len(text.encode("utf-8")) for text in texts_of(document))
            continues = document.get("more", False)
            yield document
        report.add(here)
        if not here.documents:
            raise NoDocument(f"{self.label}: no usable document. {here}{self._hint()}", here)

    @property
    def label(self) -> str:
        """Its repr, cut short where texts are given inside it."""
        whole = repr(self)
        return whole if len(whole) <= 300 else f"{whole[:297]}..."

    def files(self) -> tuple[Path, ...]:
        """The files it reads, in order."""
        return ()

    def artifacts(self) -> list[artifact.Artifact]:
        """What its documents come from: each file or folder it reads by hash, many files as one."""
        paths = self.files()
        if len(paths) > MANY_FILES:
            facts = {"files": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
            return [
                artifact.Artifact(artifact.SET, self.fingerprint(), str(paths[0].parent.absolute()), facts)
            ]
        return [artifact.read(path) or _raw(path) for path in paths]

    def fingerprint(self) -> str:
        """sha256 of the content and of the settings that decide the documents: the same text elsewhere is
        equal."""
        settings = {k: v for k, v in vars(self).items() if k not in ("path", "data_dir")}
        hashes = [hash_of(path) for path in self.files()]
        return hashlib.sha256(repr((type(self).__name__, settings, hashes)).encode()).hexdigest()

    def groups(self, max_bytes: int) -> tuple[Source, ...]:
        """Sources that read the same documents in the same order, each of about max_bytes of files at most or
        one file: units of work that are kept when a later one fails."""
        return (self,)

    def holdout(self, share: float) -> tuple[Source, Source] | None:
        """(training source, validation source) by position, for a source that is one single document; else
        None: documents are then held out whole."""
        return None

    @abstractmethod
    def _read(self, report: Report) -> Iterator[Document]: ...

    def _hint(self) -> str:
        return ""


@dataclass(frozen=True)
class _Files(Source):
    path: str | tuple[str, ...]

    def files(self) -> tuple[Path, ...]:
        return expand(self.path)

    def groups(self, max_bytes: int) -> tuple[Source, ...]:
        groups: list[list[str]] = []
        size = 0
        for path in self.files():
            n_bytes = path.stat().st_size
            if not groups or size + n_bytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(str(path))
            size += n_bytes
        return (self,) if len(groups) < 2 else tuple(replace(self, path=tuple(group)) for group in groups)

    def _read(self, report: Report) -> Iterator[Document]:
        for path in self.files():
            if path.stat().st_size == 0:
                report.skip("empty_file", str(path))
            else:
                yield from self._read_file(path, report)


@dataclass(frozen=True)
class Text(_Files):
    """UTF-8 text files, plain, .gz or .zst.

    path: a file or pattern, or several. unit: what one document is: a whole "file", a "paragraph" (lines
    between blank lines), or a "line". span: the share of each file to read, cut between whole characters:
    span=(0.0, 0.9) and span=(0.9, 1.0) share a file out without loss or overlap, at byte int(0.9 * size).
    """

    unit: str = "file"
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.unit not in ("file", "paragraph", "line"):
            raise ValueError(f"Text: unit={self.unit!r}; use 'file', 'paragraph' or 'line'")
        if not 0.0 <= self.span[0] < self.span[1] <= 1.0:
            raise ValueError(f"Text: span={self.span}; use 0 <= start < end <= 1")

    def holdout(self, share: float) -> tuple[Source, Source] | None:
        if self.unit != "file" or len(self.files()) > 1 or self.files()[0].suffix in (".gz", ".zst"):
            return None
        low, high = self.span
        middle = high - share * (high - low)
        if not low < middle < high:
            raise ValueError(
                f"{self.label}: valid_share={share} holds out nothing of it; raise it, or train without "
                "validation with valid_share=0"
            )
        return replace(self, span=(low, middle)), replace(self, span=(middle, high))

    def _read_file(self, path: Path, report: Report) -> Iterator[Document]:
        stretches = text_blocks(path, report, self.span)
        if self.unit == "file":
            documents = _parts(pieces(text for _, text in stretches), str(path))
        else:
            documents = _units(stretches, str(path), blank_lines=self.unit == "paragraph")
        found = False
        for document in documents:
            found = True
            yield document
        if not found and self.span == (0.0, 1.0):
            report.skip("empty_file", str(path))
        elif not found:
            report.skip(
                "empty_span", f"{path}: span={self.span} of {path.stat().st_size:,} bytes has no text"
            )


@dataclass(frozen=True)
class Jsonl(_Files):
    """One JSON object a line, plain, .gz or .zst; the text is in `field`.

    Counted and passed over: lines that are not JSON objects, lines without the field or with another type in
    it, empty texts, lines longer than 64 MiB.
    """

    field: str = "text"

    def _read_file(self, path: Path, report: Report) -> Iterator[Document]:
        for where, record in json_objects(path, report):
            if self.field not in record:
                report.skip("field_missing", f"{where} has {', '.join(map(repr, record)) or 'no field'}")
            else:
                yield from _checked(record[self.field], where, report)

    def _hint(self) -> str:
        return (
            array_hint(self.files()[0])
            or f"\nEach line is to be an object with its text in {self.field!r}; or name another field."
        )


@dataclass(frozen=True)
class Parquet(_Files):
    """Parquet files, read by batches of rows; the text is in the column `field`, as strings or UTF-8 bytes,
    dictionary-encoded or not. Needs pyarrow: lmx[parquet]."""

    field: str = "text"

    def _read_file(self, path: Path, report: Report) -> Iterator[Document]:
        with opened_parquet(path) as file:
            names = file.schema_arrow.names
            if (n := names.count(self.field)) != 1:
                raise ValueError(
                    f"{path}: {f'{n} columns' if n else 'no column'} {self.field!r}; it has "
                    f"{', '.join(map(repr, names))}: name one text column with Parquet(path, field=...)"
                )
            kind = file.schema_arrow.field(self.field).type
            if not _holds_text(kind):
                raise ValueError(
                    f"{path}: column {self.field!r} holds {kind}, not text; name another with field=..."
                )
            for where, row in parquet_rows(file, path, [self.field], report):
                yield from _checked(row[self.field], where, report)


@dataclass(frozen=True)
class Documents(Source):
    """Texts given as they are: for examples, notebooks and tests."""

    texts: tuple[str, ...]

    def holdout(self, share: float) -> tuple[Source, Source] | None:
        if len(self.texts) != 1 or not 0 < share < 1:
            return None
        (text,) = self.texts
        cut = _grapheme_cut(text, round(len(text) * (1 - share)))
        return Documents((text[:cut],)), Documents((text[cut:],))

    def _read(self, report: Report) -> Iterator[Document]:
        for i, text in enumerate(self.texts):
            yield from _checked(text, f"document {i}", report)


@dataclass(frozen=True)
class Tfds(Source):
    """A split of a prepared TensorFlow dataset, read without TensorFlow: Tfds("wiki40b/hi"), see tfds.py.

    name: "name", "name/config" or "name/config:version", or the folder of a prepared dataset.
    split: any TFDS slice, such as "train[:10%]". data_dir: None is TFDS's own folder.
    """

    name: str
    split: str = "train"
    field: str = "text"
    data_dir: str | None = None

    def files(self) -> tuple[Path, ...]:
        from .tfds import folder_of

        return (folder_of(self.name, self.data_dir),)

    def _read(self, report: Report) -> Iterator[Document]:
        from .tfds import examples

        continues = False
        for i, example in enumerate(examples(self.name, self.split, self.field, self.data_dir)):
            where = f"{self.name}:{self.split}:{i}"
            text, more = example[self.field], bool(example.get("more", False))
            if isinstance(text, bytes):
                try:
                    text = text.decode("utf-8")
                except UnicodeDecodeError as error:
                    report.skip("invalid_utf8", f"{where} ({error.reason})")
                    text = "" if continues or more else None
            if more or continues:
                yield {"text": text, "id": where, **({"more": True} if more else {})}
            elif text is not None:
                yield from _checked(text, where, report)
            continues = more


def source(spec: str | Source) -> Source:
    """A source by its name: "tfds:name", *.jsonl or *.ndjson, *.parquet, and any other file as Text; .gz and
    .zst are looked through.

    >>> source("a/*.jsonl.gz")
    Jsonl(path='a/*.jsonl.gz', field='text')
    >>> source("tfds:wiki40b/hi")
    Tfds(name='wiki40b/hi', split='train', field='text', data_dir=None)

    Raises: ValueError for *.json, which is no text, and does not say whether it holds an object a line.
    """
    if isinstance(spec, Source):
        return spec
    if spec.startswith("tfds:"):
        return Tfds(spec.removeprefix("tfds:"))
    ending = Path(spec.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    if ending == ".json":
        raise ValueError(
            f"{spec}: JSON is not read as text; if it has an object a line, give Jsonl({spec!r}), if it is one "
            "array, write an object a line first: jq -c '.[]' FILE.json > FILE.jsonl"
        )
    kind = {".jsonl": Jsonl, ".ndjson": Jsonl, ".parquet": Parquet}.get(ending, Text)
    return kind(spec)


def json_objects(path: Path, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSONL file; what is no JSON object is counted and passed over."""
    for number, line in lines(path, MAX_LINE):
        where = f"{path}:{number}"
        if line is None:
            report.skip("line_too_long", f"{where} is longer than {MAX_LINE >> 20} MiB")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            report.skip("invalid_utf8", f"{where} ({error.reason}, byte {error.start} of the line)")
            continue
        except (ValueError, RecursionError) as error:
            report.skip("broken_line", f"{where} ({error})")
            continue
        if not isinstance(record, dict):
            report.skip("not_an_object", f"{where} is a JSON {type(record).__name__}")
        else:
            yield where, record


def array_hint(path: Path) -> str:
    """What to do about a file that is one JSON array; "" for any other."""
    first = next((line for _, line in lines(path, MAX_LINE)), None) or b""
    is_array = first.lstrip().startswith(b"[")
    return "\nThe file looks like one JSON array; write an object a line: jq -c '.[]'" if is_array else ""


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises: ImportError naming what to install; ValueError for another file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("reading Parquet needs pyarrow: pip install 'lmx[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from None
    with file:
        yield file


def parquet_rows(
    file: Any, path: Path, names: Sequence[str], report: Report
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, {column: value}) of each row, by batches; bytes are UTF-8 text, and a row where they are not is
    counted and passed over. Raises: ValueError that tells after which row a file is damaged."""
    import pyarrow

    row = 0
    try:
        for batch in file.iter_batches(batch_size=256, columns=list(names)):
            for values in zip(*(batch.column(name) for name in names)):
                where = f"{path}:{row}"
                row += 1
                try:
                    plain = [value.as_py() for value in values]
                    plain = [x.decode("utf-8") if isinstance(x, bytes) else x for x in plain]
                except UnicodeDecodeError as error:
                    report.skip("invalid_utf8", f"{where} ({error.reason})")
                    continue
                yield where, dict(zip(names, plain))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged after row {row:,} ({error}); fetch or write it again") from None


def encodable(text: str) -> bool:
    """Whether the text has UTF-8: not so with half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _raw(path):
    return artifact.Artifact("file", hash_of(path), str(path.absolute()), {"bytes": path.stat().st_size})


def _checked(text, where, report):
    if not isinstance(text, str):
        report.skip("not_text", f"{where} holds {type(text).__name__}")
    elif not text.strip():
        report.skip("empty_text", where)
    elif not encodable(text):
        report.skip("invalid_unicode", f"{where} holds half of a surrogate pair")
    else:
        yield from _parts(pieces([text]), where)


def _parts(texts, name):
    """One document in its parts: all but the last say that more follows. Nothing if the text is blank."""
    held, begun = None, False
    for text in texts:
        if held is not None:
            yield {"text": held, "id": name, "more": True}
            begun = True
        held = text
    if held is not None and (begun or held.strip()):
        yield {"text": held, "id": name}


def _units(stretches, name, blank_lines):
    """Lines as documents, or with `blank_lines` the paragraphs between them, in parts where they are long."""
    held, size, start = [], 0, 1
    begun = inside_line = False
    for number, text in stretches:
        rows = text.split("\n")
        for i, row in enumerate(rows):
            line_ends = i < len(rows) - 1
            if not line_ends and not row:
                continue
            if not held and not begun:
                start = number + i
            blank = line_ends and not inside_line and not row.strip()
            if not blank:
                held.append(row + "\n" if line_ends and blank_lines else row)
                size += len(row)
                inside_line = not line_ends
            if size > files.BLOCK:
                *whole, rest = pieces(["".join(held)])
                for part in whole:
                    yield {"text": part, "id": f"{name}:{start}", "more": True}
                    begun = True
                held, size = [rest], len(rest)
            if blank if blank_lines else line_ends:
                last = "".join(held).rstrip("\n")
                if begun or last.strip():
                    yield {"text": last, "id": f"{name}:{start}"}
                held, size, begun = [], 0, False
    last = "".join(held).rstrip("\n")
    if begun or last.strip():
        yield {"text": last, "id": f"{name}:{start}"}


def _grapheme_cut(text, at):
    """The first place >= at between two graphemes, but not the very end or beginning of a text that has
    two."""
    ends = list(accumulate(map(len, clusters(text))))
    inner = ends[:-1]
    return next((end for end in inner if end >= at), inner[-1] if inner else len(text))


def _holds_text(kind):
    """Whether the values of a Parquet column are strings or bytes."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    bytes_ = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(is_of(kind) for is_of in (*strings, *bytes_))
