"""Adapters as folders of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors, read and written.

    alone = peft.load("adapter", found.family, found.config)        as `lmx.adapt.adapter` gives it
    params = lmx.adapt.attach(params, alone)
    peft.save("mine", found.family, found.config, alone, base="HuggingFaceTB/SmolLM2-135M")
    peft.describe("adapter")                                        what it is, without its model

LoRA, rank-stabilised LoRA and DoRA of matrices, with ranks and alphas by pattern, on some layers or on all. What else
PEFT can hold, as whole modules, biases or rows of single tokens, is an error that names it. An adapter whose base was
changed at its start (`lmx.adapt.Pissa`) is written as one on the original base: `lmx.adapt.difference`.

PEFT keeps A as [R, d_in] and B as [d_out, R]; of an embedding A [R, V] and B [D, R], whose product is the transpose.
A head that is tied to the embedding is a module of its own there, so that both have an adapter, or neither; PEFT's own
merge would add both to the one matrix. Experts have an adapter each, as before transformers 5; PEFT joins them itself.
Source: PEFT 0.21, src/peft/tuners/lora/config.py and layer.py, src/peft/utils/save_and_load.py. Nothing in a folder is
executed; its patterns are given a second each.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import regex

from lmx import tree
from lmx.formats import Tensor, Wanted, safetensors
from lmx.models import adapter_map, pretrained, weight_map
from lmx.models.adapter_map import EMBED
from lmx.models.families import Family, Fields
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.weights import Dora, LowRank

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, HEAD = "base_model.model.", "lm_head"
A, B, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBED_A, EMBED_B, BASE = "lora_embedding_A", "lora_embedding_B", "base_layer.weight"
SUFFIXES = (A, B, LENGTHS, EMBED_A, EMBED_B, BASE)
IDLE = (
    "auto_mapping inference_mode revision peft_version peft_type lora_dropout fan_in_fan_out megatron_core eva_config "
    "qalora_group_size runtime_config"
).split()
"""Fields of an adapter_config.json that change no number of a trained adapter on its base."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Of `init_lora_weights`: those that leave the base as it is."""
SECONDS = 1.0


