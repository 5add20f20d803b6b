"""The tokenizer that a GGUF file describes in its metadata, as a `Tokenizer`.

    tokenizer.ggml.model = "gpt2"     byte-level BPE: tokens and merges, cut as `tokenizer.ggml.pre` says
    tokenizer.ggml.model = "llama"    SentencePiece BPE: tokens and scores, what has no token in bytes

Source: ggml, docs/gguf.md, "Tokenizer"; llama.cpp, src/llama-vocab.cpp, for what the names of `pre` stand for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lmx.data.tokenizer import PATTERNS
from lmx.data.tokenizer_json import MAX_VOCAB, Tokenizer, told

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
QWEN = PATTERNS["llama3"].replace(r"\p{N}{1,3}", r"\p{N}")
CUTS: dict[str, tuple[str, bool]] = {
    "gpt-2": (PATTERNS["gpt2"], False),
    "olmo": (PATTERNS["gpt2"], False),
    "smollm": (PATTERNS["gpt2"], True),
    "starcoder": (PATTERNS["gpt2"], True),
    "refact": (PATTERNS["gpt2"], True),
    "command-r": (PATTERNS["gpt2"], True),
    "llama-bpe": (PATTERNS["llama3"], False),
    "qwen2": (QWEN, False),
    "gpt-4o": (PATTERNS["o200k"], False),
}
"""`tokenizer.ggml.pre` -> how text is cut before pairs are joined, and whether each digit is cut off first."""
SPACE = "▁"


def tokenizer_of(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata; `name` is what errors call the file.

    Raises: ValueError for a kind that is not known here, or metadata that disagree with each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{name}: tokenizer.ggml.model={kind!r:.99} is not known here; gpt2 and llama are")
    tokens = _list(metadata, "tokens", str, name)
    if not tokens:
        raise ValueError(f"{name}: tokenizer.ggml.tokens is not a list of tokens, but empty or missing")
    types = _list(metadata, "token_type", int, name) or [NORMAL] * len(tokens)
    if len(tokens) > MAX_VOCAB or len(types) != len(tokens):
        raise ValueError(f"{name}: {len(tokens):,} tokens with {len(types):,} types; the file is damaged")
    layout = (_byte_level if kind == "gpt2" else _sentencepiece)(metadata, tokens, name)
    layout["added_tokens"] = [
        _added(i, token, types[i] in (CONTROL, UNKNOWN))
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER) or (types[i] == UNKNOWN and kind == "llama")
    ]
    roles = {role: token_of(metadata, tokens, role) for role in ("bos", "eos", "unknown", "padding")}
    if not begins(metadata):
        roles["bos"] = None
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    with told(f"{name}: no tokenizer that tokenizers {tokenizers.__version__} knows", "fetch the file again"):
        rust = tokenizers.Tokenizer.from_str(json.dumps(layout))
    return Tokenizer(rust, {named[role]: token for role, token in roles.items()}, name)


def _list(metadata: Mapping[str, Any], key: str, kind: Any, name: str) -> list[Any]:
    """The list under a key, empty if there is none. Raises: ValueError for anything else."""
    found = metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        raise ValueError(f"{name}: tokenizer.ggml.{key}={found!r:.99} is not a list of {key}")
    return found


def begins(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with <bos>; where the file does not say, its kind does."""
    usual = (
        metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", usual))


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], name: str) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in CUTS:
        raise ValueError(
            f"{name}: tokenizer.ggml.pre={pre!r:.99} says how text is cut, and is none of {', '.join(CUTS)}; the ids "
            "would be others than the model has learned"
        )
    pattern, single_digits = CUTS[pre]
    merges = _list(metadata, "merges", str, name)
    digits = [{"type": "Digits", "individual_digits": True}] if single_digits else []
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*digits, cut, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": _ids(tokens, name),
            "merges": [merge.split(" ") for merge in merges],
            "ignore_merges": pre == "llama-bpe",
        },
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], name: str) -> dict[str, Any]:
    scores = _list(metadata, "scores", float | int, name)
    if len(scores) != len(tokens):
        raise ValueError(f"{name}: {len(tokens):,} tokens with {len(scores):,} scores; the file is damaged")
    vocab = _ids(tokens, name)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    spaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "decoder": {
            "type": "Sequence",
            "decoders": [spaced, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": _merges(vocab, scores),
            "unk_token": token_of(metadata, tokens, "unknown"),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[list[str]]:
    """Pairs that join to a token, the token of the best score first: what SentencePiece's BPE does in its search."""
    found = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], i, vocab[left], vocab[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _ids(tokens: list[str], name: str) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ValueError(f"{name}: the token {twice!r:.99} comes twice in tokenizer.ggml.tokens")
    return ids


def token_of(metadata: Mapping[str, Any], tokens: Sequence[str], role: str) -> str | None:
    """The token of a role, by the role's name in the metadata: bos, eos, unknown or padding."""
    i = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None


def _added(i: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, "special": special, **flags}
