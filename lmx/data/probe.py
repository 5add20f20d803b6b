"""Whether two tokenizers are one: files and families that share a name, or a vocabulary size, need not be."""

from __future__ import annotations

from .tokenizer_json import Tokenizer

PROBES = (
    "The quick brown fox, isn't it? It's 3.14159 metres -- or 1,234,567!",
    "उत्तर में क्षितिज पर सूर्य उगता है, और हिन्दी की कक्षा २०२६ में है।",
    "def f(x: int) -> int:\n\tif x <= 0:\n        return x**2  # ok\n    return f(x-1)\r\n",
    "  two  spaces,\n\n\nlines, \u00a0 and naïve Ünïcode \u2014 中文, العربية, 👩\u200d👩\u200d👧 🙂",
    "0 1 22 333 4444 55555 १२३४५६७८९०",
)
"""English, Hindi, code, white space and other scripts, digits."""


def difference(a: Tokenizer, b: Tokenizer) -> str:
    """What tells two tokenizers apart, in words, or "" where they cut PROBES, their own special tokens and their
    shared ids alike. One may have more ids at its end."""
    if a.hash == b.hash:
        return ""
    specials = dict.fromkeys((*a.specials, *b.specials))
    for text in (*PROBES, *specials):
        here, there = (tokenizer.encode(text, specials=True) for tokenizer in (a, b))
        if here != there:
            at = next((i for i, (x, y) in enumerate(zip(here, there)) if x != y), min(len(here), len(there)))
            x, y = here[at : at + 4], there[at : at + 4]
            return f"{text!r:.60} is {x} from token {at} on with one, {y} with the other"
    for i in range(min(a.vocab_size, b.vocab_size)):
        if a.token_bytes(i) != b.token_bytes(i):
            return f"token {i} is {a.token_bytes(i)!r:.60} with one, {b.token_bytes(i)!r:.60} with the other"
    return ""
