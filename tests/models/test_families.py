"""Released families against transformers: what tiny random models of it answered lies in `families`, made by
`make_families.py`; with --peers the folders that we write are also read back by transformers itself."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_families import CASES, logits_of, make

from lmx.formats import safetensors
from lmx.generate import Sampling, generate
from lmx.losses import NextToken, Term, counts, total
from lmx.models import build, pretrained, weight_map

FOLDER = Path(__file__).parent / "families"
FIRST = list({kind: name for name, (kind, _) in reversed(CASES.items())}.values())
VARIED = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
"""One case of each family always, its variants with --slow."""


class Answers:
    """One model and what transformers says of it."""

    def __init__(self, name):
        self.folder = FOLDER / name
        self.found = pretrained.find(self.folder)
        self.params = pretrained.load(self.found)
        self.model = build(self.found.config)
        self.expected = {
            k: x.read() for k, x in safetensors.read(self.folder / "expected.safetensors").items()
        }
        self.tokens = jnp.asarray(self.expected["tokens"], jnp.int32)

    def logits(self, found, params):
        return jax.jit(build(found.config).apply)(params, {"tokens": self.tokens}).logits


@pytest.fixture(scope="module", params=VARIED)
def case(request):
    return Answers(request.param)


def test_logits(case):
    found = case.logits(case.found, case.params)
    assert np.std(case.expected["logits"]) > 0.1
    np.testing.assert_allclose(found, case.expected["logits"], rtol=0, atol=2e-5)


def test_loss_and_its_gradient(case):
    batch = {
        "tokens": case.tokens,
        "labels": jnp.roll(case.tokens, -1, 1),
        "loss_mask": jnp.ones(case.tokens.shape, jnp.float32).at[:, -1].set(0),
    }
    objective = {"ce": Term(NextToken())}

    def loss(params):
        return total(objective, case.model.apply(params, batch), batch, counts(objective, batch))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(case.params)
    np.testing.assert_allclose(value, case.expected["loss"], rtol=1e-5)
    theirs = dict(weight_map.dump(case.found.entries, grads, np.dtype(np.float32)))
    assert {f"grad:{name}" for name in theirs} == {name for name in case.expected if name.startswith("grad:")}
    for name, grad in theirs.items():
        want = case.expected[f"grad:{name}"]
        np.testing.assert_allclose(grad, want, rtol=0, atol=1e-5 + 1e-4 * np.abs(want).max(), err_msg=name)


class NoTokenizer:
    bos_id = eos_id = None
    end_ids = ()
    vocab_size = 48

    def token_bytes(self, i):
        return b"x"

    def decode(self, ids, specials=False):
        return "x" * len(ids)


def test_greedy_tokens(case):
    prompts = [row[:6].tolist() for row in np.asarray(case.tokens)]
    done = generate(case.model, case.params, NoTokenizer(), prompts, Sampling(temperature=0, max_tokens=64))
    assert [list(one.tokens) for one in done] == case.expected["greedy"].tolist()


def test_comes_back_byte_for_byte(case, tmp_path):
    pretrained.save(tmp_path, case.found.config, case.params, like=case.found.fields)
    ours, theirs = (safetensors.read(folder) for folder in (tmp_path, case.folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and tensor.read().tobytes() == ours[name].read().tobytes(), (
            name
        )
    again = pretrained.find(tmp_path)
    assert again.config == case.found.config and again.context == case.found.context


def test_without_its_own_config_it_is_written_as_a_family_that_computes_the_same(case, tmp_path):
    pretrained.save(tmp_path, case.found.config, case.params, context=128)
    again = pretrained.find(tmp_path)
    found = case.logits(again, pretrained.load(again))
    np.testing.assert_allclose(found, case.expected["logits"], rtol=0, atol=2e-5)


@pytest.mark.peers
def test_transformers_reads_what_is_written(case, tmp_path):
    pytest.importorskip("transformers")
    for name, like in (("like", case.found.fields), ("new", None)):
        pretrained.save(tmp_path / name, case.found.config, case.params, like=like, context=128)
        found = logits_of(tmp_path / name, np.asarray(case.tokens).tolist())
        np.testing.assert_allclose(found, case.expected["logits"], rtol=0, atol=2e-5)


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    make(name, tmp_path)
    again = safetensors.read(tmp_path / "expected.safetensors")
    for key, tensor in safetensors.read(FOLDER / name / "expected.safetensors").items():
        np.testing.assert_allclose(tensor.read(), again[key].read(), rtol=1e-5, atol=1e-6, err_msg=key)
