"""Files as bounded pieces: compressed or not, a text file of any size takes about a megabyte of memory."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lmx import artifact
from lmx.text.graphemes import clusters, split_complete

from .tally import Report

BLOCK = 1 << 20
SETTLED_SECONDS = 2.0
_hashes: dict[str, str] = {}


def expand(path: str | Sequence[str]) -> tuple[Path, ...]:
    """The files that paths and patterns (`*`, `?`, `[...]`, `**`) stand for, sorted within each pattern; a file
    that is named again, by whatever path, comes once.

    Raises: FileNotFoundError naming what is near, ValueError for a folder or a pipe.
    """
    found: dict[Path, Path] = {}
    for one in (path,) if isinstance(path, str | os.PathLike) else path:
        for file in _matches(str(one)):
            found.setdefault(file.resolve(), file)
    return tuple(found.values())


def blocks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its ending (.gz, .zst), at most 1 MiB at a time where the format
    allows.

    begin, end: the part to read, in bytes; only of a file that is not compressed.
    Raises: ValueError that names the file when its compressed data are damaged or end too early.
    """
    read = 0
    reader = {".gz": _gzip_blocks, ".zst": _zstd_blocks}.get(path.suffix)
    try:
        for block in reader(path) if reader else _plain_blocks(path, begin, end):
            read += len(block)
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as error:
        raise ValueError(
            f"{path}: damaged {path.suffix} file, readable for {read:,} bytes of text ({error}); "
            "fetch or compress it again"
        ) from None


def lines(path: Path, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes without line end) of each line; None for a line longer than `limit` bytes, which
    is passed over without being held."""
    number, held, size = 1, [], 0
    for block in _text_bytes(path, 0, None):
        *whole, tail = block.split(b"\n")
        for piece in whole:
            yield number, b"".join([*held, piece]) if size + len(piece) <= limit else None
            number, held, size = number + 1, [], 0
        size += len(tail)
        held = [*held, tail] if size <= limit else []
    if size:
        yield number, b"".join(held) if size <= limit else None


def text_blocks(
    path: Path, report: Report, span: tuple[float, float] = (0.0, 1.0)
) -> Iterator[tuple[int, str]]:
    """(line number, text) stretches of a UTF-8 file, about 1 MiB each, whole lines where lines are shorter
    than that.

    Line ends of any kind become "\\n"; a byte order mark is dropped. A line that is not UTF-8 is left out and
    counted; of one longer than a block, what was given before stays, as a line that ends there.
    Raises: ValueError if the file is binary, is UTF-16, or is damaged.
    """
    begin, end = _span_bytes(path, span)
    endings: set[str] = set()
    place = _place(path, begin) if begin else (1, 0)
    stretches = _stretches(_lf_blocks(_text_bytes(path, begin, end), endings))
    yield from _decoded(str(path), stretches, place, report)
    if len(endings) > 1:
        report.note("mixed_line_endings", f"{path} has {' and '.join(sorted(endings))}; all read as LF")


def pieces(stretches: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most about a million characters, cut where tokenizers cut: at line ends,
    else before a space, else between whole graphemes."""
    held = ""
    for stretch in stretches:
        held += stretch
        at = 0
        while len(held) - at > BLOCK:
            cut = _good_cut(held, at + BLOCK)
            yield held[at:cut]
            at = cut
        held = held[at:]
    if held:
        yield held


def _good_cut(text, limit):
    """The last good place to cut text[:limit], at most half a block before limit."""
    half = BLOCK // 2
    for pattern in (r"\n(?=\S)", r"(?<=\S)(?= \S)"):
        for window in (min(4096, half), half):
            start = limit - window
            found = [m.end() for m in re.finditer(pattern, text[start : limit + 2]) if 0 < m.end() <= window]
            if found:
                return start + found[-1]
    start = limit - min(1024, half)
    whole = len(split_complete(text[start:limit])[0])
    return start + whole if whole else limit


def refuse_binary(path: Path, block: bytes) -> None:
    """Raises: ValueError if the start of a file is not text: UTF-16 or 32, NUL bytes, or mostly control
    characters."""
    head = block[: 1 << 16]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"{path}: text in UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    if not head:
        return
    nul = head.count(0) / len(head)
    control = len(head.translate(None, _PRINTABLE)) / len(head)
    if nul > 0.001 or control > 0.1:
        raise ValueError(
            f"{path}: a binary file, not text ({nul:.1%} NUL bytes, {control:.1%} control characters in its "
            f"first {len(head):,} bytes); leave it out of the sources, or name its format by its ending"
        )


def hash_of(path: Path) -> str:
    """sha256 of a file or folder, remembered by the path, inode, size and times of each file. That of a file
    changed in the last two seconds is not: a clock that coarse would give the next change the same time."""
    key, changed = _state(path)
    settled = time.time() - changed > SETTLED_SECONDS
    found = _hashes.get(key) or artifact.hash_path(path)
    if settled:
        _hashes[key] = found
    return found


