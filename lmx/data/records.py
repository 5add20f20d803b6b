"""Rows of named fields, as tasks and conversations are made of, from wherever they lie.

    Records("reviews.csv")                                    the first line names the fields
    Records("pairs/*.jsonl.zst", rename={"source": "hi"})     field "source" is what the file calls "hi"
    Records("tfds:glue/sst2", split="validation")
    Records([{"text": "बहुत अच्छा", "label": 1}])
    Records({"hi": "dev.hi", "en": ("dev.en.0", "dev.en.1")})     files whose lines belong together

Rows are read one after the other, anew each time. A row that cannot be used is counted, named and passed over.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import expand, hash_of, lines
from .sources import MAX_LINE, NoDocument, encodable, json_objects, opened_parquet, parquet_rows
from .tally import Report

Value = str | int | float | bool | list[str]


@dataclass(frozen=True)
class Records:
    """source: files or patterns (*.jsonl, *.ndjson, *.csv, *.tsv, plain, .gz or .zst; *.parquet), "tfds:name", rows
    themselves, or {field: text file or files}, of which several make a list. rename: {field: its name in the source}.
    split: of a TFDS dataset.

    CSV quotes as Excel does; TSV has no quotes (IANA text/tab-separated-values). Values are strings, in JSONL,
    Parquet and TFDS also numbers, booleans and lists of strings.
    Raises: ValueError for a file of a kind that has no fields.
    """

    source: str | Sequence[str] | Sequence[Mapping[str, Any]] | Mapping[str, str | Sequence[str]]
    rename: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"

    def __post_init__(self):
        if isinstance(self.source, str | Path):
            object.__setattr__(self, "source", str(self.source))
        elif not isinstance(self.source, Mapping):
            object.__setattr__(self, "source", tuple(self.source))
        for path in self._paths():
            if not path.startswith("tfds:") and _ending(path) not in _READERS:
                raise ValueError(
                    f"Records: {path} has no fields that are known; give *{', *'.join(_READERS)}, tfds:name, or "
                    "{'field': 'file'} for lines of plain text"
                )

    @property
    def label(self) -> str:
        """What errors call it."""
        paths = self.source.values() if isinstance(self.source, Mapping) else self._paths()
        return ", ".join(map(str, paths)) or f"{len(self.source)} rows given"

    def rows(
        self, fields: Collection[str] = (), report: Report | None = None
    ) -> Iterator[tuple[str, dict[str, Value]]]:
        """(place, row) of every usable row, in order; a row has `fields`, or all there are if none is named.

        Counted in `report` and passed over: rows that lack a field, are not UTF-8, or hold something else than text,
        numbers or lists of strings in it.
        Raises: NoDocument, a ValueError, if no row is usable; ValueError for a file whose header lacks a field;
          FileNotFoundError; ImportError naming what to install.
        """
        here = Report()
        wanted = {name: self.rename.get(name, name) for name in fields}
        for where, raw in self._read(tuple(wanted.values()), here):
            theirs = wanted or _names(raw, self.rename)
            row, wrong = {}, None
            for name, their in theirs.items():
                row[name], wrong = _checked(raw, their)
                if wrong:
                    here.skip(wrong[0], f"{where} {wrong[1]}")
                    break
            if not wrong:
                here.documents += 1
                here.text_bytes += sum(len(x.encode()) for x in row.values() if isinstance(x, str))
                yield where, row
        if report is not None:
            report.add(here)
        if not here.documents:
            raise NoDocument(f"{self.label}: no usable row. {here}", here)

    def files(self) -> tuple[Path, ...]:
        """The files it reads, in order; none of a TFDS dataset."""
        paths = [path for path in self._paths() if not path.startswith("tfds:")]
        if isinstance(self.source, Mapping):
            paths = list(self.source.values())
        return tuple(file for path in paths for file in expand(path))

    def fingerprint(self) -> str:
        """sha256 of the files' contents, or of the rows given, and of the settings that decide what rows hold."""
        given = self.source if not self.files() else tuple(map(hash_of, self.files()))
        names = tuple(self.source) if isinstance(self.source, Mapping) else ()
        return hashlib.sha256(repr((given, names, dict(self.rename), self.split)).encode()).hexdigest()

    def _paths(self) -> tuple[str, ...]:
        if isinstance(self.source, str):
            return (self.source,)
        return tuple(x for x in self.source if isinstance(x, str)) if isinstance(self.source, tuple) else ()

    def _read(self, fields: tuple[str, ...], report: Report) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if isinstance(self.source, Mapping):
            yield from _parallel(self.source, report)
        elif not self._paths():
            yield from ((f"row {i}", row) for i, row in enumerate(self.source))
        for path in self._paths():
            if path.startswith("tfds:"):
                yield from _tfds(path.removeprefix("tfds:"), self.split, fields)
                continue
            for file in expand(path):
                if file.stat().st_size:
                    yield from _READERS[_ending(path)](file, fields, report)
                else:
                    report.skip("empty_file", str(file))


