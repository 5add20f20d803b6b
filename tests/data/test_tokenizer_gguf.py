"""Tokenizers in the metadata of GGUF files."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data import Bpe, Byte, Char, Tokenizer, Unigram
from lmx.data.tokenizer_gguf import (
    BYTE,
    CONTROL,
    CUTS,
    MARKED,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER,
    metadata_of,
    tokenizer_of,
)
from lmx.data.tokenizer_json import byte_pieces

WORDS = ["▁", "a", "b", "न", "म", "▁a", "ab", "ba", "▁ab", "aba", "नम", "▁नम", "aa", "bb"]
SCORES = [0.0] * 5 + [-1.0, -3.0, -2.0, -4.0, -5.0, -1.5, -6.0, -2.5, -3.5]
PIECES = ["<unk>", "<s>", "</s>", *byte_pieces(), "<tool>", *WORDS]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 260 + SCORES,
    "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER, *[NORMAL] * len(WORDS)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def merged(text):
    """SentencePiece's BPE by its definition: the pair that joins to the token of the best score, leftmost first."""
    score = dict(zip(WORDS, SCORES))
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]
        if not pairs:
            break
        i = min(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        known = piece in score
        ids += [PIECES.index(piece)] if known else [3 + byte for byte in piece.encode()]
    return ids


@given(st.text("ab नमé🙂", max_size=12))
def test_sentencepiece_joins_by_score_and_spells_the_rest_in_bytes(text):
    tokenizer = tokenizer_of(SENTENCEPIECE, "the file")
    assert tokenizer.encode(text) == (merged(text) if text else [])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_roles_and_special_tokens_are_the_file_s():
    tokenizer = tokenizer_of(SENTENCEPIECE, "the file")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, len(PIECES))
    assert 1 not in tokenizer.encode("<s>"), "a text does not spell special tokens"
    silent = tokenizer_of(SENTENCEPIECE | {"tokenizer.ggml.add_bos_token": False}, "the file")
    assert silent.bos_id is None and silent.eos_id == 2


