"""GGUF files, written: metadata, and one tensor at a time.

    layout = {"blk.0.attn_q.weight": ((64, 64), "F16"), "output_norm.weight": ((64,), "F32")}
    write("model.gguf", {"general.architecture": "llama", ...}, layout, ((name, array) for ...))
    gguf.read("model.gguf")

Source: ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmx.formats.gguf import ARRAY, BLOCKS, MAX_DIMS, SCALARS, STRING, TYPES
from lmx.formats.gguf_blocks import quantize

VERSION, ALIGNMENT = 3, 32
NUMBERS = {kind: number for number, kind in TYPES.items()}
KINDS = {dtype.str[1:]: number for number, dtype in SCALARS.items()}
"""Of metadata: numpy's name of a type -> its number in the file."""
Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Name of a tensor -> its shape in numpy's order, and its type."""


def write(
    path: str | Path,
    metadata: Mapping[str, Any],
    layout: Layout,
    tensors: Iterable[tuple[str, np.ndarray]],
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes beside `path`, which takes its place when all is there; holds one tensor, and its bytes, in memory.

    Args:
      metadata: text, numbers, true or false, and lists of one of these, by their key. A float is stored as float32,
        a whole number in 32 bits where they suffice: what llama.cpp reads.
      tensors: (name, array) in the order of the layout; the arrays are rounded to its types by `quantize`.
      importance: name -> what `quantize` weighs that tensor's errors with.
    Raises: ValueError for metadata and tensors that the format lacks or the layout has not, by name; OSError.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with part.open("xb") as file:
            file.write(_padded(_header(metadata, layout)))
            for name, array in _in_order(layout, tensors):
                file.write(_padded(_bytes(name, array, layout[name], (importance or {}).get(name))))
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _header(metadata: Mapping[str, Any], layout: Layout) -> bytes:
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("metadata lack general.architecture, the name of an architecture")
    keys = [_string(key) + _value(key, value) for key, value in metadata.items()]
    infos, offset = [], 0
    for name, (shape, kind) in layout.items():
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name}: {kind!r:.99} is no type of tensor; use {', '.join(BLOCKS)}")
        n_values, n_bytes = BLOCKS[kind]
        if not 0 < len(shape) <= MAX_DIMS or min(shape) < 1 or shape[-1] % n_values:
            raise ValueError(
                f"tensor {name}: {kind} with shape {shape}; rows are whole blocks of {n_values} values"
            )
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(_string(name) + dims + struct.pack("<IQ", NUMBERS[kind], offset))
        size = math.prod(shape) // n_values * n_bytes
        offset += size + -size % ALIGNMENT
    counts = struct.pack("<IQQ", VERSION, len(infos), len(keys))
    return b"".join([b"GGUF", counts, *keys, *infos])


def _in_order(layout: Layout, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    left = iter(layout)
    for name, array in tensors:
        wanted = next(left, None)
        if name != wanted:
            raise ValueError(f"tensor {name} came where the layout has {wanted or 'no more'}")
        yield name, array
    missing = next(left, None)
    if missing:
        raise ValueError(f"tensor {missing} of the layout is missing")


def _bytes(name, array, place, importance):
    shape, kind = place
    if array.shape != shape:
        raise ValueError(f"tensor {name} has shape {array.shape}, and {shape} in the layout")
    try:
        return quantize(array, kind, importance).tobytes()
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from None


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """The type and the bytes of a value."""
    values = value if isinstance(value, list) else [value]
    found = {type(x) for x in values}
    if found <= {str}:
        number, raw = STRING, b"".join(map(_string, values))
    elif found in ({bool}, {float}, {int}):
        name = {bool: "b1", float: "f4"}.get(*found) or _width(key, values, isinstance(value, list))
        number, raw = KINDS[name], np.array(values, name).tobytes()
    else:
        raise ValueError(
            f"metadata: {key}={value!r:.99} is neither text nor numbers, nor a list of one of these"
        )
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, number, len(values)) + raw
    return struct.pack("<I", number) + raw


def _width(key, values, listed):
    """llama.cpp reads a whole number as uint32, and those of a list as int32."""
    for name in ("i4", "u4", "i8", "u8") if listed else ("u4", "i4", "u8", "i8"):
        limits = np.iinfo(name)
        if limits.min <= min(values) and max(values) <= limits.max:
            return name
    raise ValueError(f"metadata: {key}={values!r:.99} has more than 64 bits")
