"""The exact tokens of a prompt and of the answer that goes on with it.

    ids, start = encoded(tokenizer, "Sentiment:", " positive")        ids[start:] are the answer's

Both are encoded as one text, as a model saw such text in training: encoded apart they may be other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .chat_template import ChatTemplate
from .tokenizer_json import Tokenizer, common

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a conversation."""


class Encoded(NamedTuple):
    """ids[start:] are the answer's tokens, the others the prompt's."""

    ids: list[int]
    start: int


def encoded(tokenizer: Tokenizer, prompt: Prompt, answer: str, chat: ChatTemplate | None = None) -> Encoded:
    """The ids of a prompt with its answer, and where the answer starts.

    A token that holds the prompt's last and the answer's first characters is the answer's. A text gets the tokenizer's
    bos in front; messages are put into words by the chat template, and an answer to them is stripped.
    A tokenizer that does not keep a text (one that normalises, or has unknown words) tells the start otherwise: it is
    where the ids first differ from those of the prompt alone.
    Raises: ValueError for an answer without tokens, and for messages without a chat template.
    """
    answer = answer if isinstance(prompt, str) else answer.strip()
    ids = ids_of(tokenizer, prompt, chat, answer)
    spelled, start = b"", len(ids)
    while start and len(spelled) < len(answer.encode()):
        start -= 1
        spelled = tokenizer.token_bytes(ids[start]) + spelled
    if not spelled.endswith(answer.encode()):
        start = common([ids, ids_of(tokenizer, prompt, chat)])
    if start == len(ids):
        raise ValueError(f"the answer {answer!r} has no tokens of its own; give one that has text")
    return Encoded(ids, start)


def ids_of(
    tokenizer: Tokenizer, prompt: Prompt, chat: ChatTemplate | None = None, answer: str = ""
) -> list[int]:
    """The ids of a prompt, and of the answer that goes on with it. Raises: as `encoded`."""
    if isinstance(prompt, str):
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return bos + tokenizer.encode(prompt + answer)
    if chat is None:
        raise ValueError("messages need a chat template, and this model has none; give it text")
    return chat.ids(tokenizer, prompt, reply=answer)
