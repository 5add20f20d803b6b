"""The prompt's text, messages and tokens; the answer's tokens are found whatever the tokenizer joins."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data import Bpe, Byte, Char, ChatTemplate, Unigram, Word
from lmx.tasks import (
    Choices,
    Records,
    Shots,
    Task,
    Template,
    alternatives,
    encoded,
    fruit,
    ids_of,
    prompt_messages,
    prompt_text,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unigram. vocab_size=400 is more than this text supports")
TEXT = [
    "समीक्षा: बहुत अच्छी फ़िल्म है। भाव: सकारात्मक",
    "समीक्षा: बहुत बुरी फ़िल्म है। भाव: नकारात्मक",
    "Review: a good film. Sentiment: positive",
    "aaab aab ab b",
] * 20
CHATML = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = {
    "byte": Byte(),
    "char": Char(),
    "bpe": Bpe(vocab_size=340),
    "unigram": Unigram(vocab_size=400),
    "word": Word(vocab_size=24),
    "nfkc": Bpe(vocab_size=340, normalize="NFKC"),
}


@functools.cache
def tokenizer(kind):
    return KINDS[kind].train(TEXT)


TASK = Task(
    "reviews",
    test=Records([{"text": "कहानी अच्छी", "label": 1}]),
    train=Records([{"text": f"फ़िल्म {i}", "label": int(i >= 8)} for i in range(12)]),
    template=Template("समीक्षा: {text}\nभाव:", " {label}"),
    answer=Choices({"0": "नकारात्मक", "1": "सकारात्मक"}),
    instruction="एक शब्द में।",
)


def test_zero_one_and_two_shots_as_text_and_as_messages():
    (example,), shots = TASK.examples(), list(TASK.examples("train"))
    question = "समीक्षा: कहानी अच्छी\nभाव:"
    assert prompt_text(TASK, example.question) == f"एक शब्द में।\n\n{question}"
    two = prompt_text(TASK, example.question, [shots[0], shots[9]])
    assert two == (
        "एक शब्द में।\n\nसमीक्षा: फ़िल्म 0\nभाव: नकारात्मक\n\nसमीक्षा: फ़िल्म 9\nभाव: सकारात्मक\n\n" + question
    )
    assert prompt_messages(TASK, example.question, shots[:1]) == [
        {"role": "system", "content": "एक शब्द में।"},
        {"role": "user", "content": "समीक्षा: फ़िल्म 0\nभाव:"},
        {"role": "assistant", "content": "नकारात्मक"},
        {"role": "user", "content": question},
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("समीक्षा: कहानी अच्छी\nभाव:", " सकारात्मक"),
        ("Review: a good film. Sentiment:", " positive"),
        ("Review:", "\n\n"),
        ("", "positive"),
    ],
)
def test_the_answers_tokens_spell_the_answer(kind, prompt, answer):
    tok = tokenizer(kind)
    ids, start = encoded(tok, prompt, answer)
    assert ids == [tok.bos_id, *tok.encode(prompt + answer)]
    if kind not in ("word", "unigram"):
        assert b"".join(map(tok.token_bytes, ids[start:])).decode() == answer
        assert b"".join(map(tok.token_bytes, ids[:start])).decode() == prompt
    assert 1 <= start < len(ids)


PIECES = st.lists(
    st.sampled_from(["a", "b", " ", "अच्", "छी", "ा", "त्म", "क", "।", "\n", "positive"]), max_size=8
)


@given(PIECES.map("".join), PIECES.map("".join).filter(bool), st.sampled_from(["byte", "char", "bpe"]))
def test_the_start_is_where_the_bytes_say(prompt, answer, kind):
    tok = tokenizer(kind)
    _, start = encoded(tok, prompt, answer)
    boundary = len(prompt.encode())
    want = next(i for i, (_, _, end) in enumerate(tok.spans(prompt + answer)) if end > boundary)
    assert start == 1 + want  # bos is none of the text


def test_a_token_across_the_boundary_is_the_answers_and_starts_agree():
    tok = tokenizer("bpe")
    prompt = "समीक्षा: अच्छ"
    whole = tok.encode(prompt + "ी")
    assert (
        tok.encode(prompt) != whole[: len(tok.encode(prompt))]
    )  # the vowel sign joins the prompt's last letter
    ids, start = encoded(tok, prompt, "ी")
    assert ids[1:] == whole
    held = b"".join(map(tok.token_bytes, ids[start:]))
    assert held.endswith("ी".encode()) and len(held) > len("ी".encode())
    both = alternatives(tok, prompt, ["ी", " है"])
    assert both[0].start == both[1].start <= start
    assert both[0].ids[: both[0].start] == both[1].ids[: both[1].start]
    assert [x.ids[1:] for x in both] == [tok.encode(prompt + answer) for answer in ("ी", " है")]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_reply_goes_on_with_the_chat_templates_text(kind):
    tok = tokenizer(kind)
    messages = prompt_messages(TASK, "कैसी <|eos|> है?")
    ids, start = encoded(tok, messages, " अच्छी", CHATML)
    assert ids[:start] == ids_of(tok, messages, CHATML) == CHATML.ids(tok, messages)
    assert tok.decode(ids[start:]) == "अच्छी"
    assert tok.decode(ids) == CHATML.render(messages) + "अच्छी"
    assert tok.eos_id not in ids
    spelled, start = encoded(tok, messages, "x<|eos|>", CHATML)
    assert tok.decode(spelled[start:]) == "x<|eos|>" and tok.eos_id not in spelled
    with pytest.raises(ValueError, match="messages need a chat template"):
        encoded(tok, messages, "x")


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_without_tokens_is_refused(kind):
    with pytest.raises(ValueError, match="the answer '' has no tokens"):
        encoded(tokenizer(kind), "a", "")


def labels(shots):
    return [x.references[0] for x in shots]


def test_shots_are_drawn_by_seed_balanced_or_in_order():
    train = list(TASK.examples("train"))  # eight "0", then four "1"
    assert Shots()(iter(train)) == ()
    assert list(Shots(3, "first")(train)) == train[:3]
    assert Shots(5, seed=1)(train) == Shots(5, seed=1)(train) != Shots(5, seed=2)(train)
    assert len(set(Shots(12)(train))) == 12
    for seed in range(5):
        assert sorted(labels(Shots(6, "balanced", seed)(train))) == ["0"] * 3 + ["1"] * 3
        assert sorted(labels(Shots(11, "balanced", seed)(train))) == ["0"] * 7 + ["1"] * 4
        assert abs(labels(Shots(5, "balanced", seed)(train)).count("1") - 2.5) == 0.5
    assert {labels(Shots(1, "balanced", seed)(train))[0] for seed in range(20)} == {"0", "1"}
    chosen = Shots(6, seed=3)(train)
    other = [Shots(6, seed=3, order=order)(train) for order in range(5)]
    assert all(sorted(x) == sorted(chosen) for x in other) and len(set(other)) > 1


def test_every_training_example_is_as_likely_a_shot():
    train = list(TASK.examples("train"))
    counts = dict.fromkeys((x.where for x in train), 0)
    for seed in range(600):
        for x in Shots(3, seed=seed)(train):
            counts[x.where] += 1
    assert all(abs(n - 150) < 5 * (600 * 0.25 * 0.75) ** 0.5 for n in counts.values())


def test_a_budget_in_tokens_cuts_the_shots():
    train = list(fruit().examples("train"))
    tok = tokenizer("byte")

    def count(x):
        return len(tok.encode(x.question + x.answer + "\n"))

    chosen = Shots(None, "balanced", budget=100)(train, count)
    again = Shots(None, "balanced", budget=10**6)(train, count)
    assert sum(map(count, chosen)) <= 100 < sum(map(count, again[: len(chosen) + 1]))
    assert len(again) == len(train) and again[: len(chosen)] == chosen
    assert Shots(2, "balanced", budget=100)(train, count) == chosen[:2]
    assert Shots(3, budget=0)(train, count) == ()


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Shots(None), "k=None needs a budget"),
        (lambda: Shots(-1), "k=-1"),
        (lambda: Shots(1, "best"), "pick='best'; use"),
        (lambda: Shots(13)(TASK.examples("train")), "k=13, and there are 12 training examples"),
        (lambda: Shots(1, budget=5)(TASK.examples("train")), "a budget needs n_tokens"),
    ],
)
def test_shots_that_mean_nothing_are_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()
