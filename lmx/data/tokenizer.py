"""The kinds of tokenizer, each a value that is trained on a stream of texts.

    Byte()       one id per byte: byte value + 3
    Char()       one id per character seen; others are spelled in bytes
    Grapheme()   one id per grapheme cluster (a Devanagari conjunct with its vowel is one); others in several
    Word()       one id per frequent word; other words are lost to <|unk|>: the only lossy kind
    Bpe()        bytes, joined pair by pair; Sennrich et al. 2016, arXiv:1508.07909, on bytes as GPT-2 does
    Unigram()    the likeliest cut into pieces; Kudo 2018, arXiv:1804.10959; what has no piece, in bytes
    File(path)   any tokenizer.json, or that of a released model

Ids 0, 1, 2 are <|pad|>, <|bos|>, <|eos|>. Texts are read once and never held together; training twice on the
same text gives the same tokenizer. The tokenizer.json also tells other programs to begin a text with <|bos|>.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import regex
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust

from lmx.text.graphemes import clusters, split_complete
from lmx.text.normalize import check_form, normalize

from .tokenizer_json import BOS, EOS, PAD, UNK, Tokenizer, byte_alphabet, byte_pieces

SPECIALS = (PAD, BOS, EOS)
CHUNK = 1 << 10
COVERAGE = 0.9995
MIN_PIECES = 64

_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CASE}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CASE}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""How text is cut before pairs are joined: no token crosses a cut.

Only "o200k" (OpenAI's gpt-4o) keeps vowel signs and viramas, \\p{M}, with their letters: "gpt2" and "llama3"
cut हिन्दी into pieces, which no vocabulary is large enough to mend. llama.cpp knows them as granite-embed-multi-97m,
gpt-2 and llama-bpe; its gpt-4o is "o200k" without \\p{M}. All three cut before a joiner, U+200C or U+200D.
"""

_WORD = " ?[\\p{L}\\p{M}\\p{N}][\\p{L}\\p{M}\\p{N}\u200c\u200d]*| ?[^\\s\\p{L}\\p{M}\\p{N}]|\\s"
# Unicode 15.1, Indic_Conjunct_Break: Oniguruma's \X lacks rule GB9c and would cut क्ष.
_CONSONANT = (
    "[\u0915-\u0939\u0958-\u095f\u0978-\u097f\u0995-\u09a8\u09aa-\u09b0\u09b2\u09b6-\u09b9\u09dc\u09dd\u09df\u09f0\u09f1"
    "\u0a95-\u0aa8\u0aaa-\u0ab0\u0ab2\u0ab3\u0ab5-\u0ab9\u0af9\u0b15-\u0b28\u0b2a-\u0b30\u0b32\u0b33\u0b35-\u0b39"
    "\u0b5c\u0b5d\u0b5f\u0b71\u0c15-\u0c28\u0c2a-\u0c39\u0c58-\u0c5a\u0d15-\u0d3a]"
)
_VIRAMA, _EXTEND = "[\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d]", "[\\p{Mn}\\p{Me}\u200d]*"
_CLUSTER = f"(?:{_CONSONANT}{_EXTEND}{_VIRAMA}{_EXTEND}(?={_CONSONANT}))*\\X"


