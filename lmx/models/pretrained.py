"""Models that others released: a Hugging Face folder or a GGUF file, described without loading, loaded, written.

    found = pretrained.find("SmolLM2-135M-Instruct.gguf")        found.config, found.context
    params = pretrained.load(found, mesh=mesh)
    pretrained.save("folder", found.config, params)              what transformers reads

Nothing in a model's files is executed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from lmx import tree
from lmx.data import Tokenizer, released
from lmx.data.released import KEPT as KEPT
from lmx.data.released import beside, end_ids, object_in, read_object
from lmx.data.released import chat as chat
from lmx.data.released import is_released as is_released
from lmx.formats import Tensor, gguf, safetensors
from lmx.formats.codes import Scheme
from lmx.formats.gguf import Gguf
from lmx.mesh import shardings
from lmx.models import gguf_model, quantized, weight_map
from lmx.models.families import FAMILIES, Family, Fields, check_counts, config_of
from lmx.models.transformer import RULES, TransformerConfig, build
from lmx.models.weight_map import Entry
from lmx.weights import Quantized, Weight

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Tensors that older files hold beside the weights: masks and frequencies, which a model computes itself."""
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
DTYPES |= {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

Made = TypeVar("Made")


@dataclass(frozen=True)
class Pretrained:
    """A model on disk. fields: its config.json without what it says of codes, or what the metadata of its GGUF file
    say in those terms. schemes: how the matrices are stored that are in codes, by the names they had before."""

    path: Path
    family: Family
    config: TransformerConfig
    fields: Mapping[str, Any]
    entries: list[Entry]
    tensors: dict[str, Tensor]
    gguf: Gguf | None = None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def context(self) -> int | None:
        """Tokens it was trained to read at once, where its files say so."""
        return _context(self.fields)

    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return [self.path] if self.gguf else sorted(self.path.glob("*.safetensors"))

    def beside(self) -> dict[str, str]:
        """Name -> text of what came beside weights and tokenizer, as a Hugging Face folder names it: the config, the
        chat template, how to generate."""
        if self.gguf:
            config = json.dumps(self.fields, indent=2, ensure_ascii=False)
            return {"config.json": config} | gguf_model.beside(self.gguf)
        return beside(self.path)

    def tokenizer(self) -> Tokenizer:
        """With a bos token only if the model's texts begin with it; `end_ids` are those that end its replies.

        Raises: FileNotFoundError if there is none; ValueError if it is damaged.
        """
        found = gguf_model.tokenizer(self.gguf) if self.gguf else released.in_folder(self.path)
        return found.ending_with(end_ids(self.beside(), self.path))


def context(beside: Mapping[str, str], where: Path) -> int | None:
    """Tokens that the model was trained to read at once, where the config.json beside it says so."""
    return _context(object_in(beside, "config.json", where))


def find(path: str | Path) -> Pretrained:
    """A Hugging Face folder or a GGUF file, with every name and shape of its weights checked against its config.

    Raises: FileNotFoundError; ValueError for files that are damaged, and for what lmx cannot represent, by name.
    """
    path, file, said, schemes = Path(path), None, None, {}
    if path.suffix == ".gguf":
        file = gguf.read(path)
        family, found, config, entries = gguf_model.describe(file, str(path))
        tensors = gguf_model.weights(file)
    else:
        found = _config_json(path)
        said = quantized.read(found, path, read_object)
        family = _family(found, path)
        tensors = safetensors.read(path)
        check_counts(found, len(tensors), str(path / "config.json"))
        config = config_of(family, Fields(found, str(path / "config.json")))
        entries = family.entries(config)
        tensors = {name: x for name, x in tensors.items() if not name.endswith(BUFFERS)}
        entries = _as_named(tensors, entries)
        if config.tie_head:
            tensors = _without_copy_of_embedding(tensors, entries, path)
    ours = shapes(config)
    if said is not None:
        schemes = said.schemes(entries, ours, tensors)
    wanted = quantized.wanted(entries, ours, schemes, tensors)
    tensors = _without_idle_biases(tensors, wanted, schemes)
    weight_map.check(wanted, tensors, str(path))
    return Pretrained(path, family, config, found, entries, tensors, file, schemes)


def shapes(config: TransformerConfig, mesh: Mesh | None = None) -> Any:
    """The parameters as ShapeDtypeStruct, float32; with a mesh each says how it is spread over it."""
    params = jax.eval_shape(build(config, platform="cpu").init, jax.random.key(0))
    if mesh is None:
        return params
    spread = shardings(params, RULES, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, spread)


def load(found: Pretrained, mesh: Mesh | None = None) -> Any:
    """The parameters, read straight to where they belong, one piece at a time: `Quantized` where the files hold
    codes, and float32."""
    whole = shapes(found.config, mesh)
    in_codes = quantized.load(found.entries, whole, found.schemes, found.tensors)
    arrays = tree.map_at(lambda path, x: None if path in in_codes else x, whole, "*")
    leaves = tree.map_at(lambda path, _: in_codes.get(path), whole, "*")
    leaves = jax.device_put(leaves, shardings(leaves, RULES, mesh) if mesh else None)
    return tree.combine(weight_map.load(found.entries, arrays, found.tensors), leaves)


def save(
    folder: str | Path,
    config: TransformerConfig,
    params: Any,
    *,
    like: Mapping[str, Any] | None = None,
    context: int | None = None,
    dtype: str | None = None,
    layout: str | None = None,
) -> Family:
    """Writes config.json and safetensors as transformers reads them; returns the family that it is written as.

    Args:
      like: the config.json it came from; its other fields are kept, and its family is tried first. A model of our
        own gives the ids of its special tokens here: bos_token_id, eos_token_id, pad_token_id.
      context: tokens the model reads at once; None takes that of `like`, or of the positions.
      dtype: of the weights that are not quantized; None means that of `like`, or float32.
      layout: of matrices that are `Quantized`, written bit for bit: "compressed-tensors", which None means, or "gptq".
    Raises: ValueError naming what no family or layout can represent.
    """
    folder = Path(folder)
    like = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(like or {})
    like = {name: value for name, value in like.items() if name not in quantized.SECTIONS}
    family, found = _representing(config, like, context)
    dtype = dtype or like.get("dtype") or like.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; use {', '.join(DTYPES)}")
    params = weight_map.stacked(params)
    entries, leaves = family.entries(config), tree.nodes(params, Weight)
    weight_map.theirs(entries, params)
    codes: dict[str, Any] = {}
    if any(isinstance(w, Weight) for w in leaves.values()):
        layout = layout or quantized.LAYOUTS[0]
        codes = {quantized.SECTION: quantized.section(leaves, entries, layout)}
    elif layout is not None:
        raise ValueError(f"layout={layout!r:.99}: no matrix of this model is quantized; leave the layout out")
    plain = [entry for entry in entries if not isinstance(leaves[entry.ours], Quantized)]
    tensors = [weight_map.dump(plain, params, DTYPES[dtype])]
    tensors += [quantized.dump(entries, leaves, layout)] if codes else []
    safetensors.write(folder, itertools.chain(*tensors))
    about = {"architectures": [family.architecture], "model_type": family.model_type}
    text = json.dumps(
        like | about | found | {"dtype": dtype, "torch_dtype": dtype} | codes, indent=2, ensure_ascii=False
    )
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    (folder / quantized.BESIDE).unlink(missing_ok=True)
    if layout == "gptq":
        (folder / quantized.BESIDE).write_text(json.dumps(codes[quantized.SECTION], indent=2) + "\n", "utf-8")
    return family


def family_of(config: TransformerConfig, like: Mapping[str, Any] | None = None) -> Family:
    """The family that `save` would write a model as. Raises: as `save`."""
    return _representing(config, like or {}, None)[0]


def _representing(config, like, context) -> tuple[Family, dict[str, Any]]:
    def tried(family):
        found = family.fields(config)
        if "n_positions" not in found:
            found["max_position_embeddings"] = context or like.get("max_position_embeddings") or 2048
        return (family, found), family.config(Fields(found, family.model_type))

    first = sorted(FAMILIES.values(), key=lambda family: family.model_type != like.get("model_type"))
    tries = {family.model_type: partial(tried, family) for family in first}
    return first_same(config, tries, "family that transformers reads")


def first_same(
    config: TransformerConfig, tries: Mapping[str, Callable[[], tuple[Made, TransformerConfig]]], what: str
) -> Made:
    """What the first of the tries makes, by name, whose config computes the same as this one. The rest of a config
    is how it is trained and run.

    Raises: ValueError if there is none, with what the nearest lacks. what: what the tries are, for that.
    """
    wanted = _meaning(config)
    problems = []
    for name, tried in tries.items():
        try:
            made, config_again = tried()
        except ValueError as error:
            problems.append((999, f"{name}: {error}"))
            continue
        again = _meaning(config_again)
        if again == wanted:
            return made
        other = [part for part in wanted if again[part] != wanted[part]]
        told = ", ".join(f"{part}={wanted[part]}" for part in other)
        problems.append((len(other), f"{name} has no counterpart for {told}"))
    nearest = min(problems, key=itemgetter(0))[1]
    raise ValueError(f"no {what} can represent this model; the nearest: {nearest}")


def _meaning(config: TransformerConfig) -> dict[str, Any]:
    """What a config computes: widths spelled out, and without what concerns training, dtype and speed alone."""
    a = config.attention
    H = a.width(config.d_model)
    scale = round(a.scale or H**-0.5, 9)
    settled = replace(
        config,
        attention=replace(a, n_kv_heads=a.kv_heads, head_dim=H, scale=scale, impl="auto"),
        mlp=replace(config.mlp, d_ff=config.mlp.width(config.d_model)),
    )
    free = ("dropout", "embed_noise", "init_std", "dtype", "remat", "unroll")
    found = {f.name: getattr(settled, f.name) for f in fields(settled) if f.name not in free}
    for name in ("attention", "norm"):
        part = found.pop(name)
        found |= {f"{name}.{f.name}": getattr(part, f.name) for f in fields(part)}
    return found


def _context(fields: Mapping[str, Any]) -> int | None:
    return fields.get("max_position_embeddings") or fields.get("n_positions")


def _config_json(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model; give a folder with config.json, or a .gguf file")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no config.json; give the folder of a model")
    return read_object(file)


def _family(found: Mapping[str, Any], path: Path) -> Family:
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        code = " (its own code, named in auto_map, is never executed here)" if "auto_map" in found else ""
        raise ValueError(
            f"{path / 'config.json'}: model_type={kind!r:.99} is none of {', '.join(FAMILIES)}{code}"
        )
    return FAMILIES[kind]


def _as_named(tensors, entries):
    """Hub files of GPT-2 lack the prefix of the model inside; their entries do then too."""
    bare = "transformer."
    if any(entry.theirs.startswith(bare) for entry in entries) and not any(
        n.startswith(bare) for n in tensors
    ):
        entries = [replace(entry, theirs=entry.theirs.removeprefix(bare)) for entry in entries]
    return entries


def _without_idle_biases(tensors, wanted, schemes):
    """Older GPTQ files give every matrix a bias, of zeros where the model has none."""
    idle = {f"{name.removesuffix('weight')}bias" for name in schemes} - wanted.keys()
    return {name: x for name, x in tensors.items() if name not in idle or len(x.shape) != 1 or x.read().any()}


def _without_copy_of_embedding(tensors, entries, path):
    """A head that is stored although it is tied is left out, if it is the embedding."""
    embed = next(entry.theirs for entry in entries if entry.ours == "embed")
    if "lm_head.weight" not in tensors or embed not in tensors:
        return tensors
    head, rows = tensors["lm_head.weight"], tensors[embed]
    same = head.shape == rows.shape and all(
        np.array_equal(head.read(slice(i, i + 4096)), rows.read(slice(i, i + 4096)))
        for i in range(0, rows.shape[0], 4096)
    )
    if not same:
        raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight is not {embed}")
    return {name: x for name, x in tensors.items() if name != "lm_head.weight"}