def load_hashes(path: Path) -> None:
    """Takes over hashes remembered by an earlier process; a missing or damaged file is as good as an empty
    one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(found, dict):
        _hashes.update({k: v for k, v in found.items() if isinstance(v, str)})


def save_hashes(path: Path) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    partial.write_text(json.dumps(_hashes), encoding="utf-8")
    os.replace(partial, path)


class _Damaged(Exception):
    pass


def _matches(name):
    """The files that one path or pattern stands for, sorted."""
    path = Path(name)
    if path.is_dir():
        raise ValueError(
            f"{name} is a folder; name its files with a pattern such as {name.rstrip('/')}/*.txt"
        )
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(
            f"{name} is a pipe or a device, but a source is read more than once; write it to a file first"
        )
    matches = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
    if not matches:
        near = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{name}: no such file; {path.parent} holds {', '.join(near) or 'nothing'}")
    return matches


_PRINTABLE = bytes(sorted({7, 8, 9, 10, 12, 13, 27, *range(32, 256)} - {127}))


def _plain_blocks(path, begin, end):
    with path.open("rb") as f:
        f.seek(begin)
        left = path.stat().st_size - begin if end is None else end - begin
        while left > 0 and (block := f.read(min(BLOCK, left))):
            left -= len(block)
            yield block


def _gzip_blocks(path):
    with gzip.open(path, "rb") as f:
        while block := f.read(BLOCK):
            yield block


def _zstd_blocks(path):
    import zstandard

    try:
        with path.open("rb") as f:
            reader = None
            while data := f.read(1 << 14):
                while data:
                    reader = reader or zstandard.ZstdDecompressor().decompressobj()
                    yield reader.decompress(data)
                    data = reader.unused_data if reader.eof else b""
                    if reader.eof:
                        reader = None
            if reader is not None:
                raise _Damaged("the file ends in the middle of a frame")
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from None


def _text_bytes(path, begin, end):
    """The blocks of a file that is text, without its byte order mark."""
    first = True
    for block in blocks(path, begin, end):
        if first and block:
            refuse_binary(path, block)
            first = False
            block = block if begin else block.removeprefix(codecs.BOM_UTF8)
        yield block


def _lf_blocks(blocks, endings):
    """The blocks with every line end as LF; adds the kinds it saw to `endings`."""
    carriage = b""
    for block in blocks:
        block = carriage + block
        carriage = b"\r" if block.endswith(b"\r") else b""
        yield _newlines(block.removesuffix(carriage), endings)
    if carriage:
        yield _newlines(carriage, endings)


def _newlines(block, endings):
    """A block that does not end within CR LF, with every line end as LF."""
    if b"\r" not in block:
        if b"\n" in block:
            endings.add("LF")
        return block
    crlf, lf = block.count(b"\r\n"), block.count(b"\n")
    endings.update(
        kind for kind, n in (("CRLF", crlf), ("LF", lf - crlf), ("CR", block.count(b"\r") - crlf)) if n
    )
    return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _place(path, begin):
    """(line number, bytes of that line) before a byte of the file."""
    number, column = 1, 0
    for block in _lf_blocks(_text_bytes(path, 0, begin), set()):
        number += block.count(b"\n")
        column = _column(block, column)
    return number, column


def _column(data, column):
    """How many bytes of its last line have been read after `data`, `column` before it."""
    return len(data) - 1 - data.rfind(b"\n") if b"\n" in data else column + len(data)


def _stretches(blocks):
    """The same bytes cut after line ends, but within a line, between characters, where it fills a block."""
    rest = b""
    for block in blocks:
        rest += block
        cut = rest.rfind(b"\n") + 1
        if not cut and len(rest) >= BLOCK:
            cut = _character_start(rest, len(rest) - 4)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _decoded(name, stretches, place, report):
    """(line number, text) of the stretches, without the lines that are not UTF-8.

    place: the line number and the bytes of that line before the first stretch.
    """
    number, column = place
    flaw, lost, begun = "", 0, False
    for data in stretches:
        for line in data.splitlines(keepends=True) if flaw or _flaw(data) else [data]:
            ends = line.endswith(b"\n")
            flaw = flaw or _flaw(line, column)
            if not flaw:
                yield number, line.decode("utf-8")
                begun = not ends
            else:
                lost += len(line)
                if ends:
                    report.skip("invalid_utf8", f"{name}:{number} ({flaw}; {lost:,} bytes left out)")
                    if begun:
                        yield number, "\n"
                    flaw, lost, begun = "", 0, False
            number, column = number + line.count(b"\n"), _column(line, column)
    if flaw:
        report.skip("invalid_utf8", f"{name}:{number} ({flaw}; {lost:,} bytes left out)")


def _flaw(data, column=0):
    """Why bytes that follow `column` others of their line are not UTF-8; "" if they are."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"{error.reason}, byte {column + error.start:,} of the line"
    return ""


def _character_start(data, at):
    """The last index <= at where a UTF-8 character starts; `at` if none of the four last is such."""
    return next((i for i in range(at, max(at - 4, 0), -1) if data[i] & 0xC0 != 0x80), at)


def _span_bytes(path, span):
    low, high = span
    if (low, high) == (0.0, 1.0):
        return 0, None
    if path.suffix in (".gz", ".zst"):
        raise ValueError(f"{path}: span={span} needs a file that is not compressed; decompress it first")
    size = path.stat().st_size
    with path.open("rb") as f:
        return tuple(_aligned(f, int(share * size), size) for share in span)


def _aligned(f, at, size):
    """The first place >= at between two whole graphemes: never inside a character or a Devanagari
    syllable."""
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    start = max(0, at - 256)
    f.seek(start)
    window = f.read(512)
    skip = 0
    while skip < len(window) and start and window[skip] & 0xC0 == 0x80:
        skip += 1
    place = start + skip
    for cluster in clusters(window[skip:].decode("utf-8", "ignore")):
        if place >= at:
            return place
        place += len(cluster.encode("utf-8"))
    return place


def _state(path):
    """(a name for what the file system says of a file or folder, when that last changed)."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.resolve()), p.stat()) for p in files]
    facts = [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
    changed = max((s.st_ctime for _, s in stats), default=0.0)
    return hashlib.sha256(repr(facts).encode()).hexdigest(), changed
