"""Tokenizers are told apart by what they do, whatever their names, sizes and files say."""

import json
import shutil

import pytest

from lmx.data import Bpe, Byte, Char, Tokenizer
from lmx.data.probe import PROBES, difference

ENGLISH = ["the river carries old boats past old mills " * 9] * 40
HINDI = ["नदी पुरानी नावों को पुरानी चक्कियों के पास ले जाती है " * 9] * 40


@pytest.fixture(scope="module")
def english():
    return Bpe(280).train(ENGLISH)


def changed(tokenizer, folder, change):
    """The same tokenizer from a file in which something is changed."""
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    layout = json.loads(file.read_text("utf-8"))
    change(layout)
    file.write_text(json.dumps(layout), "utf-8")
    return Tokenizer.load(folder)


def test_one_tokenizer_is_itself_from_another_file_too(english, tmp_path):
    english.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = (Tokenizer.load(tmp_path / name) for name in "ab")
    assert difference(a, b) == difference(english, a) == ""
    unlike = changed(english, tmp_path / "c", lambda layout: layout["model"].update(fuse_unk=True))
    assert difference(english, unlike) == ""


def test_other_merges_other_kinds_and_swapped_ids_are_told(english, tmp_path):
    hindi = Bpe(280).train(HINDI)
    assert english.vocab_size == hindi.vocab_size
    assert difference(english, hindi) == difference(english, hindi) != ""
    assert difference(english, Byte().train()) and difference(Char().train(ENGLISH), Char().train(HINDI))

    def swap(layout):
        vocab = layout["model"]["vocab"]
        a, b = sorted(vocab, key=vocab.get)[-2:]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    told = difference(english, changed(english, tmp_path / "swapped", swap))
    assert " with one, " in told and " with the other" in told


def test_a_special_token_of_one_is_text_to_the_other(english, tmp_path):
    name = "<|im_start|>"
    token = {"id": english.vocab_size, "content": name, "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    more = changed(english, tmp_path / "more", lambda layout: layout["added_tokens"].append(token))
    assert more.vocab_size == english.vocab_size + 1
    assert name in difference(english, more) and name in difference(more, english)


def test_the_probes_hold_what_tokenizers_differ_in():
    text = "".join(PROBES)
    assert (
        any("\u0900" <= c <= "\u097f" for c in text) and "\t" in text and "१२३" in text and "\u200d" in text
    )