@dataclass(frozen=True)
class TokenizerSpec(ABC):
    """Base of all kinds."""

    @abstractmethod
    def train(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer learned from the texts. Warns if they support a smaller vocabulary than asked for.

        Raises: ValueError if there is no text.
        """

    def fingerprint(self) -> str:
        """Names what `train` would do, beside the texts."""
        return repr(self)

    def beside(self) -> dict[str, str]:
        """Name -> text of the files that came with the tokenizer, such as the template of conversations."""
        return {}


@dataclass(frozen=True)
class Byte(TokenizerSpec):
    """The 256 bytes of UTF-8. The id of a byte is its value + 3. Texts are not needed."""

    normalize: str | None = None

    vocab_size = len(SPECIALS) + 256

    def __post_init__(self):
        check_form(self.normalize)

    def train(self, texts: Iterable[str] = ()) -> Tokenizer:
        rust = _rust(models.BPE(vocab=_ids([*SPECIALS, *byte_alphabet()]), merges=[]), self.normalize)
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.decoder = decoders.ByteLevel()
        return _finish(rust)


@dataclass(frozen=True)
class Char(TokenizerSpec):
    """Characters (code points). vocab_size: keep only the most frequent; None keeps all that were seen."""

    vocab_size: int | None = None
    normalize: str | None = None

    def __post_init__(self):
        _check(self, len(SPECIALS) + 256 + 1)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        seen: Counter[str] = Counter()
        for chunk in _chunks(self, texts):
            seen.update(normalize(chunk, self.normalize))
        return _told(self, _spelled(_most(seen, self.vocab_size, 256), self.normalize))


@dataclass(frozen=True)
class Grapheme(TokenizerSpec):
    """Grapheme clusters; one that is not in the vocabulary is spelled in characters, and these in bytes.

    vocab_size: keep only the most frequent clusters and characters; None keeps all that were seen.
    """

    vocab_size: int | None = None
    normalize: str | None = None

    def __post_init__(self):
        _check(self, len(SPECIALS) + 256 + 1)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        seen: Counter[str] = Counter()
        for chunk in _chunks(self, texts):
            found = clusters(normalize(chunk, self.normalize))
            seen.update(found)
            seen.update(char for cluster in found if len(cluster) > 1 for char in cluster)
        return _told(self, _spelled(_most(seen, self.vocab_size, 256), self.normalize, pattern=_CLUSTER))


@dataclass(frozen=True)
class Word(TokenizerSpec):
    """Whole words, each with the one space before it, single punctuation marks, and white space.

    LOSSY: what is not among the vocab_size most frequent becomes <|unk|>, and its text is gone. Count how
    often that happens (`tokenizer.unk_id`) before comparing losses with another kind.
    """

    vocab_size: int = 8192
    normalize: str | None = None

    def __post_init__(self):
        _check(self, len(SPECIALS) + 2)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        word = regex.compile(_WORD)
        seen: Counter[str] = Counter()
        for chunk in _chunks(self, texts):
            seen.update(word.findall(normalize(chunk, self.normalize)))
        vocab = _ids([*SPECIALS, UNK, *_most(seen, self.vocab_size, 1)])
        rust = _rust(models.WordLevel(vocab=vocab, unk_token=UNK), self.normalize)
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
        rust.decoder = decoders.Fuse()
        return _told(self, _finish(rust, UNK))


@dataclass(frozen=True)
class Bpe(TokenizerSpec):
    """Byte pair encoding: starts from the 256 bytes and joins the most frequent neighbours into a new token,
    again and again. Lossless.

    pattern: a name in PATTERNS. min_count: a pair seen less often is not joined.
    """

    vocab_size: int = 4096
    pattern: str = "o200k"
    min_count: int = 2
    normalize: str | None = None

    def __post_init__(self):
        _check(self, len(SPECIALS) + 256)
        if self.pattern not in PATTERNS:
            raise ValueError(f"Bpe: unknown pattern {self.pattern!r}; use {', '.join(map(repr, PATTERNS))}")

    def train(self, texts: Iterable[str]) -> Tokenizer:
        rust = _rust(models.BPE(), self.normalize)
        cut = pre_tokenizers.Split(Regex(PATTERNS[self.pattern]), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_count,
            special_tokens=list(SPECIALS),
            initial_alphabet=byte_alphabet(),
            show_progress=False,
        )
        rust.train_from_iterator(_chunks(self, texts), trainer)
        return _told(self, _finish(rust))


@dataclass(frozen=True)
class Unigram(TokenizerSpec):
    """The unigram language model: of all ways to cut a word into pieces, the most probable. Lossless.

    Text is cut as by "o200k" first. Spaces stay what they are: sentencepiece's U+2581 would make a space of
    the text's own U+2581. A character has a piece if it is among the most frequent that make up 99.95 % of
    the text and half of the vocabulary; others are spelled in bytes. Training keeps a copy on disk meanwhile.
    """

    vocab_size: int = 4096
    normalize: str | None = None

    def __post_init__(self):
        _check(self, len(SPECIALS) + 1 + 256 + MIN_PIECES)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        budget = self.vocab_size - len(SPECIALS) - 1 - 256
        learner = Rust(models.Unigram())
        learner.pre_tokenizer = cut = pre_tokenizers.Split(Regex(PATTERNS["o200k"]), "isolated")
        trainer = trainers.UnigramTrainer(
            vocab_size=budget + 1, special_tokens=[UNK], unk_token=UNK, show_progress=False
        )
        seen: Counter[str] = Counter()
        with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
            for chunk in _chunks(self, texts):
                chunk = normalize(chunk, self.normalize)
                seen.update(chunk)
                spool.write(json.dumps(chunk) + "\n")
            spool.seek(0)
            alphabet = _alphabet(seen, budget // 2)
            rare = dict.fromkeys(map(ord, seen.keys() - alphabet), "\n")
            learner.train_from_iterator((json.loads(line).translate(rare) for line in spool), trainer)
        scores = dict(json.loads(learner.to_str())["model"]["vocab"])
        del scores[UNK]
        learned = _settled(scores, alphabet)[:budget]
        floor = learned[-1][1]
        fixed = [(piece, floor) for piece in (*SPECIALS, UNK, *byte_pieces())]
        model = models.Unigram([*fixed, *learned], unk_id=len(SPECIALS), byte_fallback=True)
        rust = _rust(model, self.normalize)
        rust.pre_tokenizer = cut
        rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return _told(self, _finish(rust, UNK))


@dataclass(frozen=True)
class File(TokenizerSpec):
    """A tokenizer that exists: a tokenizer.json, the folder that holds one, or a GGUF file. Texts are not needed.

    Of a released model, a Hugging Face folder or GGUF file, and of a run made from one, the template of its
    conversations is taken too.
    """

    path: str

    def train(self, texts: Iterable[str] = ()) -> Tokenizer:
        from .released import tokenizer

        return tokenizer(Path(self.path))

    def fingerprint(self) -> str:
        return self.train().hash

    def beside(self) -> dict[str, str]:
        from .released import beside

        return beside(Path(self.path))


def _check(spec: TokenizerSpec, least: int) -> None:
    check_form(spec.normalize)
    if spec.vocab_size is not None and spec.vocab_size < least:
        name = type(spec).__name__
        raise ValueError(
            f"{name}: vocab_size={spec.vocab_size} has no room for the tokens it must have; use >= {least}"
        )


def _chunks(spec: TokenizerSpec, texts: Iterable[str]) -> Iterator[str]:
    """The texts in parts of at most CHUNK characters. An endless line then takes no more memory than others,
    and an endless word, on which trainers spend the square of its length, little more time."""
    empty = True
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"{type(spec).__name__}.train: a text is a str, not {type(text).__name__} {text!r:.60}"
            )
        start = 0
        while start < len(text):
            end = _cut(text, start)
            yield text[start:end]
            start, empty = end, False
    if empty:
        raise ValueError(
            f"{type(spec).__name__}.train: the text is empty; give at least one character to learn from"
        )


def _cut(text: str, start: int) -> int:
    """Where a chunk ends: before the last space, after the last line end, else between two clusters."""
    end = start + CHUNK
    if end >= len(text):
        return len(text)
    cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start, end) + 1)
    if cut > start:
        return cut
    whole, rest = split_complete(text[end - 256 : end])
    return end - len(rest) if whole else end


def _most(seen: Counter[str], vocab_size: int | None, fixed: int) -> list[str]:
    """The most frequent, by count and then by code points: as many as fit beside specials and `fixed`."""
    ranked = sorted(seen, key=lambda unit: (-seen[unit], unit))
    return ranked if vocab_size is None else ranked[: vocab_size - len(SPECIALS) - fixed]


def _alphabet(seen: Counter[str], most: int) -> set[str]:
    """The most frequent characters, up to COVERAGE of the text, and at most `most`."""
    kept, covered, enough = set(), 0, COVERAGE * seen.total()
    for char in sorted(seen, key=lambda char: (-seen[char], char))[:most]:
        if covered >= enough:
            break
        kept.add(char)
        covered += seen[char]
    return kept


def _settled(scores: dict[str, float | None], alphabet: set[str]) -> list[tuple[str, float]]:
    """The trainer's pieces and scores without the traces of its hash order, likeliest first.

    It sums in that order, which shows in the last digits; and it puts the characters that it had pruned back
    just above the lowest score, 0.0001 apart, in that order: here they have the lowest score itself, as have
    all characters of a text too poor to tell pieces apart, for which its scores are not numbers.
    """
    known = {piece: score for piece, score in scores.items() if score is not None}
    floor = min(known.values(), default=-1.0)
    put_back = floor + 1e-4 * (len(alphabet) + 0.5)
    settled = {
        piece: floor if len(piece) == 1 and score < put_back else score for piece, score in known.items()
    }
    settled |= dict.fromkeys(alphabet - known.keys(), floor)
    return sorted(((piece, round(score, 6)) for piece, score in settled.items()), key=lambda p: (-p[1], p[0]))


def _ids(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _spelled(units: list[str], form: str | None, pattern: str | None = None) -> Tokenizer:
    """Each unit an id. Between the pattern's cuts, what is no unit is spelled in characters, or in bytes."""
    vocab = _ids([*SPECIALS, *byte_pieces(), *units])
    whole = pattern is not None
    rust = _rust(models.BPE(vocab=vocab, merges=[], byte_fallback=True, ignore_merges=whole), form)
    if pattern is not None:
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _finish(rust)


def _rust(model: models.Model, form: str | None) -> Rust:
    rust = Rust(model)
    if form is not None:
        rust.normalizer = getattr(normalizers, form)()
    return rust


def _finish(rust: Rust, *more: str) -> Tokenizer:
    special = [AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, *more)]
    rust.add_special_tokens(special)
    rust.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    return Tokenizer(rust)


def _told(spec: TokenizerSpec, tokenizer: Tokenizer) -> Tokenizer:
    reached = tokenizer.vocab_size
    if spec.vocab_size is not None and reached < spec.vocab_size:
        warnings.warn(
            f"{type(spec).__name__}: vocab_size={spec.vocab_size} is more than this text supports; it "
            f"reached {reached}. Train on more text, or ask for {reached}",
            stacklevel=3,
        )
    return tokenizer
