"""Streams show whole characters and clusters only, and add up to what generate returns."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from parrot import parrot

from lmx.data import Byte
from lmx.generate import Memory, Sampling, generate, stream
from lmx.generate.assemble import Assembler
from lmx.generate.rows import Decoder
from lmx.models import build
from lmx.models.presets import llama
from lmx.ops.mask import Causal, PrefixLM, SlidingWindow

BYTES = Byte().train(["the byte tokenizer learns nothing"])
TEXT = "क्षत्रिय स्त्री 👩‍👩‍👧 🇮🇳 e\u0301\u0323 हिन्दी"
ALPHABET = st.sampled_from(
    [*"ab \n", "क", "्", "ष", "ि", "ं", "\u200d", "\u0301", "👩", "👧", "🇮", "🇳", "é", "\r"]
)
texts = st.text(ALPHABET, max_size=30)


def cut(data, sizes):
    """The bytes in pieces of the given sizes, in turn."""
    pieces, at, i = [], 0, 0
    while at < len(data):
        pieces.append(data[at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
    return pieces


def assembled(pieces, stop=()):
    """(parts, pieces used)"""
    assembler, parts, used = Assembler(stop), [], 0
    for piece in pieces:
        parts.append(assembler.push(piece))
        used += 1
        if assembler.stopped:
            break
    return [*parts, assembler.finish()], used


def boundaries(text):
    """Where grapheme clusters begin, and the end."""
    return {0, len(text)} | {match.start() for match in regex.finditer(r"\X", text)}


sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(texts, sizes)
def test_no_part_ends_inside_a_cluster(text, sizes):
    parts, _ = assembled(cut(text.encode(), sizes))
    assert "".join(parts) == text
    ends = np.cumsum([len(part) for part in parts]).tolist()
    assert set(ends) <= boundaries(text)


@given(st.binary(max_size=30), sizes)
def test_bytes_that_are_no_text_become_replacement_characters(data, sizes):
    parts, _ = assembled(cut(data, sizes))
    assert "".join(parts) == data.decode("utf-8", "replace")


def test_a_stop_string_that_ends_with_a_piece_was_held_back_whole():
    pieces = [b"two t", b"hre", b"e x"]
    parts, used = assembled(pieces, ("three",))
    assert ("".join(parts), used) == ("two ", 3)


def stopped_by_definition(pieces, stop):
    """(text, pieces used): after each piece, look for any stop string in all bytes so far."""
    data = b""
    for n, piece in enumerate(pieces, 1):
        data += piece
        starts = [data.find(s.encode()) for s in stop if s.encode() in data]
        if starts:
            return data[: min(starts)].decode("utf-8", "replace"), n
    return data.decode("utf-8", "replace"), len(pieces)


@given(texts, sizes, st.lists(st.text(ALPHABET, min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_strings_are_found_wherever_the_pieces_part(text, sizes, stop):
    pieces = cut(text.encode(), sizes)
    parts, used = assembled(pieces, stop)
    assert ("".join(parts), used) == stopped_by_definition(pieces, stop)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_overlapping_stop_strings(text, stop):
    pieces = [char.encode() for char in text]
    parts, used = assembled(pieces, stop)
    assert ("".join(parts), used) == stopped_by_definition(pieces, stop)


def test_text_is_not_held_back_longer_than_need_be():
    """One cluster behind, and only what may still become a stop string."""
    assembler = Assembler(("<end>",))
    assert [assembler.push(c.encode()) for c in "abc"] == ["", "a", "b"]
    assert [assembler.push(c.encode()) for c in "<e"] == ["", ""]
    assert assembler.push(b"x") == "c<e"
    assert assembler.finish() == "x"


@functools.cache
def spelling():
    return parrot([*BYTES.encode(TEXT), BYTES.eos_id], BYTES.vocab_size)


def collect(*args, **more):
    """(parts, the generator's return value)"""
    parts, running = [], stream(*args, **more)
    while True:
        try:
            parts.append(next(running))
        except StopIteration as end:
            return parts, end.value


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("stop", [(), ("हि",), ("\u200d👧",)], ids=repr)
def test_a_stream_shows_clusters_and_adds_up_to_generate(stop, chunk):
    model, params = spelling()
    sampling = Sampling(temperature=0.0, max_tokens=120, stop=stop)
    want = generate(model, params, BYTES, [""], sampling)[0]
    parts, completion = collect(model, params, BYTES, "", sampling, chunk=chunk)
    assert completion == want and "".join(parts) == want.text
    assert all(parts) and len(parts) > 5
    whole = TEXT if not stop else TEXT[: TEXT.index(stop[0])]
    assert want.text == whole and set(np.cumsum([len(p) for p in parts]).tolist()) <= boundaries(whole)
    assert completion.reason == ("stop" if stop else "eos")


def test_the_first_part_is_the_first_cluster_and_a_stream_may_be_left():
    model, params = spelling()
    running = stream(model, params, BYTES, "", Sampling(temperature=0.0, max_tokens=120), chunk=1)
    assert next(running) == "क्ष"
    running.close()


def test_random_bytes_and_seeds():
    config = llama(16, 1, 2, vocab_size=BYTES.vocab_size, init_std=0.3)
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    for seed in range(3):
        sampling = Sampling(max_tokens=40, seed=seed)
        batch = generate(model, params, BYTES, ["x", "yz"], sampling)
        for row, prompt in enumerate(["x", "yz"]):
            parts, completion = collect(model, params, BYTES, prompt, sampling, row=row)
            assert completion.tokens == batch[row].tokens and "".join(parts) == batch[row].text


def test_nothing_to_write():
    model, params = spelling()
    parts, completion = collect(model, params, BYTES, "", Sampling(max_tokens=0))
    assert parts == [] and completion.text == "" and completion.reason == "length"


def test_errors_come_with_the_first_part():
    model, params = spelling()
    with pytest.raises(ValueError, match="prompt 0 has 101 tokens"):
        next(stream(model, params, BYTES, "x" * 100, Sampling(max_tokens=100)))


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(6), PrefixLM(5)])
def test_a_memory_changes_what_is_read_and_nothing_else(mask):
    """A conversation that grows, is cut and goes another way, against streams that read all of it."""
    config = llama(16, 2, 4, n_kv_heads=2, vocab_size=BYTES.vocab_size, init_std=0.5)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, mask=mask))
    model = build(config)
    parts = model, jax.jit(model.init)(jax.random.key(3)), BYTES
    sampling, memory, said = Sampling(0.9, max_tokens=12, seed=1), Memory(), [BYTES.bos_id]
    for turn, text in enumerate(["नमस्ते, hello", " how are you, all of you there?", "क्षत्रिय", " x"]):
        kept = 20 if turn == 2 else len(said)  # as /undo does
        prompt = [*said[:kept], *BYTES.encode(text)]
        assert list(memory.ids[: kept - 1]) == (prompt[: kept - 1] if turn else [])
        _, want = collect(*parts, prompt, sampling, row=turn)
        _, got = collect(*parts, prompt, sampling, row=turn, memory=memory)
        assert got.tokens == want.tokens and got.text == want.text
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        assert list(memory.ids) == [*prompt, *got.tokens[:-1]]
        assert int(memory.cache.length[0]) == len(memory.ids)
        said = [*prompt, *got.tokens]


