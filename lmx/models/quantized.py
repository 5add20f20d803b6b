"""The `quantization_config` of a Hugging Face folder, and its matrices in codes <-> stacks of `Quantized`.

    said = read(config_json, folder, ...)            what the config says; None where nothing is quantized
    schemes = said.schemes(entries, shapes, names)   the `Scheme` of each matrix in codes, by its name
    load(entries, shapes, schemes, tensors)          ours by path, and back: section(...) and dump(...)

Two layouts: "compressed-tensors", which vLLM and transformers read bit for bit, and "gptq".
Source: vllm-project/compressed-tensors 0.20, quantization/quant_config.py; ModelCloud/GPTQModel 7.6, QuantizeConfig.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import regex

from lmx import tree
from lmx.formats import Tensor, Wanted, codes
from lmx.formats.codes import DENSE, Scheme
from lmx.models import weight_map
from lmx.models.families import Fields
from lmx.models.weight_map import Entry
from lmx.weights import Quantized, Weight

LAYOUTS = ("compressed-tensors", "gptq")
SECTIONS = ("quantization_config", "compression_config")
"""The field of a config.json, and its older name."""
SECTION = SECTIONS[0]
BESIDE = "quantize_config.json"
"""The file that older GPTQ folders have instead."""
NOT_LINEAR = ("embed", "position_table")
AS_THEY_ARE = "take input_activations out of config.json to compute with inputs as they are"
SECONDS = 1.0
"""For matching one name to a pattern of a config, which may be slow on purpose."""


@dataclass(frozen=True)
class Found:
    """What a quantization_config says. groups: (targets, scheme), where the first that fits a layer counts."""

    method: str
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]
    where: str

    def schemes(self, entries: Iterable[Entry], shapes: Any, names: Container[str]) -> dict[str, Scheme]:
        """Name of a weight, as if it were not quantized -> how it is.

        GPTQ says so by the tensors there are, compressed-tensors by its patterns.
        """
        ours, found = tree.nodes(shapes, Weight), {}
        for entry in entries:
            if not _is_matrix(entry):
                continue
            for name in entry.names(ours[entry.ours].shape):
                layer = name.removesuffix(".weight")
                if self.method == "gptq":
                    if f"{layer}.qweight" in names:
                        found[name] = self.groups[0][1]
                elif entry.turned and not any(self._fits(layer, pattern) for pattern in self.ignore):
                    fit = (s for targets, s in self.groups if any(self._fits(layer, t) for t in targets))
                    if scheme := next(fit, None):
                        found[name] = scheme
        return found

    def _fits(self, layer: str, target: str) -> bool:
        if not target.startswith("re:"):
            return target in (layer, "Linear")
        try:
            return regex.match(target[3:], layer, timeout=SECONDS) is not None
        except (regex.error, TimeoutError) as error:
            raise ValueError(
                f"{self.where}: {target!r:.99} is no pattern for a name ({error!s:.99})"
            ) from None


def read(found: dict[str, Any], folder: Path, read_object: Callable[[Path], dict]) -> Found | None:
    """What a folder says of its codes; the field is taken out of `found`, its config.json.

    Raises: ValueError for another method, and for what lmx cannot represent, by name.
    """
    said, where = [found.pop(name, None) for name in SECTIONS], folder / "config.json"
    section = said[0] or said[1]
    if section is None and (folder / BESIDE).is_file():
        section, where = read_object(folder / BESIDE), folder / BESIDE
    if section is None:
        return None
    if not isinstance(section, dict):
        raise ValueError(f"{where}: {SECTION} is {section!r:.99}, not an object")
    method = (
        section.get("quant_method") or section.get("method") or ("gptq" if where.name == BESIDE else None)
    )
    if method not in LAYOUTS:
        raise ValueError(
            f"{where}: quant_method={method!r:.99}; lmx reads {' and '.join(LAYOUTS)}: fetch the model in one of "
            "them, or as it was before it was quantized"
        )
    where = f"{where}: {SECTION}" if where.name != BESIDE else str(where)
    read_section = _of_gptq if method == "gptq" else _of_compressed_tensors
    return read_section(Fields(section, where))


def wanted(
    entries: Iterable[Entry], shapes: Any, schemes: Mapping[str, Scheme], names: Container[str]
) -> dict[str, Wanted]:
    """Their tensors where some are in codes. names: of those there are, some of which a file may leave out."""
    ours, plain, found = tree.nodes(shapes, Weight), weight_map.theirs(entries, shapes), {}
    for entry in entries:
        for name in entry.names(ours[entry.ours].shape):
            if name not in schemes:
                found[name] = Wanted(plain[name])
                continue
            layer = name.removesuffix("weight")
            for part, want in codes.stored(schemes[name], *_sizes(entry, plain[name])).items():
                if part not in codes.OPTIONAL or f"{layer}{part}" in names:
                    found[f"{layer}{part}"] = want
    return found


def load(
    entries: Iterable[Entry], shapes: Any, schemes: Mapping[str, Scheme], tensors: Mapping[str, Tensor]
) -> dict[str, Quantized]:
    """Our quantized leaves by path, in numpy, one matrix of theirs at a time.

    Raises: ValueError for numbers that no scheme allows, and for layers of a stack that are not stored alike.
    """
    ours, plain = tree.nodes(shapes, Weight), weight_map.theirs(entries, shapes)
    found = {}
    for entry in entries:
        shape = ours[entry.ours].shape
        names = entry.names(shape)
        kinds = {schemes.get(name) for name in names}
        if kinds == {None}:
            continue
        if len(kinds) > 1:
            told = " and ".join(sorted(str(kind or "not quantized") for kind in kinds))
            raise ValueError(
                f"{entry.ours}: its layers are stored in several ways ({told}), and lmx stacks them in one; fetch the "
                "model quantized alike throughout, or as it was before"
            )
        scheme = schemes[names[0]]
        pieces = [_piece(entry, name, plain[name], scheme, tensors) for name in names]
        found[entry.ours] = _stacked(pieces, shape[: entry.n_leading], scheme.symmetric)
    return found


def section(leaves: Mapping[str, Any], entries: list[Entry], layout: str) -> dict[str, Any]:
    """The quantization_config for parameters by path, of which some are weights other than arrays.

    Raises: ValueError naming the parameter that the layout cannot hold, why, and the way out.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r:.99}; use {' or '.join(LAYOUTS)}")
    schemes = {}
    for theirs, parts in weight_map.together(entries).items():
        found = [leaves[entry.ours] for entry in parts]
        if any(isinstance(w, Weight) for w in found):
            try:
                schemes[theirs] = _scheme(found, parts[0], layout)
            except ValueError as error:
                names = ", ".join(entry.ours for entry in parts)
                raise ValueError(f"{names}: {error}") from None
    if layout == "gptq":
        return _to_gptq(schemes, leaves, entries)
    sizes = {s.group_size for s in schemes.values()}
    for entry in entries:  # one group is a group too, where others are of its size
        s = schemes.get(entry.theirs)
        if s and s.group_size is None and leaves[entry.ours].d_in in sizes:
            schemes[entry.theirs] = replace(s, group_size=leaves[entry.ours].d_in)
    linear = {entry.theirs for entry in entries if entry.turned and _is_matrix(entry)}
    return _to_compressed_tensors(schemes, linear | {"lm_head.weight"})


