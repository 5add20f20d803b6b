"""GGUF, the container of llama.cpp: metadata and tensors, plain or in blocks of a few bits.

    model = gguf.read("SmolLM2.gguf")
    model.architecture, model.metadata["llama.context_length"]
    model.tensors["blk.0.attn_q.weight"].read(slice(0, 64))

A file is "GGUF", version, counts; (key, type, value) for the metadata; (name, dimensions from the innermost,
type, offset) for the tensors; their bytes. The header is read here rather than by the `gguf` package, whose
reader takes seconds for a vocabulary and trusts every length; the package's formulas unpack the blocks.
Source: ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmx.formats.tensor import Tensor, block_rows, reader

BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "BF16": (1, 2),
}
"""Type of tensor -> (values, bytes) of a block."""
TYPES = dict(zip((0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30), BLOCKS))
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
SCALARS = {
    number: np.dtype(name)
    for number, name in zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "u1 i1 <u2 <i2 <u4 <i4 <f4 ? <u8 <i8 <f8".split()
    )
}
"""Of metadata: number in the file -> type."""
STRING, ARRAY = 8, 9
MAX_DIMS = 4
CHUNK = 1 << 18


@dataclass(frozen=True)
class Gguf:
    """metadata: plain Python values by their key; an array is a list. tensors: by name, in the file's order."""

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | Path) -> Gguf:
    """The metadata and tensors of a GGUF file, version 2 or 3, little-endian.

    A quantised tensor reads as float32, any other as it is stored. The shape is in numpy's order, the reverse
    of the file's: [d_out, d_in] for a projection.
    Every length is checked against the file's size before memory is taken; metadata as Python values take up
    to about twenty times their bytes.
    Raises: FileNotFoundError; ValueError for a file that is damaged, split, or holds other types of tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .gguf file")
    bytes_of = reader(path)
    with path.open("rb") as file:
        header = _Header(path, file)
        n_tensors, n_keys = _counts(header)
        metadata = _metadata(header, n_keys)
        infos = _infos(header, n_tensors)
        start = _start_of_data(header, infos, metadata.get("general.alignment", 32))
        architecture = _architecture(header, metadata)
    tensors = {}
    for name, shape, kind, offset in infos:
        dtype = PLAIN.get(kind, np.dtype(np.float32))
        rows = block_rows(bytes_of, start + offset, shape, BLOCKS[kind], decoder(kind))
        tensors[name] = Tensor(name, shape, dtype, kind, rows)
    return Gguf(architecture, metadata, tensors)


class _Header:
    """A file read from its start; nothing is taken beyond its end."""

    def __init__(self, path, file):
        self.path, self.file = path, file
        self.at, self.size = 0, path.stat().st_size

    def take(self, n, what):
        self.expect(n, what)
        self.at += n
        return self.file.read(n)

    def expect(self, n, what):
        left = self.size - self.at
        if n > left:
            self.refuse(f"{what}, at byte {self.at:,}, needs {n:,} bytes more, but {left:,} are left")

    def u32(self, what):
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what):
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what):
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.refuse(f"{what} that ends at byte {self.at:,} is not UTF-8 ({error.reason})")

    def values(self, kind, n, what):
        """n values of one type, as a list."""
        if kind == STRING:
            self.expect(8 * n, what)
            return [self.string(what) for _ in range(n)]
        if kind not in SCALARS:
            self.refuse(f"{what} is {'an array of arrays' if kind == ARRAY else f'of unknown type {kind}'}")
        return np.frombuffer(self.take(n * SCALARS[kind].itemsize, what), SCALARS[kind]).tolist()

    def refuse(self, problem):
        raise ValueError(f"{self.path}: {problem}; {_AGAIN}")


_AGAIN = "fetch the file again, or convert it with llama.cpp's convert_hf_to_gguf.py"


def _counts(header):
    magic = header.take(4, "the magic")
    if magic != b"GGUF":
        header.refuse(f"begins with {magic!r}, not with b'GGUF'")
    version = header.u32("the version")
    if version not in (2, 3):
        if version.to_bytes(4, "little")[:2] == b"\0\0":
            header.refuse("is big-endian, for other machines")
        header.refuse(f"is GGUF version {version}, not 2 or 3")
    return header.u64("the number of tensors"), header.u64("the number of keys")


def _metadata(header, n):
    found = {}
    for _ in range(n):
        key = header.string("a key")
        if key in found:
            header.refuse(f"the key {key!r:.99} comes twice")
        what, kind = f"the value of {key!r:.99}", header.u32("a type")
        if kind == ARRAY:
            kind = header.u32(what)
            found[key] = header.values(kind, header.u64(what), what)
        else:
            (found[key],) = header.values(kind, 1, what)
    return found


def _infos(header, n):
    """(name, shape, type, offset) of each tensor."""
    found = {}
    for _ in range(n):
        name = header.string("a tensor's name")
        what = f"tensor {name!r:.99}"
        n_dims = header.u32(what)
        if n_dims > MAX_DIMS:
            header.refuse(f"{what} has {n_dims:,} dimensions, more than {MAX_DIMS}")
        shape = tuple(header.u64(what) for _ in range(n_dims))[::-1]
        kind, offset = header.u32(what), header.u64(what)
        if name in found:
            header.refuse(f"{what} comes twice")
        if 0 in shape:
            header.refuse(f"{what} has shape {shape}, with nothing in it")
        if kind not in TYPES:
            raise ValueError(
                f"{header.path}: {what} is of type number {kind}, which is none of {', '.join(BLOCKS)}; make "
                "such a file with `llama-quantize --allow-requantize in.gguf out.gguf Q8_0`"
            )
        if (shape or (1,))[-1] % BLOCKS[TYPES[kind]][0]:
            header.refuse(f"{what} is {TYPES[kind]} with shape {shape}: its rows are no whole blocks")
        found[name] = (name, shape, TYPES[kind], offset)
    return list(found.values())


def _start_of_data(header, infos, alignment):
    """Where the bytes of the tensors begin; each tensor has its own, and all lie within the file."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        header.refuse(f"general.alignment is {alignment!r:.99}, not a power of two")
    start = end = header.at + -header.at % alignment
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        n_values, n_bytes = BLOCKS[kind]
        size = math.prod(shape) // n_values * n_bytes
        what = f"tensor {name!r:.99} of {size:,} bytes at offset {offset:,}"
        if offset % alignment:
            header.refuse(f"{what} is not aligned to {alignment:,} bytes")
        if start + offset < end:
            header.refuse(f"{what} overlaps the one before it, which ends at {end - start:,}")
        end = start + offset + size
        if end > header.size:
            header.refuse(f"{what} ends {end - header.size:,} bytes after the end of the file")
    return start


def _architecture(header, metadata):
    found = metadata.get("general.architecture")
    if not isinstance(found, str):
        header.refuse(f"general.architecture is {found!r:.99}, not a name")
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ValueError(
            f"{header.path} is one of {parts!r:.99} parts; join them with `llama-gguf-split --merge first.gguf "
            "whole.gguf`"
        )
    return found


def decoder(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes numbers of the bytes of whole blocks, both [n]."""
    if kind in PLAIN:
        return methodcaller("view", PLAIN[kind])
    return lambda raw: _dequantized(raw, kind)


def _dequantized(raw, kind):
    """In pieces, as the formulas take several times the memory of what they give."""
    from gguf import GGMLQuantizationType, dequantize

    n_values, n_bytes = BLOCKS[kind]
    n_blocks, step = len(raw) // n_bytes, CHUNK // n_values
    values = np.empty((n_blocks, n_values), np.float32)
    for i in range(0, n_blocks, step):
        piece = dequantize(raw[i * n_bytes : (i + step) * n_bytes], GGMLQuantizationType[kind])
        values[i : i + step] = piece.reshape(-1, n_values)
    return values.reshape(-1)
