"""The tokenizer that a GGUF file describes in its metadata, as a `Tokenizer`; and a `Tokenizer` as such metadata.

    tokenizer.ggml.model = "gpt2"     byte-level BPE: tokens and merges, cut as `tokenizer.ggml.pre` says
    tokenizer.ggml.model = "llama"    SentencePiece BPE: tokens and scores, what has no token in bytes

Source: ggml, docs/gguf.md, "Tokenizer"; llama.cpp, src/llama-vocab.cpp, for what the names of `pre` stand for.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import regex
import tokenizers

from lmx.data.tokenizer import PATTERNS
from lmx.data.tokenizer_json import MAX_VOCAB, Tokenizer, byte_pieces, flat, told

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
    "granite-embed-multi-97m": (PATTERNS["o200k"], False),
}
"""`tokenizer.ggml.pre` -> how text is cut before pairs are joined, and whether each digit is cut off first.

Models of "gpt-4o" learned it so; llama.cpp leaves out the marks of that pattern, \\p{M}, and cuts हिन्दी before every
vowel sign. Since 2026 it knows the whole pattern, by the name MARKED.
"""
MARKED = "granite-embed-multi-97m"
SPACE = "▁"
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Role in the metadata -> in a `Tokenizer`."""
ENDS = ("eos", "eot", "eom")
"""Roles of the tokens that end a reply."""


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
    roles = {role: token_of(metadata, tokens, role) for role in NAMED}
    if not begins(metadata):
        roles["bos"] = None
    with told(f"{name}: no tokenizer that tokenizers {tokenizers.__version__} knows", "fetch the file again"):
        rust = tokenizers.Tokenizer.from_str(json.dumps(layout))
    return Tokenizer(rust, {NAMED[role]: token for role, token in roles.items()}, name)


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


def beside_of(said: Mapping[str, Any]) -> dict[str, str]:
    """What a Hugging Face folder says of its tokenizer, of chats and of how to generate, by the metadata: file name ->
    text."""
    tokens = said.get("tokenizer.ggml.tokens") or ()
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    roles = {role: token_of(said, tokens, name) for role, name in named.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"add_bos_token": begins(said)} | {role: token for role, token in roles.items() if token}
    ends = [said.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    ids = [i for at, i in enumerate(ends) if i is not None and i not in ends[:at]]
    found = {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2)}
    found |= {"generation_config.json": json.dumps({"eos_token_id": ids}, indent=2)} if ids else {}
    template = said.get("tokenizer.chat_template")
    return found | ({} if template is None else {"chat_template.jinja": str(template)})


def _added(i: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, "special": special, **flags}