@dataclass(frozen=True)
class Said:
    """What an adapter_config.json says. targets, but_not: names, or a pattern; ranks, alphas: by pattern."""

    where: str
    rank: int
    alpha: float
    stabilised: bool
    dora: bool
    tied: bool
    targets: tuple[str, ...] | str
    but_not: tuple[str, ...] | str
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base: str | None

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of the adapter on a module."""
        rank, alpha = (
            next((x for key, x in by.items() if self._fits(rf"(.*\.)?({key})", module)), default)
            for by, default in ((self.ranks, self.rank), (self.alphas, self.alpha))
        )
        return rank, alpha

    def chosen(self, modules: Mapping[str, Any]) -> list[str]:
        """Those of a model's modules that have an adapter."""
        if self.targets == "all-linear":
            return [m for m in modules if m.split(".")[-1] not in (HEAD, "embed_tokens", "wte")]
        return [
            m
            for m in modules
            if self._named(self.targets, m) and not self._named(self.but_not, m) and self._in(m)
        ]

    def _named(self, names: tuple[str, ...] | str, module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self._fits(names, module)
        return any(f".{module}".endswith(f".{name}") for name in names)

    def _in(self, module: str) -> bool:
        """Whether it is of one of the layers, by the first number in its name."""
        if not self.layers or isinstance(self.targets, str) or module in self.targets:
            return True
        parts = module.split(".")
        for before, part in itertools.pairwise(parts[:-1]):
            if part.isdecimal() and (before in self.layer_names or not self.layer_names):
                return int(part) in self.layers
        return False

    def _fits(self, pattern: str, module: str) -> bool:
        try:
            return regex.fullmatch(pattern, module, timeout=SECONDS) is not None
        except (regex.error, TimeoutError) as error:
            raise ValueError(
                f"{self.where}: {pattern!r:.99} is no pattern to search by ({error!s:.99})"
            ) from None


def read(folder: str | Path) -> Said:
    """The config of an adapter.

    Raises: FileNotFoundError; ValueError for a file that is damaged, another kind of adapter, or what lmx has not.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a PEFT adapter")
    f = Fields(pretrained.read_object(file), str(file))
    f.asked |= set(IDLE)
    f("peft_type", str)
    f.only("peft_type", "LORA")
    f.only("task_type", "CAUSAL_LM")
    f.only("bias", "none")
    start = f.found.get("init_lora_weights")
    f.asked |= {"init_lora_weights", "loftq_config", "corda_config", "lora_ga_config"}
    if start is not None and start not in STARTS:
        raise ValueError(
            f"{file}: init_lora_weights={start!r:.99} changed the base that the adapter stands on; have PEFT write "
            "it for the original one: model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    layers = f.found.get("layers_to_transform")
    layers = [f("layers_to_transform", int)] if type(layers) is int else f("layers_to_transform", list, [])
    said = Said(
        where=str(file),
        rank=f("r", int, 8),
        alpha=f("lora_alpha", float, 8.0),
        stabilised=f("use_rslora", bool, False),
        dora=f("use_dora", bool, False),
        tied=f("ensure_weight_tying", bool, False),
        targets=_names(f, "target_modules"),
        but_not=_names(f, "exclude_modules"),
        layers=_each(f, "layers_to_transform", layers, int),
        layer_names=_names(f, "layers_pattern", listed=True),
        ranks=_by_pattern(f, "rank_pattern", int),
        alphas=_by_pattern(f, "alpha_pattern", float),
        base=f("base_model_name_or_path", str, None),
    )
    f.finish()
    ranks, alphas = [said.rank, *said.ranks.values()], [said.alpha, *said.alphas.values()]
    if not np.isfinite(alphas).all():
        raise ValueError(f"{file}: alphas are {alphas}; each must be finite")
    if min(ranks) < 1:
        raise ValueError(f"{file}: ranks are {ranks}; each must be 1 or more")
    return said


def load(folder: str | Path, family: Family, config: TransformerConfig, params: Any = None) -> Any:
    """The adapters of a folder for a model, as `lmx.adapt.adapter` gives them, in float32.

    Every key and shape is checked against what the config names of this model. Layers that it leaves out get zeros.
    params: of the model; needed for DoRA on some layers alone.
    Raises: FileNotFoundError; ValueError for what is missing, unknown, of another shape, not finite, or none of lmx's.
    """
    said, tensors = read(folder), _tensors(folder)
    entries, shapes = family.entries(config), pretrained.shapes(config)
    sizes = _sizes(entries, shapes, config)
    modules = said.chosen(sizes)
    if not modules:
        known = ", ".join(dict.fromkeys(module.split(".")[-1] for module in sizes))
        raise ValueError(
            f"{said.where}: target_modules={said.targets!r:.99} names none of the modules {known}"
        )
    embed = _module(next(entry.theirs for entry in entries if entry.ours == EMBED))
    if config.tie_head and said.tied and embed in modules:
        modules = list(dict.fromkeys((*modules, HEAD)))
    wanted = {}
    for module in modules:
        (d_in, d_out), (rank, _), at = sizes[module], said.of(module), f"{PREFIX}{module}."
        a, b = (EMBED_A, EMBED_B) if module == embed else (A, B)
        wanted |= {at + a: (rank, d_in), at + b: (d_out, rank)} | (
            {at + LENGTHS: (d_out,)} if said.dora else {}
        )
        if module in (embed, HEAD) and at + BASE in tensors:  # PEFT keeps a copy of the matrix itself
            wanted[at + BASE] = (config.vocab_size, config.d_model)
    if said.dora and embed in modules:
        raise ValueError(
            f"{said.where}: use_dora with the embedding {embed} has no counterpart in lmx; leave it out"
        )
    where = f"{Path(said.where).with_name(WEIGHTS)} for this {family.model_type}"
    weight_map.check({key: Wanted(shape) for key, shape in wanted.items()}, tensors, where)
    for key in wanted:
        if not np.isfinite(tensors[key].read()).all():
            raise ValueError(f"{where}: {key} holds numbers that are not finite; train it anew, or fetch it")
    found = {}
    for module in modules:
        (rank, alpha), at = said.of(module), f"{PREFIX}{module}."
        keys = (EMBED_A, EMBED_B) if module == embed else (A, B)
        a, b = (tensors[at + key].read().astype(np.float32).T for key in keys)
        low = LowRank(None, a, b, alpha, said.stabilised)
        if said.dora:
            lengths = tensors[at + LENGTHS].read().astype(np.float32)
            low = Dora(None, a, b, lengths[None], alpha, said.stabilised)
        found[f"{module}.weight"] = _transposed(low) if module == embed else low
    if config.tie_head:
        _check_tied(found.pop(f"{HEAD}.weight", None), found.get(f"{embed}.weight"), said)
    return adapter_map.load(entries, shapes, found, params)


def save(
    folder: str | Path, family: Family, config: TransformerConfig, alone: Any, base: str | None = None
) -> None:
    """Writes the adapters of a model as PEFT and transformers load them.

    Args:
      family: that transformers reads the model with; `Pretrained.family`, or what `pretrained.save` returns.
      alone: as `lmx.adapt.adapter` gives it.
      base: the name or path of the model that it is for.
    Raises: ValueError for adapters that PEFT has no counterpart for, by path; OSError.
    """
    entries = family.entries(config)
    lows = [(entry, _module(name), low) for entry, name, low in adapter_map.dump(entries, alone)]
    if not lows:
        raise ValueError("no adapter to write")
    kinds = {type(low) for _, _, low in lows}
    if len(kinds) > 1:
        raise ValueError("PEFT has DoRA on all adapted matrices or on none; these are of both kinds")
    if config.tie_head:
        head = Entry("head", f"{HEAD}.weight", turned=True)
        lows += [(head, HEAD, low) for entry, _, low in lows if entry.ours == EMBED]
    stabilised = all(low.stabilised for _, _, low in lows)
    short = _short_names(entries, {entry.theirs for entry, _, _ in lows})
    ranks, alphas, tensors = {}, {}, {}
    for entry, module, low in lows:
        key, rank = short[entry.theirs], low.a.shape[-1]
        alpha = low.alpha if stabilised or not low.stabilised else low.scale * rank
        ranks[key], alphas[key] = rank, int(alpha) if alpha == int(alpha) else alpha
        if entry.ours == EMBED:
            a, b, theirs = EMBED_A, EMBED_B, _transposed(low)
        else:
            a, b, theirs = A, B, low
        arrays = {a: theirs.a.T, b: theirs.b.T} | (
            {LENGTHS: low.magnitude[0]} if isinstance(low, Dora) else {}
        )
        tensors |= {f"{PREFIX}{module}.{name}": x for name, x in arrays.items()}
    (rank, _), (alpha, _) = (Counter(x.values()).most_common(1)[0] for x in (ranks, alphas))
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(short.values()),
        "rank_pattern": {regex.escape(key): x for key, x in ranks.items() if x != rank},
        "alpha_pattern": {regex.escape(key): x for key, x in alphas.items() if x != alpha},
        "use_rslora": stabilised,
        "use_dora": Dora in kinds,
        "ensure_weight_tying": config.tie_head,
        "fan_in_fan_out": any(not entry.turned and entry.ours != EMBED for entry, _, _ in lows),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write_file(folder / WEIGHTS, tensors)
    text = json.dumps(said, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def describe(folder: str | Path) -> dict[str, str]:
    """Name -> value of what an adapter's files say; its model is not needed, nor any weight read.

    Raises: as `read`, and ValueError for tensors of another kind.
    """
    said, tensors = read(folder), _tensors(folder)
    kind = "DoRA" if said.dora else "LoRA"
    ranks: dict[str, set[str]] = {}
    layers: dict[str, int] = Counter()
    for key, tensor in tensors.items():
        module, suffix = _split(key, said)
        if suffix in (A, EMBED_A):
            rank, alpha = said.of(module)
            scale = alpha / (rank**0.5 if said.stabilised else rank)
            name = regex.sub(r"^.*?\.\d+\.", "", module)
            ranks.setdefault(f"{rank}, alpha {alpha:g}, scale {scale:.4g}", set()).add(name)
            layers[name] += 1
    n = sum(int(np.prod(x.shape)) for key, x in tensors.items() if not key.endswith(BASE))
    stored = Counter(tensor.stored for tensor in tensors.values())
    rows = {"adapter": str(folder), "kind": f"rank-stabilised {kind}" if said.stabilised else kind}
    rows["base model"] = said.base or "not said"
    for words, names in ranks.items():
        title = "rank" if len(ranks) == 1 else f"rank of {', '.join(sorted(names))}"
        rows[title] = words
    rows["matrices"] = ", ".join(f"{n} {name}" for name, n in layers.items())
    rows["parameters"] = f"{n:,}"
    size = (Path(folder) / WEIGHTS).stat().st_size
    rows["file"] = (
        f"{size / 2**20:,.1f} MiB, tensors: {', '.join(f'{n} {kind}' for kind, n in stored.items())}"
    )
    return rows


def _names(f: Fields, name: str, listed: bool = False) -> tuple[str, ...] | str:
    """A field that is a list of names, or a pattern, or, if it is `listed`, one name."""
    value = f.found.get(name)
    f.asked.add(name)
    if isinstance(value, str):
        return (value,) if listed else value
    return _each(f, name, f(name, list, []), str)


def _each(f: Fields, name: str, values: list, kind: type) -> tuple:
    if not all(type(x) is kind for x in values):
        raise ValueError(f"{f.where}: {name} is {values!r:.99}, not a list of {kind.__name__}")
    return tuple(values)


def _by_pattern(f: Fields, name: str, kind: type) -> dict[str, Any]:
    found = Fields(f(name, dict, {}), f"{f.where}: {name}")
    return {key: found(key, kind) for key in found.found}


def _tensors(folder: str | Path) -> dict[str, Tensor]:
    folder = Path(folder)
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which runs any program it holds when it is opened, so it is not; have "
            f"PEFT write {WEIGHTS}: PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
        )
    return safetensors.read(folder / WEIGHTS)


def _module(theirs: str) -> str:
    return theirs.removesuffix(".weight")


def _sizes(entries: list[Entry], shapes: Any, config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Module that an adapter may stand on -> (d_in, d_out), or of the embedding (V, D)."""
    ours, whole, found = tree.nodes(shapes), weight_map.theirs(entries, shapes), {}
    for entry in adapter_map.matrices(entries):
        for name in entry.names(ours[entry.ours].shape):
            found[_module(name)] = whole[name][::-1] if entry.turned else whole[name]
    return found | ({HEAD: (config.d_model, config.vocab_size)} if config.tie_head else {})


def _short_names(entries: list[Entry], adapted: set[str]) -> dict[str, str]:
    """Their name -> what names it in target_modules: its last word, if all that end in it have an adapter."""
    names = {entry.theirs for entry in adapter_map.matrices(entries)} | adapted
    found = {}
    for name in adapted:
        module = _module(name).split("{layer}.")[-1]
        last = module.split(".")[-1]
        alone = all(other in adapted for other in names if _module(other).split(".")[-1] == last)
        found[name] = last if alone else module
    return found


def _transposed(low: LowRank) -> LowRank:
    return replace(low, a=low.b.T, b=low.a.T)


def _split(key: str, said: Said) -> tuple[str, str]:
    """Module and what of its adapter it is. Raises: ValueError if it is none."""
    for suffix in SUFFIXES:
        if key.startswith(PREFIX) and key.endswith(f".{suffix}"):
            return key.removeprefix(PREFIX).removesuffix(f".{suffix}"), suffix
    raise ValueError(f"{Path(said.where).with_name(WEIGHTS)}: {key!r:.99} is no part of a LoRA adapter")


def _check_tied(head: LowRank | None, embed: LowRank | None, said: Said) -> None:
    """Raises: ValueError if embedding and head, one matrix here, do not have the same adapter."""
    if head is None and (embed is None or said.tied):
        return
    mine = None if embed is None or head is None else [low.a @ low.b * low.scale for low in (embed, head)]
    if mine is None or not np.allclose(*mine, atol=1e-6 * np.abs(mine[0]).max()):
        raise ValueError(
            f"{said.where}: head and embedding are one matrix in this model, and their adapters differ; adapt both "
            "alike, with ensure_weight_tying"
        )
