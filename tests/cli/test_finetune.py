"""lmx train on conversations, from a released model with its own template to a run that can be talked to."""

import json

import jax
import jax.numpy as jnp
import pytest

from lmx import run as runs
from lmx.cli import eval
from lmx.data import Bpe
from lmx.models import TransformerConfig, build, pretrained
from lmx.nn import AttentionConfig

FRUIT = ("आम", "सेब", "केला")
TEMPLATE = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
EXPERIMENT = '''"""Does a model learn what to reply, and only that?"""

from lmx import Run
from lmx.adapt import Lora
from lmx.data import Chat, Data, File
from lmx.models import pretrained
from lmx.optim import AdamW
from lmx.train import Load


def base():
    return Run(
        model=pretrained.find("small").config,
        start=(Load("small"), Lora(rank=4)),
        trainable="*/w/[ab]",
        data=Data(
            train=(Chat("replies.jsonl"),),
            valid=(Chat("replies.jsonl"),),
            tokenizer=File("small"),
            seq_len=64,
            batch_size=8,
        ),
        optim=AdamW(lr=5e-2),
        steps=30,
        eval_every=15,
    )
'''


@pytest.fixture(scope="module")
def trained(folder):
    said = [(f"फल {i}?", FRUIT[i % 3]) for i in range(40)]
    rows = [{"prompt": asked, "completion": reply} for asked, reply in said]
    (folder / "replies.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"prompt": "x", "completion": ""}]))
    )
    tokenizer = Bpe(288).train([f"{a} {b} user assistant" for a, b in said])
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, attention=AttentionConfig(2), init_std=0.3
    )
    ids = {
        name: tokenizer.token_id(token)
        for name, token in (("bos_token_id", "<|bos|>"), ("eos_token_id", "<|eos|>"))
    }
    pretrained.save(
        folder / "small",
        config,
        build(config).init(jax.random.key(0)),
        like=ids | {"pad_token_id": 0},
        context=128,
    )
    tokenizer.save(folder / "small")
    (folder / "small" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "finetune.py").write_text(EXPERIMENT)
    return folder, tokenizer


def test_replies_are_learned_through_the_models_own_template(trained, lmx):
    folder, tokenizer = trained
    with pytest.warns(UserWarning, match=r"the run's text: skipped 2 empty reply: replies.jsonl:41"):
        printed = lmx("train", "finetune.py", "--out", "tuned")
    assert "30 steps" in printed
    lines = [json.loads(line) for line in (folder / "tuned" / "metrics.jsonl").read_text().splitlines()]
    valid = [line["valid/loss"] for line in lines if "valid/loss" in line]
    assert valid[-1] < 2.0 < lines[0]["loss"], (valid, lines[0]["loss"])
    model = runs.trained(folder / "tuned")
    assert model.chat.source == TEMPLATE and model.context == 128
    made = json.loads((folder / "tuned" / "data.json").read_text())
    positions = replied = 0
    for i in range(40):
        said = [{"role": "user", "content": f"फल {i}?"}, {"role": "assistant", "content": FRUIT[i % 3]}]
        positions += len(model.chat.ids(tokenizer, said, add_generation_prompt=False)) - 1
        replied += len(tokenizer.encode(FRUIT[i % 3])) + 1
    assert made["loss_share"] == pytest.approx(replied / positions * (1 - made["padding_share"]))
    assert f"{made['loss_share']:.1%} of the tokens" in lmx("info", "tuned")
    assert made["text"]["skipped"] == {"empty_reply": 2}
    assert "loss_share" in (folder / "tuned" / "report.html").read_text()

    with pytest.raises(
        ValueError, match=r"tuned held out answers, and eval judges texts; .*lmx eval tuned TEXT"
    ):
        eval.main(["tuned"])

    prompt = model.chat.ids(model.tokenizer, [{"role": "user", "content": "फल 4?"}])
    logits = model.model.apply(model.params, {"tokens": jnp.array([prompt], jnp.int32)}).logits[0, -1]
    assert int(logits.argmax()) in {tokenizer.encode(fruit)[0] for fruit in FRUIT}
