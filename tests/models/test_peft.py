"""Adapters in PEFT's folders: what PEFT trained and answered lies in `adapters`, made by `make_adapters.py`; the rules
of the format are in numpy, written from PEFT's documentation; with --peers PEFT reads what we write."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_adapters import CASES, logits_with, make
from safetensors.numpy import load_file, save_file

from lmx import adapt, tree
from lmx.adapt import Dora, Lora, Merge, Pissa, Vera, adapter, attach, difference
from lmx.formats import safetensors
from lmx.models import build, peft, pretrained, weight_map
from lmx.weights import Dora as DoraLeaf
from lmx.weights import LowRank, Transposed

FAMILIES, FOLDER = Path(__file__).parent / "families", Path(__file__).parent / "adapters"
KEY = jax.random.key(0)


@functools.cache
class Base:
    """A model of `families`."""

    def __init__(self, name):
        self.name, self.found = name, pretrained.find(FAMILIES / name)
        self.params, self.config, self.family = (
            pretrained.load(self.found),
            self.found.config,
            self.found.family,
        )
        self.shapes = pretrained.shapes(self.config)
        self.tokens = jnp.asarray(np.random.default_rng(1).integers(3, 48, (2, 24)), jnp.int32)
        self.apply = jax.jit(build(self.config).apply)

    def logits(self, alone, tokens=None):
        params = self.params if alone is None else attach(self.params, alone)
        return self.apply(
            params, {"tokens": self.tokens if tokens is None else jnp.asarray(tokens, jnp.int32)}
        ).logits

    def load(self, folder, params=None):
        return peft.load(folder, self.family, self.config, params)

    def save(self, folder, alone):
        peft.save(folder, self.family, self.config, alone, base=self.name)
        return folder

    def tensors(self, params):
        return dict(weight_map.dump(self.family.entries(self.config), params, np.dtype(np.float32)))


def expected(name):
    return {key: x.read() for key, x in safetensors.read(FOLDER / name / "expected.safetensors").items()}


def trained(base, surgery, seed=3):
    """The adapter of a surgery as training might leave it."""
    params = surgery(base.params, KEY)

    def one(keys, x):
        moves = str(keys[-1]) in (".a", ".b", ".magnitude")
        return (
            x + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), x.size), x.shape)
            if moves
            else x
        )

    return adapter(jax.tree_util.tree_map_with_path(one, params))


def merged(base, alone):
    return base.tensors(Merge()(attach(base.params, alone), KEY))


@pytest.mark.parametrize("name", CASES)
def test_what_peft_trained_answers_as_in_peft_apart_and_merged(name):
    base, want = Base(CASES[name][0]), expected(name)
    alone = base.load(FOLDER / name, base.params)
    before = base.logits(None, want["tokens"])
    assert np.abs(before - want["logits"]).max() > 0.02
    np.testing.assert_allclose(base.logits(alone, want["tokens"]), want["logits"], rtol=0, atol=2e-5)
    whole = Merge()(attach(base.params, alone), KEY)
    found = base.apply(whole, {"tokens": jnp.asarray(want["tokens"], jnp.int32)}).logits
    np.testing.assert_allclose(found, want["logits"], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", CASES)
def test_written_again_it_is_what_peft_wrote_but_for_zeros(name, tmp_path):
    """Layers without an adapter come back with one of zeros, ranks that differ among layers as the largest."""
    base = Base(CASES[name][0])
    alone = base.load(FOLDER / name, base.params)
    again = load_file(base.save(tmp_path, alone) / "adapter_model.safetensors")
    theirs = load_file(FOLDER / name / "adapter_model.safetensors")
    theirs = {key: x for key, x in theirs.items() if not key.endswith("base_layer.weight")}
    if name in ("layers", "dora-layers", "rslora"):
        assert theirs.keys() <= again.keys()
        np.testing.assert_allclose(base.logits(base.load(tmp_path)), base.logits(alone), rtol=0, atol=1e-5)
        return
    assert again.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(again[key], x, err_msg=key)
    mine, said = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, FOLDER / name)
    )
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out"):
        assert mine[field] == said[field], field


def by_hand(weights, tensors, said):
    """The merged tensors, by PEFT's definition: W + s B A, of DoRA each row as long as its magnitude."""
    found = dict(weights)
    for key in tensors:
        at = key.partition(".lora_")[0]
        name = at.removeprefix("base_model.model.") + ".weight"
        if not key.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        module = name.removesuffix(".weight")
        by_name = [
            next((v for p, v in said.get(f, {}).items() if re.match(rf"(.*\.)?({p})$", module)), said[d])
            for f, d in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        ]
        scale = by_name[1] / (np.sqrt(by_name[0]) if said.get("use_rslora") else by_name[0])
        if "embedding" in key:
            A, B = tensors[f"{at}.lora_embedding_A"], tensors[f"{at}.lora_embedding_B"]
            found[name] = weights[name] + scale * (B.astype(np.float64) @ A).T
            continue
        A, B = (tensors[f"{at}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        assert len(A) == by_name[0]
        if name not in weights:  # a head that is the embedding
            continue
        W = weights[name].astype(np.float64)
        W = W.T if said.get("fan_in_fan_out") and ".h." in name else W
        W = W + scale * B @ A
        if said.get("use_dora"):
            W = tensors[f"{at}.lora_magnitude_vector"][:, None] * W / np.linalg.norm(W, axis=1, keepdims=True)
        found[name] = W.T if said.get("fan_in_fan_out") and ".h." in name else W
    return found


KINDS = {
    "lora": ("llama", Lora(3, alpha=8.0)),
    "rslora": ("llama3", Lora(3, alpha=8.0, stabilised=True)),
    "ranks": ("qwen3", Lora(3, ranks={"*attn/q/w": 5, "*down/w": 2}, where="*attn/[qo]/w|*mlp/*/w")),
    "dora": ("olmo2", Dora(3, alpha=4.0)),
    "gpt2": ("gpt2", Lora(2, ranks={"*attn/k/w": 4})),
    "gpt2 queries alone": ("gpt2", Lora(2, where="*attn/q/w|*attn/v/w|*mlp/up/w")),
    "gpt2 dora": ("gpt2", Dora(2)),
    "phi3": ("phi3", Lora(3, stabilised=True)),
    "phi3 dora": ("phi3", Dora(3, where="*attn/[qkv]/w")),
    "untied ends": ("llama", Lora(3, where="embed|head|*attn/q/w")),
    "tied ends": ("gpt2", Lora(3, where="embed|*attn/o/w")),
    "down alone": ("gpt2", Lora(3, where="*mlp/down/w")),
    "mixture": ("mixtral", Lora(3)),
    "gemma": ("gemma3", Lora(3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_means_by_the_rules_of_the_format_what_is_merged_here(kind, tmp_path):
    name, surgery = KINDS[kind]
    base, folder = Base(name), tmp_path / "अनुकूलक"
    alone = trained(base, surgery)
    base.save(folder, alone)
    said = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    want, found = by_hand(base.tensors(base.params), tensors, said), merged(base, alone)
    changed = [name for name, x in base.tensors(base.params).items() if not np.array_equal(x, found[name])]
    assert len(changed) >= 2
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-5, err_msg=name)
    again = base.load(folder)
    np.testing.assert_allclose(base.logits(again), base.logits(alone), rtol=0, atol=2e-5)
    more = set(tree.paths(again)) - set(tree.paths(alone))
    assert not set(tree.paths(alone)) - set(tree.paths(again)) and bool(more) == (
        kind == "gpt2 queries alone"
    )


def test_parts_of_a_fused_matrix_that_share_an_a_keep_their_rank_and_others_add_up(tmp_path):
    base = Base("gpt2")
    shared = base.load(FOLDER / "gpt2")
    a = [shared["blocks"]["attn"][x]["w"].a for x in "qkv"]
    np.testing.assert_array_equal(a[0], a[2])
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
    assert load_file(base.save(tmp_path / "a", shared) / "adapter_model.safetensors")[key].shape == (3, 16)
    apart = trained(base, Lora(3))
    apart["blocks"]["attn"]["k"]["w"] = jax.tree.map(lambda x: x + 0.01, apart["blocks"]["attn"]["k"]["w"])
    said = base.save(tmp_path / "b", apart)
    assert load_file(said / "adapter_model.safetensors")[key].shape == (9, 16)
    config = json.loads((said / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"c_attn": 9} and config["alpha_pattern"] == {"c_attn": 48}


def test_pissa_is_written_as_an_adapter_on_the_original_base(tmp_path):
    base = Base("llama")
    surgery = Pissa(3, alpha=2.0)
    start = surgery(base.params, KEY)
    end = jax.tree_util.tree_map_with_path(
        lambda keys, x: x * 1.1 if str(keys[-1]) in (".a", ".b") else x, start
    )
    alone = difference(adapter(end), adapter(start))
    base.save(tmp_path, alone)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6
    want = base.apply(end, {"tokens": base.tokens}).logits
    assert np.abs(want - base.logits(None)).max() > 0.01
    np.testing.assert_allclose(base.logits(base.load(tmp_path)), want, rtol=0, atol=2e-5)


def test_layers_that_peft_leaves_out_have_adapters_of_zeros():
    base = Base("mistral")
    alone = base.load(FOLDER / "layers")
    w = alone["blocks"]["attn"]["k"]["w"]
    assert isinstance(w, LowRank) and not np.asarray(w.b[0]).any() and np.asarray(w.b[1]).any()
    assert alone["blocks"]["attn"]["q"]["w"] is None and alone["embed"] is None
    with pytest.raises(ValueError, match=r"blocks/attn/o/w: only some layers have DoRA"):
        Base("llama").load(FOLDER / "dora-layers")


def test_ranks_and_alphas_that_differ_from_layer_to_layer_become_one():
    base = Base("qwen3")
    alone = base.load(FOLDER / "rslora")["blocks"]["attn"]
    assert [alone[x]["w"].a.shape[-1] for x in "qkvo"] == [5, 3, 3, 2]
    assert alone["k"]["w"].alpha == 3 and alone["k"]["w"].stabilised
    assert not np.asarray(alone["q"]["w"].a[0, :, 3:]).any()


def test_an_adapter_of_the_embedding_is_that_of_its_transpose():
    base = Base("qwen2")
    alone = base.load(FOLDER / "tied")
    assert isinstance(alone["embed"], Transposed) and isinstance(alone["embed"].base, LowRank)
    again = adapter(attach(base.params, alone))
    assert tree.paths(again) == tree.paths(alone)


def edited(tmp_path, name, config=None, rename=None, drop=None, more=None):
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / name, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {rename(key) if rename else key: x for key, x in tensors.items() if not (drop and drop in key)}
    save_file(tensors | (more or {}), folder / "adapter_model.safetensors")
    return folder


LAYER = "base_model.model.model.layers.1.self_attn"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"config": {"peft_type": "IA3"}}, "peft_type='IA3' has no counterpart"),
        ({"config": {"peft_type": None}}, "the field peft_type is missing"),
        ({"config": {"task_type": "SEQ_CLS"}}, "task_type='SEQ_CLS' has no counterpart"),
        ({"config": {"bias": "lora_only"}}, "bias='lora_only' has no counterpart"),
        (
            {"config": {"modules_to_save": ["lm_head"]}},
            r"no counterpart in lmx for modules_to_save=\['lm_head'\]",
        ),
        ({"config": {"target_parameters": ["mlp.experts.down_proj"]}}, "target_parameters="),
        ({"config": {"alora_invocation_tokens": [3]}}, "alora_invocation_tokens="),
        ({"config": {"a_later_invention": {"x": 1}}}, "a_later_invention="),
        ({"config": {"init_lora_weights": "pissa_niter_4"}}, "changed the base that the adapter stands on"),
        ({"config": {"r": "4"}}, "r is '4', not a whole number"),
        ({"config": {"r": 0}}, "must be 1 or more"),
        ({"config": {"lora_alpha": float("inf")}}, "alphas are .*; each must be finite"),
        ({"config": {"r": 4}}, r"lora_A.weight has shape \[3, 16\] where the config makes it \[4, 16\]"),
        ({"config": {"rank_pattern": {"q_proj": 4.5}}}, "rank_pattern: q_proj is 4.5, not a whole number"),
        ({"config": {"rank_pattern": {"(": 4}}}, "no pattern to search by"),
        ({"config": {"rank_pattern": {r"((.|..|...)*)*p": 4}}}, "no pattern to search by"),
        ({"config": {"target_modules": ["query"]}}, "names none of the modules"),
        ({"config": {"target_modules": [3]}}, "not a list of str"),
        ({"config": {"target_modules": ["q_proj", "v_proj"]}}, "down_proj.lora_A.weight has no place"),
        ({"config": {"use_dora": True}}, "lora_magnitude_vector is missing"),
        ({"config": {"layers_to_transform": [0]}}, r"layers.1.* has no place in this model"),
        ({"drop": "layers.1.self_attn.q_proj.lora_B"}, rf"{LAYER}.q_proj.lora_B.weight is missing$"),
        ({"rename": lambda key: key.replace("base_model.", "")}, "is missing; .*; and 19 more"),
        ({"more": {f"{LAYER}.q_proj.lora_B.bias": np.zeros(3, "f4")}}, "lora_B.bias has no place"),
        ({"more": {"base_model.model.lm_head.weight": np.zeros(3, "f4")}}, "lm_head.weight has no place"),
    ],
)
def test_what_does_not_fit_is_named(changes, said, tmp_path):
    folder = edited(tmp_path, "lora", **changes)
    with pytest.raises(ValueError, match=said) as told:
        Base("llama").load(folder)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)


