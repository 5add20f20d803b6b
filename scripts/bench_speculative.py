"""Speculative decoding beside plain decoding: what a small draft accepts, and the time of a token, in one run.

    python scripts/bench_speculative.py SmolLM2-135M-Instruct.gguf --train-steps 120 --out speculative.json

The draft is the first layers of the target under the target's own embedding, norm and head: as cut, and, with
--train-steps, trained on what the target writes after other prompts than those measured (Kim & Rush 2016,
arXiv:1606.07947, section 3.2), or on --text. One prompt at a time, in English and in Hindi, greedy and at
temperature 0.8. A round gives each contender all prompts in turn, so that a machine that speeds up or slows down
does so for all. Prints the share of drafted tokens accepted, tokens per step of the target, the median
milliseconds of a token, prompts included, and how many times as fast that is as `generate`.

What bounds it is measured by itself: with c the time of a draft's step and d that of a check of n + 1 tokens, in
steps of the target over one token, n tokens all accepted would be (n + 1) / (n c + d) times as fast.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from bench_train import describe_machine

import lmx
from lmx import tree
from lmx.data import Data, Documents, Text
from lmx.data.tokenizer import File
from lmx.generate import Acceptance, Draft, Sampling, generate, speculate
from lmx.losses import Chunked, NextToken, Term
from lmx.models import build
from lmx.optim import AdamW
from lmx.run import Trained, trained

PROMPTS = {
    "English": (
        "The capital of India is",
        "Water boils when",
        "To bake bread, first",
        "Once upon a time, in a small village,",
    ),
    "Hindi": (
        "भारत की राजधानी",
        "एक समय की बात है, एक छोटे गाँव में",
        "पानी जब उबलता है,",
        "रोटी बनाने के लिए सबसे पहले",
    ),
}
OPENINGS = (  # what the target writes its training text after
    "The history of", "In this article we", "A good teacher", "My grandmother", "The river", "Scientists have found",
    "How to write", "Question: Why", "The largest city", "Music is", "When the rain stopped,", "def main():",
    "हमारे देश में", "सूरज निकलते ही", "विज्ञान के अनुसार", "मेरी माँ ने", "नदी के किनारे", "शिक्षा का महत्व",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file, a Hugging Face folder or a run")
    parser.add_argument("--layers", type=int, default=3, help="of the target that the draft keeps")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument(
        "--train-steps", type=int, default=0, help="updates of 512 tokens; 0 measures the cut alone"
    )
    parser.add_argument("--text", type=Path, help="train on this text, not on the target's own")
    parser.add_argument("--samples", type=int, default=256, help="texts of 128 tokens that the target writes")
    parser.add_argument("--prompts", type=int, default=4, help="measured in each language, up to 4")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every time as JSON")
    asked = parser.parse_args()
    model = trained(asked.model)
    drafts = {"cut": cut(model, asked.layers)}
    if asked.train_steps:
        drafts["trained"] = taught(model, drafts["cut"], asked)
    about = describe_machine("jax", "jaxlib") | {
        "target": f"{asked.model.name}, {model.run.model.n_layers} layers, {tree.count(model.params) / 1e6:.1f}M",
        "draft": f"{asked.layers} layers, {tree.count(drafts['cut'].params) / 1e6:.1f}M parameters, of which "
        f"{model.run.model.vocab_size * model.run.model.d_model / 1e6:.1f}M the head",
        "training": f"{asked.train_steps} steps of 512 tokens, text: "
        + (asked.text.name if asked.text else f"{asked.samples} texts of the target"),
        "asked": f"{asked.prompts} prompts, {asked.max_tokens} tokens, {asked.rounds} rounds, seed {asked.seed}",
    }
    for name, value in about.items():
        print(f"{name:10} {value}")
    costs = bounds(model, drafts["cut"], asked.draft_tokens)
    results = [
        result
        for temperature in (0.0, 0.8)
        for language in PROMPTS
        for result in measured(model, drafts, language, temperature, asked)
    ]
    if asked.out:
        found = {"about": about, "costs": costs, "results": results}
        asked.out.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")


def cut(model: Trained, n_layers: int) -> Draft:
    """The first layers of a model, with its embedding, norm and head."""
    blocks = jax.tree.map(lambda x: x[:n_layers], model.params["blocks"])
    # Unrolled, as few layers are on a CPU, a step copies each layer's weights out of the stack: 2.7 times the time.
    config = replace(model.run.model, n_layers=n_layers, unroll=1)
    return Draft(build(config), model.params | {"blocks": blocks})


def taught(model: Trained, draft: Draft, asked) -> Draft:
    """The draft after next-token training, all of its parameters, on what the target wrote or on a text."""
    source = Text(str(asked.text)) if asked.text else Documents(written(model, asked))
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder) / "tokenizer")
        tokenizer = File(str(Path(folder) / "tokenizer"))
        run = lmx.Run(
            model=draft.model.config,
            data=Data(
                (source,), tokenizer=tokenizer, valid_share=0.1, seq_len=128, batch_size=4, clean=False
            ),
            objective={"ce": Term(Chunked(NextToken(), 64))},
            optim=AdamW(lr=3e-4),
            steps=asked.train_steps,
            eval_batches=16,
            seed=asked.seed,
        )
        session = lmx.train.session(run)
        begin = time.perf_counter()
        state = replace(session.init(), trainable=jax.tree.map(jax.numpy.copy, draft.params))
        before = session.evaluate(state)["valid/loss"]
        for state, _ in session.steps(state):
            pass
        after = session.evaluate(state)["valid/loss"]
    print(
        f"trained    {time.perf_counter() - begin:.0f} s, held-out loss {before:.2f} to {after:.2f} nats per token"
    )
    return Draft(draft.model, state.params)


def written(model: Trained, asked) -> tuple[str, ...]:
    """What the target writes by itself after the openings, their turn coming again."""
    begin, texts = time.perf_counter(), []
    for start in range(0, asked.samples, 64):
        rows = range(start, min(start + 64, asked.samples))
        prompts = [OPENINGS[row % len(OPENINGS)] for row in rows]
        sampling = Sampling(temperature=1.0, max_tokens=128, seed=asked.seed + 1)
        found = generate(model.model, model.params, model.tokenizer, prompts, sampling, rows=rows)
        texts += [prompt + completion.text for prompt, completion in zip(prompts, found)]
    print(f"written    {len(texts)} texts in {time.perf_counter() - begin:.0f} s")
    return tuple(texts)


def bounds(model: Trained, draft: Draft, counts: list[int]) -> dict[str, float]:
    """Milliseconds of a step of each, and what they would allow if all were accepted."""
    one = seconds(model.model, model.params, 1)
    small = seconds(draft.model, draft.params, 1)
    found = {"target, 1 token": 1e3 * one, "draft, 1 token": 1e3 * small}
    print(f"\nsteps      target {1e3 * one:.1f} ms, draft {1e3 * small:.1f} ms: c = {small / one:.2f}")
    for n in counts:
        check = seconds(model.model, model.params, n + 1)
        found[f"target, {n + 1} tokens"] = 1e3 * check
        print(
            f"           check of {n + 1} tokens {1e3 * check:.1f} ms: d = {check / one:.2f}; breaks even at "
            f"{(n * small + check) / one:.2f} tokens per step, all {n + 1} are "
            f"{(n + 1) * one / (n * small + check):.2f} times as fast"
        )
    return found


def seconds(model, params, n: int) -> float:
    """Median time of a step over n tokens and of the likeliest token after each."""

    @jax.jit
    def step(params, cache, tokens):
        out, cache = model.step(params, cache, tokens)
        return out.logits.argmax(-1), cache.length

    cache, tokens, times = model.new_cache(1, 64), np.ones((1, n), np.int32), []
    for _ in range(16):
        begin = time.perf_counter()
        jax.block_until_ready(step(params, cache, tokens))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def measured(
    model: Trained, drafts: dict[str, Draft], language: str, temperature: float, asked
) -> list[dict]:
    """A table of the contenders on one language's prompts, and its rows."""
    sampling = Sampling(temperature=temperature, max_tokens=asked.max_tokens, seed=asked.seed)
    parts = model.model, model.params, model.tokenizer

    prompts = PROMPTS[language][: asked.prompts]

    def plain():
        return [generate(*parts, [prompt], sampling)[0] for prompt in prompts], None

    def drafted(draft):
        found = [speculate(*parts, [prompt], sampling, draft=draft) for prompt in prompts]
        return [c for (c,), _ in found], sum((acceptance for _, acceptance in found), Acceptance(0, 0, 0))

    contenders = {"generate": plain} | {
        f"{name} {n}": lambda draft=replace(draft, n_tokens=n): drafted(draft)
        for n in asked.draft_tokens
        for name, draft in drafts.items()
    }
    answers = {name: contender() for name, contender in contenders.items()}  # compiles
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(asked.rounds):
        for name, contender in contenders.items():
            begin = time.perf_counter()
            completions, _ = contender()
            tokens = sum(len(c.tokens) for c in completions)
            times[name].append(1e3 * (time.perf_counter() - begin) / tokens)
    print(f"\n{language}, {'greedy' if temperature == 0 else f'temperature {temperature}'}")
    print(f"{'':12} {'accepted':>9} {'tokens/step':>12} {'ms/token':>9} {'times':>6}  same as generate")
    results, base = [], statistics.median(times["generate"])
    for name, (completions, acceptance) in answers.items():
        median = statistics.median(times[name])
        same = sum(c.tokens == g.tokens for c, g in zip(completions, answers["generate"][0]))
        counted = (
            (f"{acceptance.rate:9.1%}", f"{acceptance.tokens_per_step:12.2f}")
            if acceptance
            else (" " * 9, " " * 12)
        )
        agreed = f"{same} of {len(completions)}" if temperature == 0 and acceptance else ""
        print(f"{name:12} {' '.join(counted)} {median:9.1f} {base / median:6.2f}  {agreed}", flush=True)
        results.append(
            {"language": language, "temperature": temperature, "contender": name, "ms_per_token": times[name]}
            | ({"drafted": acceptance.drafted, "accepted": acceptance.accepted, "steps": acceptance.steps, "same": same}
               if acceptance else {})
        )  # fmt: skip
    return results


if __name__ == "__main__":
    main()
