"""lmx train on pairs of replies, from a released model with an adapter: it comes to prefer what it is told to."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import run as runs
from lmx.cli import eval
from lmx.data import Bpe
from lmx.models import TransformerConfig, build, pretrained
from lmx.nn import AttentionConfig
from lmx.train import stored
from lmx.train.checkpoint import steps

TEMPLATE = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
EXPERIMENT = '''"""Does a model come to prefer short answers in Hindi?"""

from lmx import Run
from lmx.adapt import Lora
from lmx.data import Data, File, Preferences
from lmx.losses import Dpo, Margin, Preferred, Term
from lmx.models import pretrained
from lmx.optim import AdamW
from lmx.train import Load, Reference


def base():
    return Run(
        model=pretrained.find("base").config,
        start=(Load("base"), Lora(rank=4)),
        trainable="*/w/[ab]",
        data=Data((Preferences("pairs.jsonl"),), valid_share=0.2, tokenizer=File("base"), seq_len=128, batch_size=8),
        objective={
            "dpo": Term(Dpo(), mask="pair_mask"),
            "margin": Term(Margin(), 0.0, "pair_mask"),
            "accuracy": Term(Preferred(), 0.0, "pair_mask"),
        },
        enrich=Reference(),
        optim=AdamW(lr=1e-2),
        steps=24,
        eval_every=6,
        save_every=12,
        patience=2,
    )
'''


@pytest.fixture(scope="module")
def trained(folder):
    rows = [
        {"prompt": f"सवाल {i}?", "chosen": f"जवाब {i}।", "rejected": f"A long answer, number {i}."}
        for i in range(40)
    ]
    bad = [{"prompt": "x", "chosen": "y", "rejected": "y"}, {"prompt": "x", "chosen": "y"}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, *bad])))
    tokenizer = Bpe(300).train([" ".join((*row.values(), "user assistant")) for row in rows])
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, attention=AttentionConfig(2), init_std=0.3
    )
    ids = {
        name: tokenizer.token_id(token)
        for name, token in (("bos_token_id", "<|bos|>"), ("eos_token_id", "<|eos|>"))
    }
    params = build(config).init(jax.random.key(0))
    pretrained.save(folder / "base", config, params, like=ids | {"pad_token_id": 0}, context=128)
    tokenizer.save(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "prefer.py").write_text(EXPERIMENT)
    return folder, rows


def test_the_margin_grows_and_a_resumed_run_is_the_same(trained, lmx):
    folder, rows = trained
    with pytest.warns(
        UserWarning, match=r"skipped \d equal replies: pairs.jsonl:41 .*; skipped \d field missing"
    ):
        printed = lmx("train", "prefer.py", "--out", "preferring")
    assert "preferring: 24 steps, loss" in printed and "held out 0." in printed
    lines = [json.loads(line) for line in (folder / "preferring" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if "margin" in line)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and last["margin"] > 0.5 > abs(
        first["margin"]
    )
    held_out = [line for line in lines if "valid/loss" in line]
    assert held_out[-1]["valid/accuracy"] == 1 and held_out[-1]["valid/loss"] < held_out[0]["valid/loss"]
    assert "valid/margin" in (folder / "preferring" / "report.html").read_text()

    before, after = runs.trained(folder / "base"), runs.trained(folder / "preferring")

    def log_p(model, prompt, reply):
        said = [{"role": "user", "content": prompt}]
        ids = model.chat.ids(model.tokenizer, said)
        whole = ids + model.tokenizer.encode(reply)
        logits = model.model.apply(model.params, {"tokens": jnp.array([whole], jnp.int32)}).logits[0]
        told = jax.nn.log_softmax(logits)[jnp.arange(len(whole) - 1), jnp.array(whole[1:])]
        return float(told[len(ids) - 1 :].sum())

    for row in rows[:3]:
        gains = [
            log_p(after, row["prompt"], row[name]) - log_p(before, row["prompt"], row[name])
            for name in ("chosen", "rejected")
        ]
        assert gains[0] > gains[1] + 3, gains

    shutil.copytree(folder / "preferring", folder / "preferring-cut")
    checkpoints = folder / "preferring-cut" / "checkpoints"
    for step in steps(checkpoints):
        saved = stored.about(checkpoints / str(step))["tree"]
        assert not any(path.startswith(("constants", "frozen")) for path in saved)
        if step > 12:
            shutil.rmtree(checkpoints / str(step))
    with pytest.warns(UserWarning, match="equal replies"):
        assert "preferring-cut: 24 steps" in lmx("train", "prefer.py", "--out", "preferring-cut")
    jax.tree.map(np.testing.assert_array_equal, after.params, runs.trained(checkpoints.parent).params)
    with pytest.raises(ValueError, match="held out answers, and eval judges texts"):
        eval.main(["preferring"])


def test_patience_is_told_in_the_terminal_and_in_the_report(trained, lmx):
    folder, _ = trained
    with pytest.warns(UserWarning, match="equal replies"):
        printed = lmx("train", "prefer.py", "--out", "patient", "--set", "optim.lr=0.0", "--set", "steps=90")
    lines = [json.loads(line) for line in (folder / "patient" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 18, "the first evaluation is the lowest: none is lower"
    told = "18 steps of 90, stopped early: 2 evaluations without a valid/loss lower than 0.6931 of step 6; loss 0.6931"
    assert told in printed
    assert "Stopped early: 2 evaluations without" in (folder / "patient" / "report.html").read_text()
    with pytest.warns(UserWarning, match="equal replies"):
        again = lmx("train", "prefer.py", "--out", "patient", "--set", "optim.lr=0.0", "--set", "steps=90")
    assert "patient is complete at step 18; nothing to do" in again
