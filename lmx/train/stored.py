"""One checkpoint on disk: its layout, the checks before it is read, and reading it onto any devices.

`<step>/` holds `state/` (the arrays, Orbax's OCDBT), `meta.json` (step, shapes, metrics, data position) and
`artifact.json` (content hash, sizes, ancestry). Arrays are addressed by path alone, so neither the mesh nor
the number of processes that wrote them matters. Nothing is pickled: names, shapes and numbers are all that
is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lmx import artifact
from lmx.models.transformer import AIDS
from lmx.tree import path_str
from lmx.weights.describe import rebuild

HASHED_BYTES = 4 * 2**30
META = "meta.json"
SPLIT_BYTES = 2**20


def handler() -> ocp.PyTreeCheckpointHandler:
    """Writes and reads arrays. Copies of an array share its writing where each part has SPLIT_BYTES or more.

    (By default Orbax cuts every array, which compiles one slice for each of its shapes.)
    """
    kinds = ocp.type_handlers
    arrays = kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=SPLIT_BYTES)
    registry = kinds.create_type_handler_registry((jax.Array, arrays), (np.ndarray, kinds.NumpyHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def leaves(tree: Any) -> dict[str, Any]:
    """Arrays by path; None and empty nodes have none. Python numbers become numpy arrays.

    Raises: TypeError for a leaf that is neither an array nor a number, or is a typed random key.
    """
    found = {}
    for keys, x in jax.tree_util.tree_leaves_with_path(tree):
        path = path_str(keys)
        x = np.asarray(x) if isinstance(x, bool | int | float) else x
        if not hasattr(x, "shape") or not hasattr(x, "dtype") or x.dtype == object:
            raise TypeError(f"checkpoint: {path} is {x!r}, not an array or a number; put it into meta")
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"checkpoint: {path} is a typed random key; keep its jax.random.key_data in the state"
            )
        found[path] = x
    return found


def nest(found: Mapping[str, Any]) -> dict:
    """{"a/b": x} as {"a": {"b": x}}."""
    root: dict = {}
    for path, x in found.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = x
    return root


def fill(like: Any, found: Mapping[str, Any]) -> Any:
    """`like` with the leaves whose paths are in `found` replaced."""
    return jax.tree_util.tree_map_with_path(lambda keys, x: found.get(path_str(keys), x), like)


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of these paths, each with the sharding of its entry in `wanted`, or as numpy without one."""

    def placed(x: Any) -> ocp.RestoreArgs:
        if getattr(x, "sharding", None) is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

    full = {path: x for path, x in wanted.items() if math.prod(x.shape)}
    empty = {path: x for path, x in wanted.items() if path not in full}
    found = {path: np.zeros(x.shape, x.dtype) for path, x in empty.items()}
    for path, x in empty.items():
        if getattr(x, "sharding", None) is not None:
            found[path] = jax.make_array_from_callback(
                x.shape, x.sharding, lambda index, of=found[path]: of[index]
            )
    if full:
        args = ocp.args.PyTreeRestore(
            item=nest({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in full.items()}),
            restore_args=nest({path: placed(x) for path, x in full.items()}),
            partial_restore=True,
        )
        found |= leaves(handler().restore(folder / "state", args=args))
    return found


def check_same(tree: Mapping[str, tuple], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises: ValueError naming the first paths whose stored (dtype, shape) is not the wanted one."""
    there = {path: f"{dtype}{list(shape)}" for path, (dtype, shape) in tree.items()}
    here = {path: f"{x.dtype}{list(x.shape)}" for path, x in wanted.items()}
    differing = [path for path in {**there, **here} if there.get(path) != here.get(path)]
    if not differing:
        return
    shown = [f"{p} is {there.get(p, 'missing')} there, {here.get(p, 'missing')} here" for p in differing[:4]]
    more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise ValueError(
        f"{folder}: a checkpoint of another shape: {'; '.join(shown)}{more}. Restore it with the "
        "configuration it was trained with, or give this run another folder"
    )


def about(folder: Path) -> dict:
    """The checked content of meta.json: step, meta, metrics, tree {path: (dtype, shape)}, passing.

    Raises: FileNotFoundError, ValueError.
    """
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
        tree = {
            path: (str(jax.numpy.dtype(dtype)), tuple(shape))
            for path, (dtype, shape) in found["tree"].items()
        }
        metrics = {name: float(value) for name, value in found["metrics"].items()}
        made = {"step": int(found["step"]), "meta": dict(found["meta"]), "metrics": metrics, "tree": tree}
        made["passing"] = found.get("passing") is True
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{folder / META}: not the description of a checkpoint ({error})") from None
    for path, (dtype, shape) in tree.items():
        if {"", ".", ".."} & set(path.split("/")) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(
                f"{folder / META}: {path!r} with {dtype}{list(shape)} is not an array of a checkpoint"
            )
    return made


def parameters(about: dict) -> dict[str, tuple[str, tuple]]:
    """The parameters of the model among what a checkpoint holds: their path -> (path in the checkpoint, (dtype,
    shape))."""
    kept = {
        path: entry for path, entry in about["tree"].items() if path.startswith(("trainable/", "frozen/"))
    }
    found = {path.partition("/")[2]: (path, entry) for path, entry in kept.items()}
    return {path: x for path, x in found.items() if path not in AIDS}


def arranged(about: dict, arrays: Mapping[str, Any], folder: Path) -> Any:
    """Parameters by path in the leaves that meta["weights"] describes, or nested where it says nothing.

    Raises: ValueError if one is missing.
    """
    described = about["meta"].get("weights")
    if described is None:
        return nest(arrays)
    described = {name: x for name, x in described.items() if name not in AIDS}
    try:
        return rebuild(described, arrays.__getitem__)
    except KeyError as missing:
        raise ValueError(
            f"{folder} lacks {missing}, as a run does that saves what it trains alone; take its model by "
            "`lmx convert RUN FOLDER`"
        ) from None


def damage(folder: Path, hashed: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None if its files are those recorded when it was committed.

    Args:
      hashed: compare the content hash too, if the files have at most HASHED_BYTES, and not only the sizes.
    """
    if links := [p.name for p in folder.rglob("*") if p.is_symlink()]:
        return f"holds the symbolic link {links[0]}; copy the checkpoint with its files in it"
    try:
        recorded = artifact.read(folder)
        if recorded is None:
            return f"{artifact.FILE} is missing"
        about(folder)
        expected, found = dict(recorded.facts["files"]), sizes(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            return f"{name} has {found.get(name, 'no')} bytes, {expected.get(name, 'none')} were recorded"
    if hashed and sum(found.values()) <= HASHED_BYTES and artifact.hash_path(folder) != recorded.hash:
        return f"its content differs from the recorded hash {recorded.hash[:12]}"
    return None


def seal(folder: Path, text: str, at: Path, made_from: tuple[artifact.Artifact, ...]) -> None:
    """Adds meta.json and artifact.json to a folder of written arrays, and forces all of it to the disk."""
    (folder / META).write_text(text, encoding="utf-8")
    files = sizes(folder)
    facts = {"step": int(at.name), "bytes": sum(files.values()), "files": files}
    artifact.record(folder, "checkpoint", made_from, facts, at=at)
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def parent(folder: Path) -> artifact.Artifact:
    """A checkpoint as the origin of later ones, without its own ancestry, which would grow at each resume."""
    found = artifact.read(folder)
    return replace(found, made_from=(), facts={"step": found.facts["step"]})


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by relative name, without its artifact file."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(artifact.FILE))
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(files)}


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