def test_another_model_and_no_adapter_at_all_and_a_pickle_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"for this llama: weights and config disagree: .* has shape"):
        Base("llama-heads").load(FOLDER / "lora")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        peft.read(tmp_path)
    folder = edited(tmp_path, "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which runs any program"):
        Base("llama").load(folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="not a JSON object"):
        peft.describe(folder)


def test_a_tied_head_takes_the_adapter_of_the_embedding(tmp_path):
    tensors = load_file(FOLDER / "tied" / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lm_head.lora_A.weight"))
    folder = edited(tmp_path, "tied", more={key: tensors[key] + 1})
    with pytest.raises(ValueError, match="head and embedding are one matrix in this model"):
        Base("qwen2").load(folder)


def test_what_peft_has_no_counterpart_for_is_refused(tmp_path):
    base = Base("gpt2")
    for surgery, said in (
        (Vera(4), "blocks/attn/.*Vera has no counterpart there"),
        (Dora(2, where="*attn/q/w"), r"DoRA on blocks/attn/q/w alone; there it takes all of .*k/w, .*v/w"),
        (Dora(2, where="embed"), "embed: Dora has no counterpart"),
    ):
        with pytest.raises(ValueError, match=said):
            base.save(tmp_path, adapter(surgery(base.params, KEY)))
    mixed = Lora(2, where="*mlp/up/w")(Dora(2, where="*mlp/down/w")(base.params, KEY), KEY)
    with pytest.raises(ValueError, match="DoRA on all adapted matrices or on none"):
        base.save(tmp_path, adapter(mixed))
    assert isinstance(mixed["blocks"]["mlp"]["down"]["w"], DoraLeaf) and not list(tmp_path.iterdir())


def test_an_adapter_is_described_without_its_model():
    rows = peft.describe(FOLDER / "rslora")
    assert rows["kind"] == "rank-stabilised LoRA" and rows["base model"] == "qwen3"
    assert (
        rows["matrices"] == "2 self_attn.k_proj, 2 self_attn.o_proj, 2 self_attn.q_proj, 2 self_attn.v_proj"
    )
    n = sum(x.size for x in load_file(FOLDER / "rslora" / "adapter_model.safetensors").values())
    assert rows["parameters"] == f"{n:,}"
    assert peft.describe(FOLDER / "dora")["kind"] == "DoRA"


def test_extract_and_bank_of_the_embedding():
    base = Base("qwen2")
    alone = base.load(FOLDER / "tied")
    tuned = Merge()(attach(base.params, alone), KEY)
    found = adapt.extract(tuned, base.params, 3, where="embed")
    np.testing.assert_allclose(base.logits(found), base.logits(alone), rtol=0, atol=2e-5)
    both = adapt.bank(base.params, [alone, found], jnp.array([[1.0, 0.0]]))
    logits = base.apply(both, {"tokens": base.tokens}).logits
    np.testing.assert_allclose(logits, base.logits(alone), rtol=0, atol=2e-5)
    again = adapt.unmerge(tuned, attach(base.params, alone))
    np.testing.assert_allclose(again["embed"].base.base.T, base.params["embed"], rtol=0, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_is_written(kind, tmp_path):
    pytest.importorskip("peft")
    name, surgery = KINDS[kind]
    base, folder = Base(name), tmp_path / "अनुकूलक"
    alone = trained(base, surgery)
    base.save(folder, alone)
    apart, whole = logits_with(name, folder, np.asarray(base.tokens).tolist())
    np.testing.assert_allclose(apart, base.logits(alone), rtol=0, atol=1e-4)
    if kind != "tied ends":  # PEFT adds both adapters to the one matrix when it merges
        np.testing.assert_allclose(whole, base.logits(alone), rtol=0, atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_those_of_peft(name, tmp_path):
    pytest.importorskip("peft")
    make(name, tmp_path)
    again = load_file(tmp_path / "expected.safetensors")
    np.testing.assert_allclose(again["logits"], expected(name)["logits"], rtol=1e-4, atol=1e-5)
