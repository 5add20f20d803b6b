"""Fine-tuning on conversations: the loss is that of replies, packed or alone, and nothing else moves it."""

import json

import jax
import numpy as np
import pytest

from lmx.data import Batches, Bpe, Chat, Data, prepare
from lmx.data.store import TokenStore, Writer
from lmx.losses import NextToken, Term, counts, total
from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig

OBJECTIVE = {"ce": Term(NextToken())}
SAID = [
    [("What is 2 + 2?", "Four."), ("और हिन्दी में?", "चार।")],
    [("नमस्ते, आप कैसे हैं?", "मैं ठीक हूँ, धन्यवाद।")],
    [("Name a fruit.", "पपीता"), ("Another.", "A plum, or अनार."), ("Thanks.", "खुशी हुई।")],
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replies")
    rows = [
        {
            "messages": [
                {"role": r, "content": x} for pair in said for r, x in zip(("user", "assistant"), pair)
            ]
        }
        for said in SAID
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Chat(str(folder / "a.jsonl"))
    data = Data(train=(source,), valid_share=0.0, tokenizer=Bpe(280), seq_len=400, batch_size=1)
    with pytest.warns(UserWarning, match="comes without a chat template"):
        return prepare(data, folder / "cache")


@pytest.fixture(scope="module")
def model(prepared):
    """(params, batch -> logits, batch -> (loss, gradient)) of a small model, each compiled once for a shape."""
    config = TransformerConfig(
        vocab_size=prepared.tokenizer.vocab_size,
        d_model=32,
        n_layers=1,
        attention=AttentionConfig(n_heads=2),
        init_std=0.2,
    )
    made = build(config)
    params = made.init(jax.random.key(0))

    def loss(params, batch):
        return total(OBJECTIVE, made.apply(params, batch), batch, counts(OBJECTIVE, batch))[0]

    logits = jax.jit(lambda batch: made.apply(params, batch).logits)
    graded = jax.jit(jax.value_and_grad(loss))
    return lambda batch: np.asarray(logits(batch), np.float64), lambda batch: graded(params, batch)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of(model, batch):
    """(loss, gradient) of a batch."""
    value, grads = jax.device_get(model[1](batch))
    return float(value), np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])


def test_labels_of_prompts_change_nothing_and_each_of_a_reply_does(prepared, model):
    batch = prepared.train.batch(0)
    assert batch["segment_ids"].max() == 3, "all conversations lie in one row"
    loss, grads = of(model, batch)
    V = prepared.tokenizer.vocab_size
    counted = batch["loss_mask"] > 0
    asked = batch | {"labels": np.where(counted, batch["labels"], (batch["labels"] + 7) % V)}
    assert (asked["labels"] != batch["labels"]).sum() > 40
    again, same = of(model, asked)
    assert again == loss and (same == grads).all()
    logp = log_softmax(model[0](batch))
    n = counted.sum()
    for _, t in np.argwhere(counted)[:: int(n) // 8]:
        other = batch["labels"].copy()
        other[0, t] = (other[0, t] + 7) % V
        change = (logp[0, t, batch["labels"][0, t]] - logp[0, t, other[0, t]]) / n
        assert abs(change) > 1e-4
        assert of(model, batch | {"labels": other})[0] - loss == pytest.approx(change, rel=1e-3, abs=2e-6)


def test_what_is_asked_is_read_all_the_same(prepared, model):
    """Prompts are no targets, but what replies are conditioned on."""
    batch = prepared.train.batch(0)
    first = np.argwhere(batch["loss_mask"][0] > 0)[0, 0]
    tokens = batch["tokens"].copy()
    tokens[0, first - 3] = (tokens[0, first - 3] + 7) % prepared.tokenizer.vocab_size
    assert abs(of(model, batch | {"tokens": tokens})[0] - of(model, batch)[0]) > 1e-4


def test_packed_conversations_have_the_loss_and_gradient_that_they_have_alone(prepared, model, tmp_path):
    (store,) = prepared.train_stores
    packed = prepared.train.batch(0)
    losses, grads, n = [], [], []
    for i, document in enumerate(store):
        at = slice(int(store.offsets[i]), int(store.offsets[i + 1]))
        with Writer(tmp_path / f"{i}", prepared.tokenizer.vocab_size, masked=True) as writer:
            writer.facts["keep"] = "head"
            writer.add(document, mask=store.mask[at])
        batch = Batches((TokenStore(str(tmp_path / f"{i}")),), 400, 1).batch(0)
        assert batch["segment_ids"].max() == 1
        loss, grad = of(model, batch)
        losses.append(loss)
        grads.append(grad)
        n.append(batch["loss_mask"].sum())
    loss, grad = of(model, packed)
    assert packed["loss_mask"].sum() == sum(n)
    assert loss == pytest.approx(np.dot(losses, n) / sum(n), rel=1e-5)
    alone = np.tensordot(np.array(n) / sum(n), np.array(grads), 1)
    np.testing.assert_allclose(grad, alone, atol=1e-5 * np.abs(alone).max())


def test_the_loss_of_replies_is_what_is_written_down(prepared, model):
    """The mean over the reply tokens of -log p, in float64, of the labels that decode to the replies."""
    batch = prepared.train.batch(0)
    logp = log_softmax(model[0](batch))
    at = batch["loss_mask"][0] > 0
    labels = batch["labels"][0]
    text = prepared.tokenizer.decode(labels[at], specials=True)
    assert sorted(text.split("<|eos|>")[:-1]) == sorted(reply for said in SAID for _, reply in said)
    mean = -logp[0, np.flatnonzero(at), labels[at]].mean()
    assert of(model, batch)[0] == pytest.approx(mean, rel=1e-5)