def dump(entries: list[Entry], leaves: Mapping[str, Any], layout: str) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors of the leaves in codes, one matrix at a time; `section` has found that they can be written."""
    for parts in weight_map.together(entries).values():
        found = [leaves[entry.ours] for entry in parts]
        if not isinstance(found[0], Quantized):
            continue
        scheme, shape = _scheme(found, parts[0], layout), found[0].shape
        places = np.ndindex(*shape[: parts[0].n_leading])
        for name, place in zip(parts[0].names(shape), places):
            whole = _joined([_at(w, place) for w in found])
            try:
                made = codes.pack(scheme, whole)
            except ValueError as error:
                raise ValueError(f"{name.removesuffix('.weight')}: {error}") from None
            yield from ((f"{name.removesuffix('weight')}{part}", x) for part, x in made.items())


def _of_compressed_tensors(f: Fields) -> Found:
    f.asked |= {"quant_method", "version", "global_compression_ratio"}
    f.only("quantization_status", "compressed", "frozen")
    if (f("sparsity_config", dict, {}).get("format") or "dense") != "dense":
        raise ValueError(f"{f.where}: sparsity_config has no counterpart in lmx; fetch the model unpruned")
    default = f("format", str, None)
    groups = []
    for name, group in f("config_groups", dict).items():
        at = f"{f.where}: {name}"
        if not isinstance(group, dict):
            raise ValueError(f"{at} is {group!r:.99}, not an object")
        g = Fields(group, at)
        targets = g("targets", list)
        scheme = _scheme_of_group(g, g("format", str, default) or "none")
        g.finish()
        groups.append((_texts(targets, at, "targets"), scheme))
    ignore = _texts(f("ignore", list, []), f.where, "ignore")
    f.finish()
    return Found("compressed-tensors", tuple(groups), ignore, f.where)


def _scheme_of_group(g: Fields, form: str) -> Scheme:
    w = Fields(g("weights", dict), f"{g.where}: weights")
    w.asked |= {"observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype", "group_size"}
    w.only("type", "float" if form == "float-quantized" else "int")
    w.only("strategy", "group", "channel")
    w.only("dynamic", False)
    size = None if w.found.get("group_size") in (None, -1) else w("group_size", int)
    bits, symmetric = w("num_bits", int, 8), w("symmetric", bool, True)
    w.finish()
    x = Fields(g("input_activations", dict, {}), f"{g.where}: input_activations")
    activations, calibrated = "float", False
    if x.found:
        x.asked |= {"observer", "observer_kwargs", "group_size", "actorder", "scale_dtype", "zp_dtype"}
        calibrated = not x("dynamic", bool, False)
        x.only("num_bits", 8)
        says = (x("type", str, "int"), x("symmetric", bool, True), x("strategy", str, "tensor"))
        of_groups = bits == 4 and symmetric and not calibrated
        if says != ("int", True, "tensor" if calibrated else "token") or (size is not None and not of_groups):
            raise ValueError(
                f"{x.where}: lmx rounds inputs to int8, symmetric, by token or with one calibrated scale, beside "
                "weights with a scale for each output or symmetric groups of 4 bits, and this "
                f"says {x.found!r:.200}; {AS_THEY_ARE}"
            )
        activations = "int8"
        x.finish()
    try:
        return Scheme(form, bits, size, symmetric, activations, calibrated)
    except ValueError as error:
        raise ValueError(f"{g.where}: {error}") from None


def _of_gptq(f: Fields) -> Found:
    """How it was calibrated does not matter; what changes the numbers is read or refused."""
    f.only("pack_dtype", "int32")
    form = f("checkpoint_format", str, f("format", str, "gptq"))
    if form not in codes.GPTQ:
        raise ValueError(
            f"{f.where}: checkpoint_format={form!r:.99}; lmx reads {' and '.join(codes.GPTQ)}: convert the model"
        )
    skipped = [name for name in f("dynamic", dict, {}) if not name.startswith("-:")]
    for name in ("rotation", "adapter"):
        if f.found.get(name):
            skipped.append(f"{name}={f.found[name]!r:.60}")
    if skipped:
        raise ValueError(f"{f.where}: no counterpart in lmx for {', '.join(map(str, skipped))!s:.200}")
    size = f.found.get("group_size")
    size = None if size in (None, -1) else f("group_size", int)
    try:
        scheme = Scheme(form, f("bits", int), size, f("sym", bool, True))
    except ValueError as error:
        raise ValueError(f"{f.where}: {error}") from None
    return Found("gptq", (((), scheme),), (), f.where)


def _to_compressed_tensors(schemes: Mapping[str, Scheme], linear: set[str]) -> dict[str, Any]:
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for s, names in by_scheme.items():
        weights = {"num_bits": s.bits, "type": "float" if s.format == "float-quantized" else "int"}
        weights |= {"symmetric": s.symmetric, "strategy": "group" if s.group_size else "channel"}
        weights |= {"group_size": s.group_size, "dynamic": False}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True}
        inputs |= {"strategy": "tensor" if s.calibrated else "token", "dynamic": not s.calibrated}
        groups[f"group_{len(groups)}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else sorted(map(_pattern, names)),
            "weights": weights,
            "input_activations": inputs if s.activations == "int8" else None,
            "output_activations": None,
            "format": s.format,
        }
    formats = {s.format for s in by_scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(map(_pattern, linear - schemes.keys())),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _to_gptq(schemes: Mapping[str, Scheme], leaves: Mapping[str, Any], entries) -> dict[str, Any]:
    """One setting speaks for all matrices. Raises: ValueError if they differ."""
    found = [leaves[parts[0].ours] for name, parts in weight_map.together(entries).items() if name in schemes]
    sizes = {s.group_size for s in schemes.values()} - {None}
    size = min(sizes, default=None)
    whole = {w.d_in for w, s in zip(found, schemes.values()) if s.group_size is None}
    kinds = {(s.bits, s.symmetric) for s in schemes.values()}
    told = "; ".join(sorted({*map(str, schemes.values())}))
    if len(kinds) > 1 or len(sizes) > 1 or (size and max(whole, default=0) > size):
        raise ValueError(
            f"gptq has one setting for all matrices, and these are stored as {told}; "
            "use layout='compressed-tensors'"
        )
    ((bits, symmetric),) = kinds
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size or -1,
        "desc_act": any(w.order is not None for w in found),
        "sym": symmetric,
        "lm_head": "lm_head.weight" in schemes,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
    }


def _scheme(found: list[Any], entry: Entry, layout: str) -> Scheme:
    """How the layout holds leaves that one of their tensors joins along outputs."""
    dense = f"make it dense ({DENSE})"
    for w in found:
        if isinstance(w, Weight) and not isinstance(w, Quantized):
            raise ValueError(
                f"it is {type(w).__name__}, which no layout holds; merge it into one matrix, or {dense}"
            )
    if entry.ours in NOT_LINEAR:
        raise ValueError(f"no layout holds it quantized, as its groups run over the rows; {dense}")
    if layout != "gptq" and not entry.turned:
        raise ValueError(
            f"transformers keeps it in a Conv1D, which {layout} does not read; use layout='gptq', or {dense}"
        )
    if len({*map(_settings, found)}) > 1:
        raise ValueError(
            f"{entry.theirs} joins them, but they are not quantized alike; quantize them with the same settings, or "
            f"make them all dense ({DENSE})"
        )
    return codes.scheme_of(found[0], layout, sum(w.shape[-1] for w in found))


def _settings(w: Any) -> tuple:
    """What parts of one tensor must have in common."""
    if not isinstance(w, Quantized):
        return ()
    common = [None if x is None else np.asarray(x).tobytes() for x in (w.order, w.input_scale)]
    kinds = (w.bits, w.d_in, w.group_size, w.table, w.activations, w.zero is None)
    return (*kinds, str(w.q.dtype), str(w.scale.dtype), *common)


def _at(w: Quantized, place: tuple[int, ...]) -> Quantized:
    """One matrix of a stack, in numpy."""
    return jax.tree.map(lambda x: np.asarray(x[place]), w)


def _joined(pieces: list[Quantized]) -> Quantized:
    if len(pieces) == 1:
        return pieces[0]
    parts = {x: [getattr(w, x) for w in pieces] for x in ("q", "scale", "zero")}
    return replace(
        pieces[0], **{x: np.concatenate(found) for x, found in parts.items() if found[0] is not None}
    )


def _piece(entry: Entry, name: str, shape: tuple[int, ...], scheme: Scheme, tensors) -> Quantized:
    """What is ours of one of their matrices, whose shape would be this were it not quantized."""
    d_out, d_in = _sizes(entry, shape)
    layer = name.removesuffix("weight")
    parts = codes.stored(scheme, d_out, d_in)
    arrays = {part: tensors[f"{layer}{part}"].read() for part in parts if f"{layer}{part}" in tensors}
    try:
        w = codes.unpack(scheme, arrays, d_out, d_in)
    except ValueError as error:
        raise ValueError(f"{layer.removesuffix('.')}: {error}") from None
    if entry.part is None:
        return w
    rows = slice(*entry.part)
    return replace(w, q=w.q[rows], scale=w.scale[rows], zero=None if w.zero is None else w.zero[rows])


def _stacked(pieces: list[Quantized], lead: tuple[int, ...], symmetric: bool) -> Quantized:
    """One leaf; without zeros and an order if no piece needs them."""
    if symmetric and all(w.zero is None or not w.zero.any() for w in pieces):
        pieces = [replace(w, zero=None) for w in pieces]
    if any(w.order is not None for w in pieces):
        plain = np.arange(pieces[0].d_in, dtype=np.int32)
        pieces = [replace(w, order=plain if w.order is None else w.order) for w in pieces]
    return jax.tree.map(lambda *xs: np.stack(xs).reshape(*lead, *xs[0].shape), *pieces)


def _sizes(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(d_out, d_in) of one of their matrices."""
    return shape if entry.turned else shape[::-1]


def _is_matrix(entry: Entry) -> bool:
    return entry.theirs.endswith(".weight") and entry.ours.split("/")[-1] in ("w", "head")


def _pattern(name: str) -> str:
    """A target of compressed-tensors: the layer of a name, or a pattern for those of {layer} and {expert}."""
    layer = name.removesuffix(".weight")
    if "{" not in layer:
        return layer
    return "re:" + re.sub(r"\\{(layer|expert)\\}", r"\\d+", re.escape(layer)) + "$"


def _texts(found: list[Any], where: str, name: str) -> tuple[str, ...]:
    if not all(isinstance(x, str) for x in found):
        raise ValueError(f"{where}: {name}={found!r:.99}, not a list of texts")
    return tuple(found)
