"""Text to ids and back: one class around a tokenizer.json, which every HF-compatible program reads.

    tokenizer = Bpe(vocab_size=4096).train(texts)
    tokenizer.decode(tokenizer.encode("नमस्ते")) == "नमस्ते"
    tokenizer.save("out"); Tokenizer.load("out")

How each kind is trained is in tokenizer.py; here is what they share, and what holds for any file: text never
becomes a special token, whatever it spells; nothing is cut, padded or left to chance; `token_bytes` tells the
UTF-8 bytes of every id, so that a stream can put characters together itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import regex
import tokenizers

PAD, BOS, EOS, UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"

# Names that say a token's role in files that come without a tokenizer_config.json, ours first.
_ROLES = {
    "pad_token": (PAD, "<pad>", "[PAD]"),
    "bos_token": (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>"),
    "eos_token": (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "unk_token": (UNK, "<unk>", "[UNK]"),
}
MAX_VOCAB = 1 << 24
_BYTE_PIECE = regex.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """A trained tokenizer.

    kind: "byte", "char", "grapheme", "word", "bpe", "unigram" or "wordpiece", read off the file.
    vocab_size: the largest id + 1, the rows an embedding needs.
    lossless: decode(encode(text)) is text for every text; false where it is normalised or words go unknown.
    hash: sha256 of the tokenizer's content, the same for the same ids.
    bos_id, eos_id, unk_id: None where the file has no such token. pad_id: 0 where it has none; padding is
      masked, so any id serves.
    specials: the names of its special tokens.
    """

    def __init__(
        self,
        rust: tokenizers.Tokenizer,
        roles: Mapping[str, str | None] | None = None,
        name: str = "the tokenizer",
    ):
        """roles: "bos_token", "eos_token", "pad_token", "unk_token" -> the token, or None for a tokenizer
        that has none; a role not named is found by its usual names. name: what errors call it."""
        rust.no_truncation()
        rust.no_padding()
        if isinstance(rust.model, tokenizers.models.BPE):
            rust.model.dropout = None
        rust.encode_special_tokens = True
        layout = json.loads(rust.to_str())
        vocab = rust.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError(f"{name} has an empty vocabulary; train it again, or give another")
        roles = roles or {}
        self.roles = {
            role: roles.get(role) if role in roles else _find(names, vocab) for role, names in _ROLES.items()
        }
        for role, token in self.roles.items():
            if token is not None and token not in vocab:
                raise ValueError(f"{name}: {role} {token!r} is not in the vocabulary of {len(vocab)} tokens")
        self._rust, self._name = rust, name
        self.kind = _kind(layout)
        self.vocab_size = max(vocab.values()) + 1
        self.lossless = _lossless(layout, vocab)
        self.hash = _hash(layout, self.roles)
        self.bos_id, self.eos_id, self.unk_id = (
            self._id_of(role) for role in ("bos_token", "eos_token", "unk_token")
        )
        self.pad_id = self._id_of("pad_token") or 0
        self._ends: tuple[int, ...] = ()
        special = {token["id"]: token["content"] for token in layout["added_tokens"] if token["special"]}
        self.specials = tuple(special.values())
        special.pop(self.unk_id, None)
        self._special = special
        self._bytes = _token_bytes(layout, vocab, self.vocab_size, special)
        self._joins = set(_types(layout["decoder"])) in ({"ByteLevel"}, {"ByteFallback", "Fuse"}, {"Fuse"})
        self._first_byte = _first_byte(self._bytes) if self.kind == "byte" and self.lossless else None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the folder that holds one; a tokenizer_config.json in that folder says
        which tokens begin and end a document.

        Raises: FileNotFoundError; ValueError for a file that is not a tokenizer.json.
        """
        path, roles = Path(path), {}
        if path.is_dir():
            config = path / "tokenizer_config.json"
            roles = _roles_of(config) if config.exists() else {}
            path = path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; give a tokenizer.json or the folder that holds one"
            )
        layout = _read_json(path)
        if "model" not in layout:
            raise ValueError(f"{path} has no 'model', so it is no tokenizer.json; {_WAY_OUT}")
        problem = f"{path} is JSON, but no tokenizer that tokenizers {tokenizers.__version__} knows"
        with told(problem, _WAY_OUT):
            largest = _largest_id(layout)
        if largest >= MAX_VOCAB:
            raise ValueError(f"{path}: token id {largest} is not below {MAX_VOCAB:,}; {_WAY_OUT}")
        with told(problem, _WAY_OUT):
            return cls(tokenizers.Tokenizer.from_str(path.read_text("utf-8")), roles, str(path))

    def save(self, path: str | Path) -> Path:
        """Writes the tokenizer; returns the path of the tokenizer.json. A file appears whole or not at all.

        A path that ends in .json is that file. Any other path is a folder, made if need be, which gets
        tokenizer.json and tokenizer_config.json, as HF programs expect.
        Raises: ValueError for a .json path if that file alone could not say which token ends a text.
        """
        path = Path(path)
        if path.suffix == ".json":
            vocab = self._rust.get_vocab(with_added_tokens=True)
            lost = [role for role, names in _ROLES.items() if _find(names, vocab) != self.roles[role]]
            if lost:
                raise ValueError(
                    f"{path} alone could not say what the {lost[0]} is; save to a folder instead"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path.mkdir(parents=True, exist_ok=True)
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **self.roles,
            }
            _write(path / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
            path = path / "tokenizer.json"
        _write(path, self._rust.to_str(pretty=True))
        return path

    def encode(self, text: str, specials: bool = False, begins: bool = True) -> list[int]:
        """The ids of the text, without bos or eos. What looks like a special token is spelled as text.

        Args:
          specials: a special token's name is that token, as in a text that a chat template wrote. begins: the text
            is a beginning; no space is put before one that goes on, as some tokenizers put before every text.
        """
        return self.located(text, begins)[0] if specials else self.encode_batch([text])[0]

    def located(self, text: str, begins: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode` with specials, and of each the characters [start, end) of the text it was made of."""
        with told(f"{self._name} cannot encode this text", _OTHER):
            _utf8(text)
            if not begins:
                line = self._line_ids
                after = self._with_specials.encode("\n" + text, add_special_tokens=False)
                if after.ids[: len(line)] == line:
                    at = after.offsets[len(line) :]
                    return after.ids[len(line) :], [(start - 1, end - 1) for start, end in at]
            found = self._with_specials.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, encoded in parallel.

        Raises: ValueError for a text with a lone surrogate, which has no UTF-8, and for one that the file's
          own rules cannot encode, as without an unknown token.
        """
        if self._first_byte is not None:
            return [[byte + self._first_byte for byte in _utf8(text)] for text in texts]
        ids = self._ids(texts)
        return [i if self._special.keys().isdisjoint(i) else self._spell(text) for i, text in zip(ids, texts)]

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. specials: also show special tokens."""
        ids = [int(i) for i in ids]
        if not self._joins:
            with told(f"{self._name} cannot decode these ids", _OTHER):
                return self._rust.decode(ids, skip_special_tokens=not specials)
        shown = self._special if specials else {}
        pieces = (shown[i].encode() if i in shown else self.token_bytes(i) for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text, which may be part of a character; b"" for special
        tokens. If `lossless`, those of encode(text) joined are text.encode().

        Raises: ValueError for an id outside of the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is not in 0..{self.vocab_size - 1}, the ids of this tokenizer"
            )
        return self._bytes[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the file, such as "<|eos|>"; None if there is no such token."""
        return self._rust.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The name of a token in the file; None if the id is not used."""
        return self._rust.id_to_token(token_id)

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of every token of the text, in bytes of its UTF-8. They cover the text without gap
        or overlap if `lossless`; otherwise they are what the file's own rules say, in whole characters."""
        if self.lossless:
            ids = self.encode(text)
            ends = list(accumulate((len(self._bytes[i]) for i in ids), initial=0))
            return list(zip(ids, ends, ends[1:]))
        at = list(accumulate((len(char.encode()) for char in text), initial=0))
        with told(f"{self._name} cannot encode this text", _OTHER):
            encoding = self._rust.encode(text, add_special_tokens=False)
        return [(i, at[start], at[end]) for i, (start, end) in zip(encoding.ids, encoding.offsets)]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of its special tokens."""
        return tuple(self._special)

    @property
    def begins(self) -> bool:
        """Whether the file says that a text begins with the bos token."""
        first = self._rust.encode("", add_special_tokens=True).ids[:1]
        return self.bos_id is not None and first == [self.bos_id]

    def without(self, role: str) -> Tokenizer:
        """The same tokenizer with no token in a role, such as "bos_token" for models that begin without one."""
        return Tokenizer(self._rust, self.roles | {role: None}, self._name).ending_with(self._ends)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text or a reply: the eos, unless `ending_with` named others."""
        return self._ends or (() if self.eos_id is None else (self.eos_id,))

    def ending_with(self, ids: Iterable[int]) -> Tokenizer:
        """The same tokenizer for a model whose replies end with any of these ids; those that it has not are left out,
        and none at all means its eos."""
        other = copy.copy(self)
        other._ends = tuple(dict.fromkeys(i for i in ids if 0 <= i < self.vocab_size))
        return other

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """A copy that finds special tokens in a text: a setting of the library's, which threads would share. It has no
        post-processor, which would leave spaces out of where a token stands."""
        rust = tokenizers.Tokenizer.from_str(json.dumps(self.layout | {"post_processor": None}))
        rust.encode_special_tokens = False
        return rust

    @functools.cached_property
    def _line_ids(self) -> list[int]:
        return self._with_specials.encode("\n", add_special_tokens=False).ids

    @property
    def layout(self) -> dict[str, Any]:
        """What its tokenizer.json holds."""
        return json.loads(self._rust.to_str())

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says about it."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "lossless": self.lossless,
            "hash": self.hash,
        }

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, hash={self.hash[:12]!r})"

    def _id_of(self, role: str) -> int | None:
        token = self.roles[role]
        return None if token is None else self._rust.token_to_id(token)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the library alone gives each text."""
        with told(f"{self._name} cannot encode this text", _OTHER):
            try:
                batch = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
            except TypeError:
                for text in texts:
                    _utf8(text)
                raise
        return [encoding.ids for encoding in batch]

    def _spell(self, text: str) -> list[int]:
        """Encodes a text in which the model, left alone, would find special tokens, as models that keep them
        among their pieces do: cuts it after the first character of each name, so that none is whole."""
        names = regex.compile("|".join(regex.escape(name) for name in self._special.values()))
        cuts = [match.start() + 1 for match in names.finditer(text, overlapped=True)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        ids = [i for part in self._ids(parts) for i in part]
        found = self._special.keys() & set(ids)
        if found:
            names = ", ".join(repr(self._special[i]) for i in sorted(found))
            raise ValueError(
                f"the text spells the special token {names}, and this tokenizer has no other way to write it"
            )
        return ids


_WAY_OUT = (
    "`Tokenizer.save` and HF's `save_pretrained` write such files (a sentencepiece .model is another format)"
)
_OTHER = "mend the file, for example with an unknown token, or use another tokenizer"


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with."""
    first, last = min(rows), max(rows)
    return next((i for i, (x, y) in enumerate(zip(first, last)) if x != y), min(len(first), len(last)))


@contextlib.contextmanager
def told(what: str, way_out: str) -> Iterator[None]:
    """Turns what the Rust library raises, plain Exceptions and panics, and what a file of another shape makes
    of our own code, into a ValueError. A ValueError of the block stays as it is."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} ({said:.200}); {way_out}") from error


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Source: Radford et al. 2019 (GPT-2), encoder.py, bytes_to_unicode.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def byte_pieces() -> list[str]:
    """The pieces that spell in bytes what no other piece covers, as sentencepiece's byte_fallback does."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _find(names: Iterable[str], vocab: Mapping[str, int]) -> str | None:
    return next((name for name in names if name in vocab), None)


def _roles_of(path: Path) -> dict[str, str | None]:
    """The roles that a tokenizer_config.json names, and their tokens."""
    config = _read_json(path)
    roles = {role: config[role] for role in _ROLES if role in config}
    for role, token in roles.items():
        roles[role] = token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) and config[role] is not None:
            raise ValueError(
                f"{path}: {role} is {config[role]!r:.99}; use a string, null, or an object with its 'content'"
            )
    return roles


def _largest_id(layout: dict[str, Any]) -> int:
    """Of a file that the library has not seen yet: it takes memory for every id below the largest."""
    vocab = layout["model"].get("vocab", ())
    ids = [*vocab.values()] if isinstance(vocab, dict) else [len(vocab) - 1]
    ids += [token.get("id") for token in layout.get("added_tokens") or ()]
    return max((i for i in ids if isinstance(i, int)), default=-1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {_WAY_OUT}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; {_WAY_OUT}")
    return value


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is a lone surrogate, {text[error.start]!r}, without UTF-8; "
            "decode its bytes with errors='replace', or clean it with lmx.text.normalize.strip_controls"
        ) from error


def flat(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unfolded."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[inner]:
            yield from flat(step, inner)
    else:
        yield part


def _types(decoder: dict[str, Any] | None) -> list[str]:
    return [step["type"] for step in flat(decoder, "decoders")]


def _kind(layout: dict[str, Any]) -> str:
    model = layout["model"]
    if model["type"] == "BPE" and not model["merges"]:
        if "ByteLevel" in _types(layout["decoder"]):
            return "byte"
        return "grapheme" if model["ignore_merges"] else "char"
    return {"BPE": "bpe", "Unigram": "unigram", "WordLevel": "word", "WordPiece": "wordpiece"}[model["type"]]


def _lossless(layout: dict[str, Any], vocab: Mapping[str, int]) -> bool:
    if layout["normalizer"] is not None or any(t["lstrip"] or t["rstrip"] for t in layout["added_tokens"]):
        return False
    steps = list(flat(layout["pre_tokenizer"], "pretokenizers"))
    if any(step["type"] not in ("Split", "ByteLevel", "Digits") for step in steps):
        return False
    if any(step.get("behavior") == "Removed" or step.get("add_prefix_space") for step in steps):
        return False
    decoder = _types(layout["decoder"])
    if decoder == ["ByteLevel"]:
        return any(step["type"] == "ByteLevel" for step in steps) and all(c in vocab for c in byte_alphabet())
    fallback = layout["model"].get("byte_fallback", False) and all(piece in vocab for piece in byte_pieces())
    return fallback and decoder == ["ByteFallback", "Fuse"] and all(step["type"] == "Split" for step in steps)


def _hash(layout: dict[str, Any], roles: Mapping[str, str | None]) -> str:
    content = json.dumps([layout, dict(roles)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _token_bytes(
    layout: dict[str, Any], vocab: Mapping[str, int], size: int, special: Mapping[int, str]
) -> list[bytes]:
    steps = list(flat(layout["decoder"], "decoders"))
    added = {token["id"] for token in layout["added_tokens"]}
    table = [b""] * size
    for piece, i in vocab.items():
        if i not in special:
            table[i] = piece.encode() if i in added else _piece_bytes(piece, steps)
    return table


_BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def _piece_bytes(piece: str, steps: Sequence[dict[str, Any]]) -> bytes:
    """What the decoder's steps make of a piece in the middle of a text."""
    if not steps:
        return b" " + piece.encode()
    for step in steps:
        match step["type"]:
            case "ByteLevel" if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
            case "ByteFallback" if _BYTE_PIECE.fullmatch(piece):
                return bytes([int(piece[3:5], 16)])
            case "Metaspace":
                piece = piece.replace(step["replacement"], " ")
            case "Replace":
                pattern = step["pattern"]
                find = regex.escape(pattern["String"]) if "String" in pattern else pattern["Regex"]
                piece = regex.sub(find, lambda _, to=step["content"]: to, piece)
            case "WordPiece":
                prefix = step["prefix"]
                piece = piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}"
            case "BPEDecoder":
                piece = piece.replace(step["suffix"], " ")
    return piece.encode()


def _first_byte(table: Sequence[bytes]) -> int | None:
    """k if the ids are byte value + k, the plain case that needs no search; else None."""
    k = table.index(b"\x00")
    return k if list(table[k : k + 256]) == [bytes([byte]) for byte in range(256)] else None
