"""Files as bounded pieces: compressed or not, a text file of any size takes about a megabyte of memory."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lmx import artifact
from lmx.text.graphemes import clusters, split_complete

from .tally import Report

BLOCK = 1 << 20
_hashes: dict[str, str] = {}


def expand(path: str | Sequence[str]) -> tuple[Path, ...]:
    """The files that paths and patterns (`*`, `?`, `[...]`, `**`) stand for, sorted within each pattern.

    Raises: FileNotFoundError naming what is near, ValueError for a folder.
    """
    found: list[Path] = []
    for one in (path,) if isinstance(path, str | os.PathLike) else path:
        name = str(one)
        if Path(name).is_dir():
            raise ValueError(
                f"{name} is a folder; name its files with a pattern such as {name.rstrip('/')}/*.txt"
            )
        if Path(name).exists():
            found.append(Path(name))
            continue
        matches = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not matches:
            folder = Path(name).parent
            near = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
            hint = f"; {folder} holds {', '.join(near)}" if near else f"; {folder} holds nothing"
            raise FileNotFoundError(f"{name}: no such file{hint}")
        found += matches
    return tuple(found)


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
    counted.
    Raises: ValueError if the file is binary, is UTF-16, or is damaged.
    """
    name = str(path)
    begin, end = _span_bytes(path, span)
    number, rest, carriage = 1, b"", False
    endings: set[str] = set()
    for block in _text_bytes(path, begin, end):
        if carriage:
            block = b"\r" + block
        carriage = block.endswith(b"\r")
        block = block[:-1] if carriage else block
        rest += _newlines(block, endings)
        cut = rest.rfind(b"\n") + 1
        if not cut and len(rest) >= BLOCK:
            cut = _character_start(rest, len(rest) - 4)
        if cut:
            yield from _decoded(name, number, rest[:cut], report)
            number += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
    if carriage:
        rest += _newlines(b"\r", endings)
    if rest:
        yield from _decoded(name, number, rest, report)
    if len(endings) > 1:
        report.note("mixed_line_endings", f"{name} has {' and '.join(sorted(endings))}; all read as LF")


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
    """sha256 of a file or folder; remembered by (path, size, modification time)."""
    key = _hash_key(path)
    if key not in _hashes:
        _hashes[key] = artifact.hash_path(path)
    return _hashes[key]


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


def _newlines(block, endings):
    """A block that does not end within CR LF, with every line end as LF; adds the kinds it saw to
    `endings`."""
    if b"\r" not in block:
        if b"\n" in block:
            endings.add("LF")
        return block
    crlf, lf = block.count(b"\r\n"), block.count(b"\n")
    endings.update(
        kind for kind, n in (("CRLF", crlf), ("LF", lf - crlf), ("CR", block.count(b"\r") - crlf)) if n
    )
    return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _decoded(name, number, data, report):
    try:
        yield number, data.decode("utf-8")
        return
    except UnicodeDecodeError:
        pass
    good, start = [], number
    for i, line in enumerate(data.splitlines(keepends=True), number):
        try:
            good.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            report.skip("invalid_utf8", f"{name}:{i} ({error.reason}, byte {error.start} of the line)")
            if good:
                yield start, "".join(good)
            good, start = [], i + 1
    if good:
        yield start, "".join(good)


def _character_start(data, at):
    """The last index <= at where a UTF-8 character starts."""
    while at > 0 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


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


def _hash_key(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
