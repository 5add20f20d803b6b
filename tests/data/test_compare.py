"""Closed forms for bytes and characters, and a count by plain loops for the others."""

import warnings
import zlib

import pytest
import regex

from lmx.data.compare import ALL, Row, compare, grid, plot
from lmx.data.tokenizer import Bpe, Byte, Char, File, Grapheme, Tokenizer, Unigram, Word

HINDI = "यह हिन्दी में लिखा हुआ पाठ है, और इसमें क्षत्रिय जैसे शब्द भी हैं।"
ENGLISH = "this text is written in English, and it isn't a long one."
LINES = [f"{number} {line} {number % 7}!\n" for number in range(60) for line in (HINDI, ENGLISH)]
HELD_OUT = [line for line in LINES if zlib.crc32(line.encode()) / 2**32 < 0.2]
TRAINED_ON = [line for line in LINES if line not in HELD_OUT]

WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
LETTER = {
    "Latin": regex.compile(r"\p{Latin}"),
    "Devanagari": regex.compile(r"[\p{Devanagari}&&\p{L}]", regex.V1),
}


def script(word: str) -> str:
    return next((name for name, letter in LETTER.items() if letter.search(word)), "other")


def by_script(rows: list[Row]) -> dict[str, Row]:
    assert len({row.script for row in rows}) == len(rows)
    return {row.script: row for row in rows}


def measured(spec) -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return by_script(compare(LINES, [spec], valid=0.2))


def words_of(name: str) -> list[str]:
    words = [word for line in HELD_OUT for word in WORD.findall(line)]
    return words if name == ALL else [word for word in words if script(word) == name]


def test_the_text_holds_out_some_lines():
    assert 10 < len(HELD_OUT) < 40


@pytest.mark.parametrize("name", ["Latin", "Devanagari", "other", ALL])
def test_bytes_cost_what_utf8_costs(name):
    row, words = measured(Byte())[name], words_of(name)
    assert (row.tokenizer, row.vocab_size, row.words) == ("byte", 259, len(words))
    assert row.tokens_per_word == pytest.approx(
        sum(len(word.encode()) for word in words) / len(words), rel=1e-12
    )
    assert row.bytes_per_token == 1.0
    assert row.whole == pytest.approx(sum(len(word.encode()) == 1 for word in words) / len(words), rel=1e-12)
    assert row.unknown == 0.0


@pytest.mark.parametrize("name", ["Latin", "Devanagari", "other", ALL])
def test_characters_cost_one_token_each(name):
    row, words = measured(Char())[name], words_of(name)
    assert row.tokens_per_word == pytest.approx(sum(map(len, words)) / len(words), rel=1e-12)
    assert row.whole == pytest.approx(sum(len(word) == 1 for word in words) / len(words), rel=1e-12)


def counted(tokenizer: Tokenizer, name: str) -> tuple[float, float]:
    """(tokens per word, share kept whole), by looking at every byte of every word."""
    tokens = whole = 0
    for line in HELD_OUT:
        owner = [n for n, i in enumerate(tokenizer.encode(line)) for _ in tokenizer.token_bytes(i)]
        for word in WORD.finditer(line):
            if name in (ALL, script(word[0])):
                start, end = (len(line[:at].encode()) for at in word.span())
                touching = set(owner[start:end])
                tokens += len(touching)
                whole += len(touching) == 1
    n = len(words_of(name))
    return tokens / n, whole / n