@pytest.mark.parametrize(
    ("pattern", "pre"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("o200k", "gpt-4o")]
)
def test_byte_level_pairs_give_the_ids_they_were_trained_to(pattern, pre):
    text = "The river carries 1234 boats, नदी नावों को ले जाती है। don't " * 20
    trained = Bpe(vocab_size=330, pattern=pattern).train([text])
    model = json.loads(trained._rust.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    found = tokenizer_of(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
            "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        },
        "the file",
    )
    for said in (text, "unseen wörds 🙂 ४५", "  two  spaces\n\n"):
        assert found.encode(said) == trained.encode(said) and found.decode(found.encode(said)) == said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer.ggml.model='bert' is not known here"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt5"}, r"pre='gpt5' says how text is cut"),
        ({"tokenizer.ggml.tokens": []}, "is not a list of tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "is not a list of tokens"),
        ({"tokenizer.ggml.scores": [0.0]}, r"274 tokens with 1 scores"),
        ({"tokenizer.ggml.token_type": [1]}, r"274 tokens with 1 types"),
        ({"tokenizer.ggml.token_type": 1}, "token_type=1 is not a list of token_type"),
        ({"tokenizer.ggml.scores": ["a"] * 274}, "is not a list of scores"),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [1]},
            "is not a list of merges",
        ),
        ({"tokenizer.ggml.tokens": [*PIECES[:-1], "a"]}, "the token 'a' comes twice"),
    ],
)
def test_metadata_that_lie_are_told(changed, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_of(SENTENCEPIECE | changed, "the file")


TEXTS = (
    "The river carries 1234 boats, don't! I'LL  stop\n\n\tकर",
    "नदी नावों को ले जाती है। क्षत्रिय ४५ हिन्दी",
    "👩🏽‍🚀🙂 e\u0301é ﬁ 中文 ▁ \u00a0x",
)


def written(tokenizer, n_tokens=None, **more):
    """Metadata, and the tokenizer that is read of them."""
    found = metadata_of(tokenizer, n_tokens or tokenizer.vocab_size, **more)
    return found, tokenizer_of(found, "the file")


@pytest.mark.parametrize(
    "spec", [Bpe(340, pattern=name) for name in ("gpt2", "llama3", "o200k")] + [Byte()], ids=str
)
@pytest.mark.filterwarnings("ignore:tokens join")
def test_what_is_written_is_read(spec):
    tokenizer = spec.train(["".join(TEXTS) * 9])
    found, again = written(tokenizer, tokenizer.vocab_size + 2, bos_id=7)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert [again.decode(again.encode(text)) for text in TEXTS] == list(TEXTS)
    assert again.roles | {"unk_token": None} == tokenizer.roles and again.end_ids == tokenizer.end_ids
    assert found["tokenizer.ggml.token_type"][:4] == [CONTROL] * 3 + [NORMAL]
    assert found["tokenizer.ggml.token_type"][-2:] == [UNUSED] * 2
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.add_bos_token"]
    silent, again = written(tokenizer.without("bos_token"), bos_id=7)
    assert silent["tokenizer.ggml.bos_token_id"] == 7 and again.bos_id is None


def test_sentencepiece_is_written_as_it_was_read():
    for changed in ({}, {"tokenizer.ggml.add_space_prefix": False}, {"tokenizer.ggml.add_bos_token": False}):
        tokenizer = tokenizer_of(SENTENCEPIECE | changed, "the file")
        found, again = written(tokenizer)
        assert again.hash == tokenizer.hash
        for key in ("tokens", "token_type", "model", "unknown_token_id", "eos_token_id"):
            assert found[f"tokenizer.ggml.{key}"] == SENTENCEPIECE[f"tokenizer.ggml.{key}"]


@pytest.mark.parametrize("pre", CUTS)
def test_every_cut_is_named_as_it_was_read(pre):
    said = written(Bpe(300, pattern="gpt2").train(["abc abd " * 9]))[0] | {"tokenizer.ggml.pre": pre}
    tokenizer = tokenizer_of(said, "the file")
    found, again = written(tokenizer)
    assert CUTS[found["tokenizer.ggml.pre"]] == CUTS[pre] and again.hash == tokenizer.hash


def test_the_whole_pattern_is_asked_for_where_tokens_join_marks():
    english = Bpe(300).train(["the cat sat on the mat, don't " * 9])
    assert written(english)[0]["tokenizer.ggml.pre"] == "gpt-4o"
    with pytest.warns(UserWarning, match="will not open the file"):
        assert written(Bpe(300).train(["हिन्दी " * 9]))[0]["tokenizer.ggml.pre"] == MARKED


def layout(**changed):
    """A tokenizer whose tokenizer.json has other parts."""
    import tokenizers

    said = Bpe(300, pattern="gpt2").train(["abc abd " * 9]).layout | changed
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(said)))


SPLIT = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: Char().train(["abc"]), "kind char has no counterpart in llama.cpp; train one with Bpe"),
        (lambda: Unigram(400).train(["".join(TEXTS) * 99]), "kind unigram has no counterpart"),
        (
            lambda: layout(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, LEVEL]}),
            r"cuts text by \['a\+'\]; llama.cpp cuts by gpt-2, .* alone; train one with Bpe",
        ),
        (lambda: layout(normalizer={"type": "NFKC"}), "after NFKC; llama.cpp cuts by"),
        (lambda: Bpe(300, pattern="gpt2").train(["ab " * 9]).ending_with(range(5)), "5 tokens end a reply"),
    ],
)
@pytest.mark.filterwarnings("ignore:Bpe|Unigram")
def test_what_llama_cpp_cuts_otherwise_is_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        written(tokenizer())


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens, the model rows for 258 alone"):
        metadata_of(Byte().train(), 258)
