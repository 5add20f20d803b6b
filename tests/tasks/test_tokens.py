"""Every token of a prompt is named after the part that its bytes spell, with and without a chat template."""

import dataclasses

import pytest

from lmx.data import Bpe, Byte, ChatTemplate, Unigram, Word
from lmx.tasks import (
    Choices,
    Records,
    Task,
    Template,
    ids_of,
    named_tokens,
    prompt_messages,
    prompt_parts,
    prompt_text,
    shown_piece,
)

CHATML = ChatTemplate(
    "{{ '<|bos|>' }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TASK = Task(
    "समीक्षा",
    test=Records([{"text": "a", "label": 1}]),
    train=Records([{"text": "role a", "label": 1}, {"text": "फ़िल्म", "label": 0}]),
    template=Template("{text}\nभाव:", " {label}"),
    answer=Choices({"0": "ना", "1": "हाँ"}),
    instruction="एक शब्द।",
)
WANT = {
    "instruction": "एक शब्द।",
    "shot 1 question": "role a\nभाव:",
    "shot 1 answer": " हाँ",
    "shot 2 question": "फ़िल्म\nभाव:",
    "shot 2 answer": " ना",
    "question": "a\nभाव:",
}
TEXT = ["समीक्षा: फ़िल्म अच्छी भाव: हाँ ना", "role a film"] * 30


def named(kind, chat, task=TASK):
    tokenizer = kind.train(TEXT)
    some = list(task.examples("train"))
    prompt = (prompt_messages if chat else prompt_text)(task, "a\nभाव:", some)
    parts = prompt_parts(task, "a\nभाव:", some, chat)
    ids = ids_of(tokenizer, prompt, chat)
    return tokenizer, prompt, parts, named_tokens(tokenizer, ids, parts, chat), ids


@pytest.mark.parametrize("chat", [None, CHATML])
def test_the_parts_are_all_of_the_prompt(chat):
    _, prompt, parts, _, _ = named(Byte(), chat)
    assert "".join(text for _, text in parts) == (chat.render(prompt) if chat else prompt)
    strip = str.strip if chat else str
    assert {name: text for name, text in parts if name} == {name: strip(text) for name, text in WANT.items()}


@pytest.mark.parametrize("chat", [None, CHATML])
def test_tokens_of_a_part_spell_it(chat):
    tokenizer, _, _, tokens, ids = named(Byte(), chat)
    assert [t.id for t in tokens] == ids
    for name, text in WANT.items():
        raw = b"".join(tokenizer.token_bytes(t.id) for t in tokens if t.part == name)
        assert raw.decode() == (text.strip() if chat else text)
    assert tokens[0] == (tokenizer.bos_id, "<|bos|>", "")
    assert sum(t.piece == "<|eos|>" for t in tokens) == (6 if chat else 0)


def test_a_token_of_two_parts_is_of_the_one_it_ends_in():
    task = dataclasses.replace(TASK, template=Template("{text}, भा", "व{label}"))
    tokenizer, _, parts, tokens, _ = named(Bpe(vocab_size=307), None, task)
    ends = 0
    for token in tokens:
        ends += len(tokenizer.token_bytes(token.id))
        at = 0
        for name, text in parts:
            at += len(text.encode())
            if at >= ends:
                break
        assert token.part == (name if ends else "")
    assert len({t.part for t in tokens}) == 7


@pytest.mark.parametrize("kind", [Word(vocab_size=12), Bpe(vocab_size=259, normalize="NFKC")])
def test_of_a_tokenizer_that_changes_the_text_no_part_is_known(kind):
    *_, tokens, _ = named(kind, None, dataclasses.replace(TASK, instruction="½ शब्द"))
    assert {t.part for t in tokens} == {""}


@pytest.mark.filterwarnings("ignore:Unigram. vocab_size=330")
def test_a_space_that_the_tokenizer_puts_in_front_belongs_to_no_part():
    tokenizer, _, _, tokens, _ = named(Unigram(vocab_size=330), None)
    for name, text in WANT.items():
        raw = b"".join(tokenizer.token_bytes(t.id) for t in tokens if t.part == name)
        assert raw.decode().strip() == text.strip()


def test_of_a_chat_template_that_cuts_what_is_said_no_part_is_known():
    cutting = ChatTemplate("{% for m in messages %}{{ m.content[:3] }}{% endfor %}")
    assert prompt_parts(TASK, "a long question", (), cutting) == [("", "एक a l")]


def test_pieces_are_visible():
    tokenizer = Bpe(vocab_size=259).train(["क"])
    assert shown_piece(tokenizer, tokenizer.eos_id) == "<|eos|>"
    shown = {bytes([b]): shown_piece(tokenizer, tokenizer.encode(chr(b))[0]) for b in b" \n\x07a"}
    assert shown == {b" ": "␣", b"\n": "\\n", b"\x07": "\\x07", b"a": "a"}
    marked = Bpe(vocab_size=263).train(["ि"] * 50 + ["कि"] * 3)
    assert [shown_piece(marked, i) for i in marked.encode("ि")][-1] in ("◌ि", "⟨bf⟩")
