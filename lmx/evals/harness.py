"""Any model in lm-evaluation-harness: every task of theirs, with our likelihoods and our decoding.

    import lm_eval
    found = lm_eval.simple_evaluate(model=harness(trained("model.gguf")), tasks=["arc_easy"])

Texts are encoded and cut as their `hf` model does it: special tokens in a text are special, a text that is too long
loses its beginning, and long documents are read in windows of the whole context.
Source: lm_eval 0.4, api/model.py and models/huggingface.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmx.evals.likelihood import log_likelihoods
from lmx.generate import Sampling, generate
from lmx.tasks import Encoded

if TYPE_CHECKING:
    from lmx.run import Trained

MAX_TOKENS = 256
"""Of a completion whose task does not say."""
DRAWN = ("top_k", "top_p", "min_p", "repetition_penalty")


def harness(model: Trained, *, batch_tokens: int = 2048, batch_size: int | None = None) -> Any:
    """The model as an `lm_eval.api.model.TemplateLM`.

    Args:
      batch_tokens: read at once for likelihoods, padding included. batch_size: completions written at once.
    Raises: ImportError naming what to install.
    """
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise ImportError("the harness is lm_eval's: pip install lm-eval") from None
    fast, tokenizer, chat = model.for_decoding(), model.tokenizer, model.chat

    class Harness(TemplateLM):
        max_length = model.context
        tokenizer_name = model.tokenizer.hash

        @property
        def eot_token_id(self):
            return tokenizer.eos_id

        @property
        def prefix_token_id(self):
            return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            ids = tokenizer.encode(string, specials=True)
            begin = [] if tokenizer.bos_id is None or add_special_tokens is False else [tokenizer.bos_id]
            return ids if ids[: len(begin)] == begin else begin + ids

        def chat_template(self, chat_template=False):
            return chat.source if chat_template and chat else None

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            if chat is None:
                raise ValueError("this model has no chat template; leave apply_chat_template out")
            text = chat.render(chat_history, add_generation_prompt)
            if add_generation_prompt:
                return text
            last = chat_history[-1]["content"].strip()  # a reply that is begun, and to be gone on with
            return text[: text.rindex(last) + len(last)]

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            asked = [_cut(before, after, self.max_length) for _, before, after in requests]
            found = log_likelihoods(fast.model, fast.params, tokenizer, asked, batch_tokens=batch_tokens)
            answers = [(float(x.sum()), bool(top.all())) for x, top in zip(found.nats, found.likeliest)]
            for (words, *_), answer in zip(requests, answers):
                if words is not None:
                    self.cache_hook.add_partial("loglikelihood", words, answer)
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows, n_windows = [], []
            for request in requests:
                ids = self.tok_encode(*request.args)
                found = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                found = [(None, *utils.make_disjoint_window(window)) for window in found]
                windows, n_windows = [*windows, *found], [*n_windows, len(found)]
            parts = iter(self._loglikelihood_tokens(windows))
            sums = [sum(next(parts)[0] for _ in range(n)) for n in n_windows]
            for request, total in zip(requests, sums):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return sums

        def generate_until(self, requests, disable_tqdm=False):
            texts: list[str] = [""] * len(requests)
            alike: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(repr(request.args[1]), []).append(i)
            for group in alike.values():
                sampling = sampling_of(requests[group[0]].args[1])
                room = max(1, self.max_length - sampling.max_tokens)
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in group]
                done = generate(fast.model, fast.params, tokenizer, prompts, sampling, batch_size=batch_size)
                for i, completion in zip(group, done):
                    texts[i] = completion.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
            return texts

    return Harness()


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """What a task's generation_kwargs mean: greedy, unless they say do_sample or a temperature above 0.

    Raises: ValueError for a setting that decoding has not.
    """
    left = dict(settings)
    until, most = left.pop("until", ()), left.pop("max_gen_toks", MAX_TOKENS)
    sampled = left.pop("do_sample", left.get("temperature", 0.0) > 0)
    temperature = left.pop("temperature", 1.0) if sampled else 0.0
    left.pop("temperature", None)
    drawn = {name: left.pop(name) for name in DRAWN if name in left}
    if left:
        raise ValueError(
            f"generation_kwargs {left} have no counterpart; there are until, max_gen_toks, do_sample, temperature, "
            f"{', '.join(DRAWN)}"
        )
    stop = (until,) if isinstance(until, str) else tuple(filter(None, until or ()))
    return Sampling(
        temperature=float(temperature), max_tokens=most, stop=stop, **(drawn if temperature else {})
    )


def _cut(before: list[int], after: list[int], limit: int) -> Encoded:
    """The last of the ids, of which a model reads `limit` and scores one more."""
    if not 0 < len(after) <= limit:
        raise ValueError(
            f"an answer of {len(after):,} tokens; a model that reads {limit:,} scores 1 to that many"
        )
    ids = [*before, *after][-(limit + 1) :]
    return Encoded(ids, len(ids) - len(after))
