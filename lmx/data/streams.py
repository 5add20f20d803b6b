"""Steps between a source and a store: each turns an iterator of documents into another, on the host.

A document in parts (see sources.py) is one document to every stream: it is kept or left out whole. So is a
conversation, and a pair of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lmx.text.normalize import normalize, strip_controls

from .chat_template import ChatTemplate
from .encoded import encoded, ids_of
from .sources import Document, messages_in, texts_of
from .tally import Report

_GROUP = 1 << 20


@dataclass(frozen=True)
class Stream:
    """Base of all streams, itself the one that changes nothing; `report` counts what a stream leaves out."""

    def __call__(self, documents: Iterable[Document], report: Report | None = None) -> Iterator[Document]:
        return iter(documents)


@dataclass(frozen=True)
class Clean(Stream):
    """Unicode normalised to NFC, control characters removed, documents shorter than `min_chars` left out; of
    conversations those whose replies, one of them, are.

    Tab and line feed stay, and so do the joiners U+200C and U+200D, which Devanagari needs. Plain ASCII text
    without control characters comes out as it went in.
    """

    min_chars: int = 1

    def __call__(self, documents, report=None):
        report = report if report is not None else Report()
        continues = False
        for document in documents:
            texts = [normalize(text) for text in texts_of(document)]
            cleaned = [strip_controls(text) for text in texts]
            if removed := sum(map(len, texts)) - sum(map(len, cleaned)):
                report.note("control_characters_removed", document["id"], removed)
            more = document.get("more", False)
            document = _with_texts(document, cleaned)
            if continues or more or all(len(x.strip()) >= self.min_chars for x in _learned(document)):
                yield document
            else:
                report.skip("too_short", document["id"])
            continues = more


@dataclass(frozen=True)
class Split(Stream):
    """The documents of one part, "train" or "valid", told apart by a hash of their text, of a question alone, or of
    roles and texts.

    So a document stays where it is when the corpus grows or is ordered anew, and equal documents are never on
    both sides. Of a document in parts the first part is hashed.

    valid: expected share of the documents that belong to "valid", in [0, 1].
    """

    part: str
    valid: float = 0.05

    def __post_init__(self):
        if self.part not in ("train", "valid"):
            raise ValueError(f"Split: part={self.part!r}; use 'train' or 'valid'")
        if not 0.0 <= self.valid <= 1.0:
            raise ValueError(f"Split: valid={self.valid}; use a share from 0 to 1")

    def __call__(self, documents, report=None):
        continues = chosen = False
        for document in documents:
            if not continues:
                digest = hashlib.blake2b(_content(document), digest_size=8).digest()
                is_valid = int.from_bytes(digest, "big") < self.valid * 2**64
                chosen = is_valid == (self.part == "valid")
            continues = document.get("more", False)
            if chosen:
                yield document


@dataclass(frozen=True)
class Take(Stream):
    """The first n documents."""

    n: int

    def __call__(self, documents, report=None):
        left = self.n
        for document in documents:
            if left <= 0:
                return
            yield document
            left -= not document.get("more", False)


@dataclass(frozen=True)
class Tokenize(Stream):
    """Documents as token ids: {"ids": list of int, "id", perhaps "more"}, with bos before the first part and
    eos after the last, if the tokenizer has them; unknown tokens are noted. About a million characters are
    encoded at a time.

    Conversations go through `chat` and get a "mask", 1 on the tokens of replies; see `ChatTemplate.replies`. Those that
    the template refuses are left out, and counted. A pair gives two documents, the chosen one first, or none. Questions
    get one that is 1 on the tokens of the answer and the eos, or on the number of the class, which is the last "token"
    and so nothing but a label.
    """

    tokenizer: Any
    chat: ChatTemplate | None = None

    def __call__(self, documents, report=None):
        begin, end = ([] if i is None else [i] for i in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        unknown = self.tokenizer.unk_id
        continues = False
        for group in _groups(documents):
            if "messages" in group[0]:
                yield from self._conversations(group, report if report is not None else Report())
                continue
            if "answer" in group[0]:
                yield from map(self._answered, group)
                continue
            encoded = self.tokenizer.encode_batch([document["text"] for document in group])
            for document, ids in zip(group, encoded):
                if report is not None and unknown is not None and unknown in ids:
                    report.note("unknown_tokens", document["id"], ids.count(unknown))
                more = document.get("more", False)
                ids = [*([] if continues else begin), *ids, *([] if more else end)]
                yield {"ids": ids, "id": document["id"], **({"more": True} if more else {})}
                continues = more

    def _answered(self, document):
        if isinstance(document["answer"], int):
            ids, learned = ids_of(self.tokenizer, document["text"]), [document["answer"]]
        else:
            found = encoded(self.tokenizer, document["text"], document["answer"])
            end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
            ids, learned = found.ids[: found.start], found.ids[found.start :] + end
        more = {"score": document["score"]} if "score" in document else {}
        return {
            "ids": ids + learned,
            "mask": [0] * len(ids) + [1] * len(learned),
            "id": document["id"],
            **more,
        }

    def _conversations(self, group, report):
        asked = [[document[name] for name in _PARTS if name in document] for document in group]
        found = self.chat.replies(self.tokenizer, [messages for each in asked for messages in each])
        for document, each in zip(group, asked):
            parts = [next(found) for _ in each]
            if why := next((part for part in parts if isinstance(part, str)), None):
                report.skip("refused_by_the_template", f"{document['id']}: {why}")
                continue
            if len(parts) == 2 and parts[0].ids == parts[1].ids:
                report.skip("equal_replies", f"{document['id']} has two of the same tokens")
                continue
            for part in parts:
                if part.left_out:
                    report.note("replies_the_template_rewrites_later", document["id"], part.left_out)
                if (unknown := self.tokenizer.unk_id) is not None and unknown in part.ids:
                    report.note("unknown_tokens", document["id"], part.ids.count(unknown))
                yield {"ids": part.ids, "mask": part.mask, "id": document["id"]}


_PARTS = ("messages", "rejected")
"""The conversations of a document, see chat.py."""


def _with_texts(document: Document, texts: list[str]) -> Document:
    if "messages" not in document:
        return {**document, **dict(zip(("text", "answer"), texts))}
    left = iter(texts)
    parts = {name: document[name] for name in _PARTS if name in document}
    return document | {name: [m | {"content": next(left)} for m in part] for name, part in parts.items()}


def _learned(document: Document) -> list[str]:
    """The texts that are trained on: of a conversation the replies, of a question the answer."""
    if "messages" not in document:
        return texts_of(document)[-1:]
    return [message["content"] for message in messages_in(document) if message["role"] == "assistant"]


def _content(document: Document) -> bytes:
    if "messages" in document:
        said = [[message["role"], message["content"]] for message in messages_in(document)]
    else:
        return document["text"].encode("utf-8")
    return json.dumps(said, ensure_ascii=False).encode("utf-8")


def _groups(documents):
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += sum(map(len, texts_of(document)))
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
