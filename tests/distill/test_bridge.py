"""A teacher of another tokenizer: where two tokenizations meet, what it says there against sums over its own words, and
a student that learns from it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.data import Bpe, Byte, Data, Documents, TeacherTopK, Word, prepare
from lmx.data.taught import UNITS
from lmx.distill import label
from lmx.distill.bridge import Bridge
from lmx.losses import ForwardKL, Term, Uld
from lmx.models import build
from lmx.models.presets import llama
from lmx.optim import AdamW
from lmx.run import Run, Trained
from lmx.train import session

LINES = ("नदी {} नावों को ले जाती है", "the river carries {} boats", "क्षेत्र {}: पुरानी चक्कियाँ", "{} 👩‍👧")
TEXTS = (*(LINES[i % 4].format(i * i) for i in range(40)), "एक बहुत लंबा वाक्य, " * 4)


def data(tokenizer, **more):
    return Data((Documents(TEXTS),), valid_share=0.0, tokenizer=tokenizer, seq_len=256, batch_size=4, **more)


def teacher_of(tokenizer, seed=0):
    model = build(replace(llama(16, 2, 2), vocab_size=tokenizer.vocab_size + 3))
    params = jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, model.init(jax.random.key(seed)))
    return Trained(Run(), model, params, tokenizer, None, 512)


@pytest.fixture
def origin(tmp_path):
    path = tmp_path / "teacher"
    path.write_text("शिक्षक")
    return [path]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Byte(), Bpe(330)), (Bpe(330), Byte()), (Bpe(300), Bpe(420)), (Bpe(330), Bpe(330))]
)
def test_labels_are_what_the_teacher_says_in_the_students_words(ours, theirs, origin, tmp_path):
    """By brute force: the teacher alone reads each document, and its words are sorted into tokens of the student."""
    made = prepare(data(ours), tmp_path / "cache")
    teacher = teacher_of(theirs.train(TEXTS))
    here, there, words = made.tokenizer, teacher.tokenizer, made.tokenizer.vocab_size
    if ours == theirs:
        there = teacher.tokenizer.without("bos_token")  # the same words in a tokenizer of another hash
        teacher = teacher._replace(tokenizer=there)
    k = min(words, 12)
    label(
        teacher,
        made,
        tmp_path / "labels",
        origin=origin,
        k=k,
        context=256,
        batch_tokens=512,
        shard_tokens=400,
    )
    (store,) = made.train_stores
    found = TeacherTopK(str(tmp_path / "labels")).opened(store, 256, "best_fit")
    first, n_known = [begins_with(here, there, w) for w in range(there.vocab_size)], 0
    for a, b in zip(store.offsets[:-1], store.offsets[1:]):
        ids = store.tokens[a:b].tolist()
        theirs_ids = ([] if there.bos_id is None else [there.bos_id]) + there.encode(here.decode(ids))
        batch = {"tokens": jnp.array([theirs_ids])}
        logits = np.asarray(teacher.model.apply(teacher.params, batch).logits, np.float64)[
            0, :, : there.vocab_size
        ]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        ends = {len(b"".join(map(there.token_bytes, theirs_ids[: u + 1]))): u for u in range(len(theirs_ids))}
        got_ids, got, known = found.read(np.arange(a, b))
        for t in range(len(ids) - 1):
            u = ends.get(len(b"".join(map(here.token_bytes, ids[: t + 1]))))
            assert known[t] == (u is not None)
            if u is None:
                continue
            n_known += 1
            right = np.zeros(words)
            for w, v in enumerate(first):
                if v is not None:
                    right[v] += p[u, w]
            best = -np.sort(-right)[:k]
            off = 1.5 / UNITS[16]
            seen = best > np.exp(-30)
            np.testing.assert_allclose(got[t][seen], np.log(best[seen]), atol=off + 1e-3)
            np.testing.assert_allclose(np.log(right[got_ids[t]][seen]), np.log(best[seen]), atol=1e-3)
    assert n_known > 0.3 * sum(map(len, map(here.encode, TEXTS))) or ours == Byte()
    assert n_known > 200


def begins_with(here, there, w):
    """The student's token for the beginning of a word of the teacher's, or None."""
    word = there.token_bytes(w)
    if w == there.eos_id:
        return here.eos_id
    if not word:
        return None
    try:
        return here.encode(word.decode())[0]
    except UnicodeDecodeError:
        fits = [(len(here.token_bytes(v)), -v) for v in range(here.vocab_size) if here.token_bytes(v)
                and word.startswith(here.token_bytes(v))]  # fmt: skip
        return -max(fits)[1]


def test_a_tokenizer_that_loses_text_is_refused():
    with pytest.raises(ValueError, match=r"the teacher.s tokenizer changes texts .* lmx distill write"):
        Bridge(Word(40).train(TEXTS), Byte().train())


@pytest.mark.parametrize("loss", [ForwardKL(), Uld()])
def test_a_student_learns_where_both_meet_and_nowhere_else(loss, origin, tmp_path):
    teacher = teacher_of(Bpe(330).train(TEXTS))
    made = prepare(data(Byte()), tmp_path / "cache")
    label(teacher, made, tmp_path / "labels", origin=origin, k=16, context=256)
    run = Run(
        model=llama(16, 1, 2),
        data=data(Byte(), teacher=TeacherTopK(str(tmp_path / "labels"))),
        objective={"kd": Term(loss, mask="teacher_mask")},
        optim=AdamW(lr=1e-2),
        steps=20,
    )
    ready = session(run, cache=tmp_path / "cache", devices=jax.devices()[:1])
    batch = ready.prepared.train.batch(0)
    assert 0 < batch["teacher_mask"].sum() < batch["loss_mask"].sum()
    assert not batch["teacher_mask"][batch["loss_mask"] == 0].any()
    state, seen = ready.program.init(0), []
    for n in range(20):
        state, told = ready.program.step(state, ready.program.place(ready.prepared.train.batch(n)))
        seen.append(float(told["loss"]))
    assert np.mean(seen[-4:]) < np.mean(seen[:4])
    assert float(told["tokens"]) < ready.prepared.train.batch(19)["loss_mask"].sum()