def _jsonl(path, fields, report):
    yield from json_objects(path, report)


def _csv(path, fields, report):
    yield from _delimited(path, fields, report, delimiter=",", strict=True)


def _tsv(path, fields, report):
    yield from _delimited(path, fields, report, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(path, fields, report, **dialect):
    """Bytes that are no UTF-8 pass through the parser as half surrogates, so that one bad line costs one row."""

    def texts():
        for number, line in lines(path, MAX_LINE):
            if line is None:
                report.skip("line_too_long", f"{path}:{number} is longer than {MAX_LINE >> 20} MiB")
            else:
                yield line.decode("utf-8", "surrogateescape") + "\n"

    reader = csv.reader(texts(), **dialect)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: its first line names a field twice: {', '.join(header)}; rename one")
    _check_header(path, header, fields)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.skip("broken_line", f"{path}:{reader.line_num} ({error})")
            continue
        where = f"{path}:{reader.line_num}"
        if len(cells) == len(header):
            yield where, dict(zip(header, cells))
        elif cells:
            report.skip("wrong_number_of_fields", f"{where} has {len(cells)}, not {len(header)}")


def _parquet(path, fields, report):
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        _check_header(path, names, fields)
        yield from parquet_rows(file, path, fields or names, report)


def _tfds(name, split, fields):
    from .tfds import rows

    for i, row in enumerate(rows(name, split)):
        if i == 0:
            _check_header(f"tfds:{name}", list(row), fields)
        yield f"{name}:{split}:{i}", {key: _decoded(value) for key, value in row.items()}


def _parallel(files, report):
    """A row for each line that the files share; several files of one field make a list.

    Raises: ValueError if they differ in their numbers of lines.
    """
    listed = {name: isinstance(x, Sequence) and not isinstance(x, str) for name, x in files.items()}
    paths = {name: expand(x) for name, x in files.items()}
    streams = [lines(path, MAX_LINE) for group in paths.values() for path in group]
    for n, found in enumerate(itertools.zip_longest(*streams), 1):
        if None in found:
            raise ValueError(
                f"{', '.join(str(p) for group in paths.values() for p in group)}: not parallel, some end after "
                f"{n - 1:,} lines and some do not; give files with as many lines each"
            )
        texts = iter([_decoded(line.removesuffix(b"\r")) if line is not None else None for _, line in found])
        first = next(iter(paths.values()))[0]
        row = {name: [next(texts) for _ in group] for name, group in paths.items()}
        yield f"{first}:{n}", {name: x if listed[name] else x[0] for name, x in row.items()}


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}


def _ending(path):
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def _names(raw, rename):
    """{our name: its name in the row} for all fields of a row."""
    ours = {their: our for our, their in rename.items()}
    return {ours.get(their, their): their for their in raw}


def _check_header(path, names, fields):
    for name in fields:
        if name not in names:
            raise ValueError(
                f"{path}: no field {name!r}; it has {', '.join(map(repr, names))}: name one of these, or give "
                f"Records(..., rename={{{name!r}: ...}})"
            )


def _decoded(value):
    if isinstance(value, list):
        return [_decoded(x) for x in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _checked(raw, name):
    """(value, None), or (None, (reason, what is wrong))."""
    if not isinstance(raw, Mapping):
        return None, ("not_an_object", f"is {type(raw).__name__}")
    if name not in raw:
        return None, ("field_missing", f"lacks {name!r}; it has {', '.join(map(repr, raw)) or 'no field'}")
    value = raw[name]
    texts = value if isinstance(value, list | tuple) else [value]
    kinds = str if isinstance(value, list | tuple) else str | int | float
    if not all(isinstance(x, kinds) for x in texts) or not texts:
        held = f"[{', '.join(sorted({type(x).__name__ for x in texts}))}]"
        return None, ("wrong_type", f"holds {held if texts is value else type(value).__name__} in {name!r}")
    if not all(encodable(x) for x in texts if isinstance(x, str)):
        return None, ("invalid_utf8", f"is no UTF-8 in {name!r}")
    return list(value) if isinstance(value, tuple) else value, None
