"""Chapter: what the model writes."""

from __future__ import annotations

from lmx.generate import Sampling, generate
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page
from lmx.run import trained

PROMPTS = ("KING.\n", "O, what a ", "भारत के ", "सरकार ने कहा ")


def run(tour: Tour) -> dict:
    model = trained(tour.facts["pretrain"]["folder"])
    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=80, seed=tour.options.seed)
    written = generate(model.model, model.params, model.tokenizer, list(PROMPTS), sampling)
    for prompt, completion in zip(PROMPTS, written):
        tour.say(f"   {prompt.strip()} … {' '.join(completion.text.split())[:90]}")
    return {
        "samples": [
            {"prompt": p, "text": c.text, "note": f"{len(c.tokens)} tokens, {c.reason}"}
            for p, c in zip(PROMPTS, written)
        ]
    }


def show(tour: Tour, facts: dict) -> tuple:
    return (
        page.Samples(tuple(page.Sample(**sample) for sample in facts["samples"])),
        page.Text(
            "Temperature 0.7, top-p 0.95. A model of a million parameters has learned spelling, not sense.",
            "quiet",
        ),
    )


CHAPTER = Chapter("sample", "Words: what it writes", run, show)
