import random
import unicodedata

import numpy as np
import pytest

from lmx.data import Byte, Clean, Documents, Report, Split, Stream, Take, Text, Tokenize, Word, files
from lmx.data.sources import Source

HINDI = "नमस्ते दुनिया। क्षत्रिय और ज्ञानी हिन्दी में लिखते हैं।"


def docs(*texts):
    return [{"text": text, "id": f"d{i}"} for i, text in enumerate(texts)]


def texts_of(documents):
    return [document["text"] for document in documents]


def long_document(n_parts):
    return [{"text": f"part {i} ", "id": "long", "more": i < n_parts - 1} for i in range(n_parts)]


def test_the_base_stream_changes_nothing():
    assert list(Stream()(docs("a", "b"))) == docs("a", "b")


def test_clean_normalises_and_keeps_joiners():
    report = Report()
    joined = "क्\u200dष श्री\u200cमान"
    got = texts_of(Clean()(docs("e\u0301\x00\x07", joined, " \n", f"plain\tASCII\n{HINDI}"), report))
    assert got == ["é", joined, f"plain\tASCII\n{unicodedata.normalize('NFC', HINDI)}"]
    assert report.skipped == {"too_short": 1} and report.examples["too_short"] == ["d2"]
    assert report.noted == {"control_characters_removed": 2}


def test_clean_keeps_the_parts_of_a_long_document_together():
    parts = [{"text": "x" * 10, "id": "l", "more": True}, {"text": "", "id": "l"}]
    assert list(Clean(min_chars=5)([*parts, *docs("abc", "abcdef")])) == [*parts, docs("abc", "abcdef")[1]]


def test_a_split_is_of_the_size_asked_for_and_stable_when_the_corpus_grows():
    texts = [f"document {i}" for i in range(4000)]
    valid = set(texts_of(Split("valid", 0.1)(docs(*texts))))
    train = set(texts_of(Split("train", 0.1)(docs(*texts))))
    assert valid | train == set(texts) and not valid & train
    assert abs(len(valid) - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
    grown = [f"new {i}" for i in range(1000)] + texts
    random.Random(0).shuffle(grown)
    assert set(texts_of(Split("valid", 0.1)(docs(*grown)))) & set(texts) == valid
    smaller = set(texts_of(Split("valid", 0.05)(docs(*texts))))
    assert smaller < valid
    assert texts_of(Split("train", 0.0)(docs("a", "b"))) == ["a", "b"] and not list(
        Split("valid", 0.0)(docs("a"))
    )


def test_a_split_keeps_long_documents_whole():
    documents = [{**part, "text": f"{i} {part['text']}"} for i in range(50) for part in long_document(3)]
    train, valid = (list(Split(part, 0.5)(documents)) for part in ("train", "valid"))
    assert len(train) + len(valid) == 150 and train and valid
    for part in (train, valid):
        for i in range(0, len(part), 3):
            assert len({d["text"].split()[0] for d in part[i : i + 3]}) == 1
            assert [d["more"] for d in part[i : i + 3]] == [True, True, False]


def test_take_counts_documents_not_parts_and_reads_no_further():
    assert len(list(Take(2)([*long_document(3), *docs("a", "b")]))) == 4
    assert list(Take(0)(docs("a"))) == []

    def endless():
        while True:
            yield docs("a")[0]

    assert len(list(Take(5)(endless()))) == 5


def test_tokenize_wraps_each_document_once_and_loses_nothing():
    tokenizer = Byte().train()
    documents = [*docs("ab", HINDI), *long_document(3), *docs("end")]
    got = list(Tokenize(tokenizer)(documents))
    joined, held = [], []
    for part in got:
        held += part["ids"]
        if not part.get("more"):
            joined.append(held)
            held = []
    assert [tokenizer.decode(ids[1:-1]) for ids in joined] == ["ab", HINDI, "part 0 part 1 part 2 ", "end"]
    assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in joined)
    assert not any({tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1]) for ids in joined)


def test_unknown_words_are_counted():
    tokenizer = Word(vocab_size=6).train(["one two"])
    report = Report()
    list(Tokenize(tokenizer)(docs("one other word"), report))
    assert report.noted["unknown_tokens"] >= 2


def test_parts_cut_from_a_long_text_tokenize_as_the_whole_does(tmp_path):
    from lmx.data import Bpe

    rng = np.random.default_rng(0)
    words = ["नमस्ते", "दुनिया", "क्षत्रिय", "word", "other", "end.\n", "\n\n", "1234"]
    text = " ".join(words[i] for i in rng.integers(0, len(words), 300_000))
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    tokenizer = Bpe(vocab_size=300).train([text[:100_000]])
    parts = list(Text(str(path)))
    assert len(parts) >= 2 and all(len(part["text"]) <= files.BLOCK for part in parts)
    cut = [i for part in Tokenize(tokenizer)(parts) for i in part["ids"]]
    assert cut[1:-1] == tokenizer.encode(text)


def test_a_stream_takes_any_source():
    src: Source = Documents(("a", "b", "c"))
    assert texts_of(Take(2)(Clean()(src))) == ["a", "b"]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="'train' or 'valid'"):
        Split("test")
    with pytest.raises(ValueError, match=r"valid=1.5; use a share"):
        Split("train", 1.5)
