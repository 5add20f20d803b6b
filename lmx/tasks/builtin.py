"""Tasks as values: sentiment, translation, summaries, and the families of fruits.

The three that read data take the folder it lies in; nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path

from lmx.data.records import Records

from .metrics import Bleu, Chrf, Lengths, Rouge
from .task import Choices, Free, Task, Template

LANGUAGES = {"en": "English", "hi": "Hindi"}


def sst2(folder: str | Path, train: str = "train.tsv") -> Task:
    """Whether a sentence of a film review is positive: train.tsv and dev.tsv with fields label (0, 1) and sentence.

    train: "train-phrases.tsv" has the labelled phrases too, in a field phrase.
    Source: Socher et al. 2013, Stanford Sentiment Treebank, in two classes.
    """
    rename = {"sentence": "phrase"} if "phrases" in train else {}
    return Task(
        "sst2",
        test=Records(f"{folder}/dev.tsv"),
        train=Records(f"{folder}/{train}", rename),
        template=Template("Review: {sentence}\nSentiment:", " {label}"),
        answer=Choices({"0": "negative", "1": "positive"}),
    )


def translation(folder: str | Path, source: str, target: str) -> Task:
    """Sentences from one language into another: dev.hi is parallel to dev.en.0 to dev.en.3, and devtest likewise, by
    the languages' codes. All files of the target are references; of several files of the source the first is read.

    Raises: FileNotFoundError if a language has no files there.
    """

    def records(part):
        return Records(
            {"source": _parallel(folder, part, source)[0], "target": _parallel(folder, part, target)}
        )

    here, there = (LANGUAGES.get(code, code) for code in (source, target))
    tokenize = "13a" if target == "en" else "intl"
    return Task(
        f"translation-{source}-{target}",
        test=records("devtest"),
        train=records("dev"),
        template=Template(f"{here}: {{source}}\n{there}:", " {target}"),
        answer=Free(max_tokens=256),
        metrics=(Chrf(), Bleu(tokenize), Lengths()),
    )


def summarization(folder: str | Path, text: str = "long", summary: str = "short") -> Task:
    """One line for a long text: train.jsonl and valid.jsonl, whose fields `text` and `summary` name."""
    rename = {"text": text, "summary": summary}
    return Task(
        "summarization",
        test=Records(f"{folder}/valid.jsonl", rename),
        train=Records(f"{folder}/train.jsonl", rename),
        template=Template("{text}\n\nIn one line:", " {summary}", between="\n\n---\n\n"),
        answer=Free(max_tokens=64),
        metrics=(Rouge(), Chrf(), Lengths()),
    )


FRUITS = {
    "drupe": "peach plum cherry apricot mango olive nectarine almond coconut damson sloe pistachio",
    "pome": "apple pear quince loquat medlar rowan hawthorn chokeberry crabapple serviceberry",
    "berry": "tomato grape blueberry banana kiwi gooseberry aubergine redcurrant cranberry persimmon papaya chilli",
    "hesperidium": "orange lemon lime grapefruit mandarin pomelo kumquat citron tangerine bergamot",
    "pepo": "cucumber pumpkin watermelon courgette melon squash gherkin marrow",
    "aggregate": "raspberry blackberry strawberry loganberry boysenberry cherimoya soursop cloudberry",
    "multiple": "pineapple fig mulberry jackfruit breadfruit noni",
    "legume": "pea bean peanut lentil soybean tamarind carob chickpea",
}
"""What kind of fruit it is to a botanist. The strawberry, an aggregate of small dry fruits on a fleshy base, is an
accessory fruit too, as is the pome."""
SHOWN = 4


def fruit() -> Task:
    """The botanical kind of a fruit, by a word: a few are enough to guess what is asked, and none to know the answers.

    The first four of each kind are for training, in turn: peach, apple, tomato, orange ...; the others are the test.
    """
    kinds = {kind: names.split() for kind, names in FRUITS.items()}
    train = [{"fruit": names[i], "kind": kind} for i in range(SHOWN) for kind, names in kinds.items()]
    test = [{"fruit": name, "kind": kind} for kind, names in kinds.items() for name in names[SHOWN:]]
    return Task(
        "fruit",
        test=Records(test),
        train=Records(train),
        template=Template("{fruit}:", " {kind}", between="\n"),
        answer=Choices(tuple(kinds)),
    )


def _parallel(folder: str | Path, part: str, code: str) -> tuple[str, ...]:
    """The files part.code, or part.code.0, part.code.1, ..."""
    found = [p for p in Path(folder).glob(f"{part}.{code}*") if p.name.split(".")[1] == code]
    if not found:
        there = sorted(p.name for p in Path(folder).glob("*"))
        raise FileNotFoundError(
            f"{folder}: no file {part}.{code} or {part}.{code}.0; it holds {', '.join(there[:12])}"
        )
    return tuple(map(str, sorted(found)))
