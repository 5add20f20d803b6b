"""safetensors, one file or many: read tensor by tensor, written one shard at a time.

    tensors = safetensors.read("model")
    tensors["model.norm.weight"].read()
    safetensors.write("copy", ((name, tensor.read()) for name, tensor in tensors.items()))

The header is read and checked by the library of that name; the bytes behind it are read here, as the library
gives numpy no 8-bit floats.
Source: https://github.com/huggingface/safetensors, README, "Format"; the index file as transformers writes it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from operator import methodcaller
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lmx.formats.tensor import Tensor, block_rows, reader

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_KINDS = {
    "BOOL": np.bool_,
    **{f"{kind.upper()}{8 * n}": f"{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8)},
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
DTYPES = {name: np.dtype(kind) for name, kind in _KINDS.items()}
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with model.safetensors or its shards and their index.

    Raises: FileNotFoundError for a file or shard that is missing; ValueError for a damaged file, a type that
      numpy has no name for, an index that its shards do not bear out, and for pickles, which are not opened.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLES:
        raise ValueError(_refused([path]))
    return _read_file(path)


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """Writes (name, array) pairs as model.safetensors, or as shards and their index; returns the files.

    Holds one shard in memory, and the array that no longer fits into it. What the folder held before stays
    until all is written, so the arrays may come from there; a process that is killed leaves the old weights,
    the new ones, or a folder that `read` refuses, and perhaps a folder `.unfinished-*` to remove.
    Args:
      max_shard_bytes: of the arrays of one file; a larger array gets a file of its own.
      metadata: of each file; {"format": "pt"} if not given, which transformers looks for.
    Raises: ValueError for a name that comes twice, a type that the format lacks, or no arrays; OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
        shards, sizes = [], {}
        for shard in _shards(tensors, max_shard_bytes):
            shards.append(Path(unfinished, f"{len(shards)}"))
            _save(shards[-1], shard, metadata)
            sizes |= {name: (len(shards), array.nbytes) for name, array in shard.items()}
        if not shards:
            raise ValueError(f"{folder}: no arrays to write")
        if len(shards) == 1:
            names = [WHOLE]
        else:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
            shards.append(Path(unfinished, INDEX))
            index = {
                "metadata": {"total_size": sum(n_bytes for _, n_bytes in sizes.values())},
                "weight_map": {name: names[at - 1] for name, (at, _) in sizes.items()},
            }
            shards[-1].write_text(json.dumps(index, ensure_ascii=False, indent=2), "utf-8")
            names.append(INDEX)
            for head in (WHOLE, INDEX):  # until the new index is there, the folder is no model
                (folder / head).unlink(missing_ok=True)
        for made, name in zip(shards, names):
            os.replace(made, folder / name)
    for old in (folder / INDEX, *folder.glob("model-?????-of-?????.safetensors")):
        if old.name not in names:
            old.unlink(missing_ok=True)
    return [folder / name for name in names]


def write_file(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file, whole or not at all. Raises: as `write`."""
    path = Path(path)
    part = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        for shard in _shards(arrays.items(), math.inf):
            _save(part, shard, {"format": "pt"})
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _read_file(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .safetensors file or the folder that holds it")
    bytes_of = reader(path)
    try:
        with safe_open(path, "np") as file:
            pieces = [(name, file.get_slice(name)) for name in file.offset_keys()]
            found = [(name, piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces]
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error!s:.200}); fetch it again") from None
    tensors = {}
    at = 8 + int(bytes_of(0, 8).view("<u8")[0])
    for name, kind, shape in found:
        if kind not in DTYPES:
            raise ValueError(
                f"{path}: {name!r:.99} is stored as {kind}; convert it to one of {', '.join(DTYPES)}"
            )
        dtype = DTYPES[kind]
        rows = block_rows(bytes_of, at, shape, (1, dtype.itemsize), methodcaller("view", dtype))
        tensors[name] = Tensor(name, shape, dtype, kind, rows)
        at += math.prod(shape) * dtype.itemsize
    return tensors


def _read_folder(folder):
    if (folder / INDEX).is_file():
        return _read_shards(folder, _weight_map(folder / INDEX))
    if (folder / WHOLE).is_file():
        return _read_file(folder / WHOLE)
    names = sorted(path.name for path in folder.iterdir())
    pickles = [folder / name for name in names if Path(name).suffix in PICKLES]
    if pickles:
        raise ValueError(_refused(pickles))
    raise FileNotFoundError(
        f"{folder} holds neither {WHOLE} nor {INDEX}, but {', '.join(names[:8]) or 'nothing'}; give another "
        "folder, or one .safetensors file"
    )


def _read_shards(folder, weight_map):
    shards = sorted({*weight_map.values()})
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing[:8])}, {len(missing)} of the {len(shards)} shards in {INDEX}; "
            "fetch them"
        )
    if (folder / WHOLE).is_file() and WHOLE not in shards:
        raise ValueError(f"{folder} holds {WHOLE} and an {INDEX} for other files; remove what is not meant")
    tensors = {}
    for shard in shards:
        held = _read_file(folder / shard)
        listed = {name for name, at in weight_map.items() if at == shard}
        for names, what in ((listed - held.keys(), "lacks"), (held.keys() - listed, "also holds")):
            if names:
                raise ValueError(
                    f"{folder / shard} {what} {min(names)!r:.99} ({len(names)} such), other than {INDEX} says; "
                    "fetch both again"
                )
        tensors |= held
    return {name: tensors[name] for name in weight_map}


def _weight_map(path):
    """Tensor name -> file name, as an index says; each is the name of a file beside it."""
    try:
        weight_map = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no index of shards, a JSON object with 'weight_map' ({type(error).__name__}: "
            f"{error!s:.99}); fetch it again"
        ) from None
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise ValueError(
                f"{path} places {name!r:.99} in {shard!r:.99}, no .safetensors file beside it; "
                "do not use this index"
            )
    return weight_map


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r:.99} comes twice")
    return found


def _refused(pickles):
    return (
        f"{pickles[0]} is a pickle, which runs any program it holds when it is opened, so it is not; fetch the "
        "weights as .safetensors, or, if you trust it, convert it: "
        "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


def _shards(tensors, max_bytes):
    """Dicts of arrays, each of at most `max_bytes` unless one array alone is larger."""
    seen, shard, size = set(), {}, 0
    for name, array in tensors:
        # The library writes the memory behind an array as if it were in C order. Unlike ascontiguousarray,
        # this leaves a scalar a scalar.
        array = np.asarray(array, order="C")
        if name in seen or name == "__metadata__":
            raise ValueError(f"tensor {name!r:.99} {'comes twice' if name in seen else 'is a reserved name'}")
        if array.dtype.newbyteorder("=") not in DTYPES.values():
            raise ValueError(
                f"tensor {name!r:.99}: safetensors has no type for {array.dtype}; cast it, for example to float32"
            )
        if shard and size + array.nbytes > max_bytes:
            yield shard
            shard.clear()
            size = 0
        seen.add(name)
        shard[name] = array
        size += array.nbytes
    if shard:
        yield shard


def _save(path, shard, metadata):
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(shard, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)  # the library would leave it to its owner alone