def metadata_of(tokenizer: Tokenizer, n_tokens: int, bos_id: int | None = None) -> dict[str, Any]:
    """The metadata that `tokenizer_of` makes the same tokenizer of.

    Args:
      n_tokens: rows of the model's embedding; those beyond the vocabulary are called [PAD0], [PAD1] and so on.
      bos_id: named as the bos where the tokenizer has none; texts still begin without it.
    Raises: ValueError for a tokenizer that llama.cpp has no counterpart of, with what it would cut otherwise.
    """
    layout = tokenizer.layout
    added = {token["id"]: token for token in layout["added_tokens"]}
    if tokenizer.kind not in ("bpe", "byte"):
        raise ValueError(f"a tokenizer of kind {tokenizer.kind} has no counterpart in llama.cpp; {_TRAIN}")
    if tokenizer.vocab_size > n_tokens:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model rows for {n_tokens:,} alone"
        )
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(
                f"the token {token['content']!r:.99} takes spaces beside it or whole words alone, which GGUF cannot "
                "say; set its lstrip, rstrip and single_word to false in tokenizer.json"
            )
    tokens = [tokenizer.token(i) for i in range(tokenizer.vocab_size)] + [None] * (
        n_tokens - tokenizer.vocab_size
    )
    types = [UNUSED if token is None else NORMAL for token in tokens]
    empty = (i for i, type_ in enumerate(types) if type_ == UNUSED)
    for n, i in enumerate(empty):
        tokens[i] = f"[PAD{n}]"
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER
    as_kind = _as_byte_level if "ByteLevel" in str(layout["decoder"]) else _as_sentencepiece
    found = as_kind(layout, tokens, types)
    if found.get("pre") == "gpt-4o" and _joins_marks(tokenizer):
        found["pre"] = MARKED
        warnings.warn(
            f"tokens join letters with their marks, as of Hindi: a llama.cpp from before it knew {MARKED} (2026) will "
            "not open the file",
            stacklevel=2,
        )
    roles = {role: tokenizer.roles[name] for role, name in NAMED.items()}
    ids = {role: tokens.index(token) for role, token in roles.items() if token is not None}
    if bos_id is not None:
        ids.setdefault("bos", bos_id)
    ends = sorted(tokenizer.end_ids, key=lambda i: i != tokenizer.eos_id)
    if len(ends) > len(ENDS):
        raise ValueError(f"{len(ends)} tokens end a reply, {ends}; GGUF names {len(ENDS)}")
    ids |= dict(zip(ENDS, ends))
    found = {"tokens": tokens, "token_type": types, **found} | {
        f"{role}_token_id": i for role, i in ids.items()
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    found["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None
    _check_same(tokenizer, tokenizer_of(found, "the tokenizer in GGUF"))
    return found


_TRAIN = 'train one with Bpe(pattern="o200k"), or "gpt2" or "llama3" (lmx.data.Bpe), or with Byte'
_SAMPLE = "Don't   stop, I'LL\n\n\t1234 ४५ नमस्ते दुनिया क्षेत्र 👩🏽‍🚀🙂 e\u0301é ﬁ 中文 ▁ \u00a0x"


def _as_byte_level(layout: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in layout["model"]["merges"]]
    return {"model": "gpt2", "pre": _pre(layout), "merges": merges}


def _pre(layout: dict[str, Any]) -> str:
    """The name in CUTS of how a tokenizer cuts text. Raises: ValueError if it has none."""
    before = [step["type"] for step in flat(layout["normalizer"], "normalizers")]
    steps = list(flat(layout["pre_tokenizer"], "pretokenizers"))
    digits = {"type": "Digits", "individual_digits": True} in steps[:1]
    cuts = [_cut(step) for step in steps[digits:]]
    cuts = [cut for cut in cuts if cut is not None]
    for pre, (pattern, single_digits) in CUTS.items():
        if (before, cuts, digits) == (["NFC"] if pre == "qwen2" else [], [pattern], single_digits):
            return pre
    if not layout["model"]["merges"] and not before and not cuts:
        return "gpt-2"  # bytes, which no cut parts
    how = " after ".join([f"{cuts}", *["Digits"] * digits, *before])
    raise ValueError(f"the tokenizer cuts text by {how}; llama.cpp cuts by {', '.join(CUTS)} alone; {_TRAIN}")


def _cut(step: dict[str, Any]) -> str | None:
    """The pattern by which a step cuts; None if it leaves text whole, and its own description for any other."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return PATTERNS["gpt2"] if step["use_regex"] else None
    alike = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    return step["pattern"]["Regex"] if alike and "Regex" in step.get("pattern", {}) else json.dumps(step)


def _as_sentencepiece(layout: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """A score per token: the later its pair is joined, the lower. Raises: ValueError where that says too little."""
    model, before = layout["model"], list(flat(layout["normalizer"], "normalizers"))
    before += flat(layout["pre_tokenizer"], "pretokenizers")
    kinds = {step["type"] for step in before}
    pieces = set(byte_pieces())
    if not pieces <= set(tokens) or kinds - {"Prepend", "Replace", "Metaspace", "Split"}:
        raise ValueError(
            f"a tokenizer of pairs with {', '.join(sorted(kinds)) or 'no steps'} before them, or without a token for "
            f"each byte, has no counterpart in llama.cpp; {_TRAIN}"
        )
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and token in pieces:
            types[i] = BYTE
        if token == model["unk_token"]:
            types[i] = UNKNOWN
    places: dict[str, int] = {}
    for left, right in model["merges"]:
        places.setdefault(left + right, len(places))
    scores = [-float(places.get(token, len(places))) for token in tokens]
    made = {(a, b) for a, b in _merges(_ids(tokens, "the tokenizer"), scores) if a + b in places}
    if made != {(a, b) for a, b in model["merges"]}:
        raise ValueError(f"the tokenizer joins other pairs than the scores of tokens say; {_TRAIN}")
    prefix = any(
        step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in before
    )
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}


def _joins_marks(tokenizer: Tokenizer) -> bool:
    """Whether a token holds a mark beside another character, or crosses characters that it holds in part."""
    for i in range(tokenizer.vocab_size):
        raw = tokenizer.token_bytes(i)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            if any(byte >= 0xC0 for byte in raw[1:]):
                return True
        else:
            if len(text) > 1 and regex.search(r"\p{M}", text):
                return True
    return False


def _check_same(tokenizer: Tokenizer, again: Tokenizer) -> None:
    """Raises: ValueError unless each token's own text, and a text of many scripts, have the same ids."""
    texts = [_SAMPLE]
    for i in range(tokenizer.vocab_size):
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(tokenizer.token_bytes(i).decode())
    for text, ids, other in zip(texts, tokenizer.encode_batch(texts), again.encode_batch(texts)):
        if ids != other:
            raise ValueError(
                f"as llama.cpp cuts it, {text!r:.99} would be {other[:9]}, and {ids[:9]} by the tokenizer; {_TRAIN}"
            )