@pytest.mark.parametrize("spec", [Grapheme(), Bpe(vocab_size=330), Unigram(vocab_size=340)], ids=repr)
def test_learned_vocabularies_are_counted_on_the_held_out_lines(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = spec.train(TRAINED_ON)
    rows = measured(spec)
    for name, row in rows.items():
        assert row.vocab_size == tokenizer.vocab_size
        assert (row.tokens_per_word, row.whole) == pytest.approx(counted(tokenizer, name), rel=1e-12)
    n_bytes = sum(len(line.encode()) for line in HELD_OUT)
    n_tokens = sum(len(tokenizer.encode(line)) for line in HELD_OUT)
    assert rows[ALL].bytes_per_token == pytest.approx(n_bytes / n_tokens, rel=1e-12)


def test_an_unknown_word_is_not_kept_whole():
    """The words of the two sentences are known, numbers from 7 on are seen too rarely to be."""
    rows = measured(Word(vocab_size=4 + 35))
    assert rows["Latin"].whole > 0.9
    assert rows["Devanagari"].whole == 1.0
    assert rows["other"].whole < 0.5
    assert rows["other"].tokens_per_word == 1.0
    assert rows["Devanagari"].unknown < rows["other"].unknown


def test_only_the_default_pattern_lets_hindi_words_be_whole():
    assert measured(Bpe(vocab_size=600))["Devanagari"].whole == 1.0
    assert measured(Bpe(vocab_size=600, pattern="gpt2"))["Devanagari"].whole < 0.5
    assert measured(Bpe(vocab_size=600, pattern="gpt2"))["Latin"].whole > 0.9


def test_documents_of_any_length_are_cut_into_lines():
    documents = [{"text": "".join(LINES[:50]), "id": "a"}, {"text": "".join(LINES[50:]), "id": "b"}]
    assert compare(documents, [Byte()], valid=0.2) == compare(LINES, [Byte()], valid=0.2)
    endless = "".join(LINES).replace("\n", " ") * 20
    assert by_script(compare([endless], [Char()], valid=0.5))[ALL].words > 100


def test_a_line_without_words_counts_for_other():
    lines = [*LINES, *(f"{mark}{mark}!?\n" for mark in "।॥—…•·§¶†‡")]
    rows = by_script(compare(lines, [Byte()], valid=0.5))
    assert rows["other"].bytes_per_token == 1.0


def test_scripts_are_the_ones_asked_for():
    rows = by_script(compare(LINES, [Byte()], valid=0.2, scripts=["Devanagari"]))
    assert list(rows) == ["Devanagari", "other", ALL]
    assert rows["other"].words == len(words_of("Latin")) + len(words_of("other"))
    assert list(by_script(compare([line for line in LINES if HINDI not in line], [Byte()], valid=0.2))) == [
        "Latin",
        "other",
        ALL,
    ]


def test_the_grid_is_kinds_times_sizes(tmp_path):
    path = str(Byte().train().save(tmp_path))
    assert grid(["byte", "bpe", "word", path], [300, 400]) == [
        Byte(),
        Bpe(vocab_size=300),
        Bpe(vocab_size=400),
        Word(vocab_size=300),
        Word(vocab_size=400),
        File(path),
    ]
    assert grid(["char", "grapheme", "unigram"], [400]) == [Char(), Grapheme(), Unigram(vocab_size=400)]
    with pytest.raises(ValueError, match=r"unknown tokenizer 'sentencepiece'; use byte, char"):
        grid(["sentencepiece"], [400])
    with pytest.raises(ValueError, match="vocab_size=100"):
        grid(["bpe"], [100])


def test_a_file_is_compared_as_it_is(tmp_path):
    path = str(Byte().train().save(tmp_path))
    file, byte = compare(LINES, [File(path), Byte()], valid=0.2)[:: len(measured(Byte()))]
    assert file.tokenizer == f"file path={path}"
    assert file.tokens_per_word == byte.tokens_per_word


def test_misuse_is_named():
    with pytest.raises(TypeError, match="can be read only once"):
        compare(iter(LINES), [Byte()])
    with pytest.raises(ValueError, match="no tokenizer to compare"):
        compare(LINES, [])
    with pytest.raises(ValueError, match=r"valid=1\.5 is not between 0 and 1"):
        compare(LINES, [Byte()], valid=1.5)
    with pytest.raises(ValueError, match="unknown script 'Hindi'"):
        compare(LINES, [Byte()], scripts=["Hindi"])
    with pytest.raises(ValueError, match="no line of the text fell into the held-out share"):
        compare(["a\n"], [Byte()], valid=1e-6)
    with pytest.raises(ValueError, match="the text is empty"):
        compare(["a\n"], [Char()], valid=1 - 1e-6)


def test_a_repeated_line_is_on_one_side_only():
    """A line that was trained on must not be measured, however often it comes."""
    for valid in (0.2, 0.5, 0.8):
        with pytest.raises(ValueError, match=r"no line of the text|the text is empty"):
            compare(["same line\n"] * 100, [Char()], valid=valid)


def test_the_plot_shows_every_row():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = compare(LINES, [Byte(), *grid(["bpe", "unigram"], [330, 360])], valid=0.2)
    figure = plot(rows)
    scripts = ["Latin", "Devanagari", "other", ALL]
    assert [panel.get_title() for panel in figure.axes[:4]] == scripts
    assert [panel.get_ylabel() for panel in figure.axes[::4]] == [
        "tokens per word",
        "bytes per token",
        "words whole",
    ]
    for panel, name in zip(figure.axes, scripts):
        drawn = {(x, y) for line in panel.get_lines() for x, y in zip(line.get_xdata(), line.get_ydata())}
        assert drawn == {(row.vocab_size, row.tokens_per_word) for row in rows if row.script == name}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["byte", "bpe", "unigram"]