def test_only_what_is_new_is_read(monkeypatch):
    model, params = spelling()
    memory, read, sampling = Memory(), [], Sampling(0.0, max_tokens=4)
    begin = Decoder.begin
    monkeypatch.setattr(
        Decoder,
        "begin",
        lambda self, ids, row, known, *slots: (
            read.append(len(ids[0]) - known.n) or begin(self, ids, row, known, *slots)
        ),
    )
    prompt = [BYTES.bos_id, *BYTES.encode("one two")]
    for more in ([], [7, 8], [7, 9, 9]):
        collect(model, params, BYTES, [*prompt, *more], sampling, memory=memory)
    assert read == [8, 2, 2]


def test_a_stream_that_is_left_keeps_what_was_read():
    model, params = spelling()
    memory = Memory()
    prompt = [BYTES.bos_id]
    pieces = stream(model, params, BYTES, prompt, Sampling(0.0, max_tokens=100), chunk=2, memory=memory)
    next(pieces)
    pieces.close()
    said = b"".join(map(BYTES.token_bytes, memory.ids[1:]))
    assert TEXT.encode().startswith(said) and len(said) >= len("क्ष".encode())
    _, rest = collect(model, params, BYTES, [*memory.ids], Sampling(0.0, max_tokens=115), memory=memory)
    assert said + b"".join(map(BYTES.token_bytes, rest.tokens[:-1])) == TEXT.encode()
