"""The exact tokens of a prompt, and of each what it stands for: what a model sees, made visible.

parts = prompt_parts(task, question, shots)            [("instruction", "..."), ("shot 1 question", "..."), ...]
named_tokens(tokenizer, ids, parts)                    [Token(id=12, piece="कम", part="shot 1 question"), ...]
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from lmx.data.chat_template import ChatTemplate
from lmx.data.tokenizer_json import Tokenizer

from .prompt import prompt_messages
from .task import Example, Task

Part = tuple[str, str]
"""What a text is, "" for what a template puts between, and the text."""


class Token(NamedTuple):
    """piece: as `shown_piece`. part: what most of a prompt's token belongs to, "" for a template's own."""

    id: int
    piece: str
    part: str


def prompt_parts(
    task: Task, question: str, shots: Sequence[Example] = (), chat: ChatTemplate | None = None
) -> list[Part]:
    """The text of a prompt in parts that joined are all of it: of `prompt_text`, or with a chat template what that
    makes of `prompt_messages`; one part without a name where the template changes what is said, as one that cuts texts.

    Raises: ValueError, as `ChatTemplate.render`.
    """
    names = [f"shot {i} {what}" for i in range(1, len(shots) + 1) for what in ("question", "answer")]
    names = [*(["instruction"] if task.instruction else []), *names, "question"]
    if chat is None:
        said = [task.instruction] if task.instruction else []
        texts = [*said, *(text for x in shots for text in (x.question, x.answer)), question]
        parts = []
        for name, text in zip(names, texts):
            parts += [("", task.template.between)] if parts and not name.endswith(" answer") else []
            parts.append((name, text))
        return parts
    messages = prompt_messages(task, question, shots)
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    rest = chat.render([m | {"content": mark} for m, mark in zip(messages, marks)])
    parts = []
    for name, mark, message in zip(names, marks, messages):
        before, _, rest = rest.partition(mark)
        parts += [("", before), (name, message["content"])]
    parts.append(("", rest))
    whole = chat.render(messages)
    return parts if "".join(text for _, text in parts) == whole else [("", whole)]


def named_tokens(
    tokenizer: Tokenizer, ids: Sequence[int], parts: Sequence[Part], chat: ChatTemplate | None = None
) -> list[Token]:
    """Every id with its piece and its part; a token of two parts is of the one it ends in.

    No part is known, and all are "", where the tokenizer does not keep the text (one that normalises, or has unknown
    words).
    """
    special = tokenizer.special_ids
    spelled = [  # in a chat template's text special tokens stand by name, before a plain text there is only bos
        ((tokenizer.token(i) or "") if chat else "").encode() if i in special else tokenizer.token_bytes(i)
        for i in ids
    ]
    text = "".join(text for _, text in parts).encode()
    begin = len(b"".join(spelled)) - len(text)  # of the text, after a space that some tokenizers put in front
    kept = b"".join(spelled).endswith(text)
    ends = list(accumulate(len(text.encode()) for _, text in parts))
    found = []
    for i, raw, end in zip(ids, spelled, accumulate(map(len, spelled))):
        part = ""
        if kept and raw and end > begin:
            part = next(name for (name, _), stop in zip(parts, ends) if stop >= end - begin)
        found.append(Token(i, shown_piece(tokenizer, i), part))
    return found


def shown_piece(tokenizer: Tokenizer, token_id: int) -> str:
    """A token made visible: special ones by name, spaces as ␣, a mark that stands alone on ◌, and bytes that are part
    of a character in hexadecimal.

    >>> from lmx.data import Byte
    >>> tokenizer = Byte().train(["क"])
    >>> [shown_piece(tokenizer, i) for i in (tokenizer.bos_id, *tokenizer.encode(" क"))]
    ['<|bos|>', '␣', '⟨e0⟩', '⟨a4⟩', '⟨95⟩']
    """
    raw = tokenizer.token_bytes(token_id)
    if token_id in tokenizer.special_ids or not raw:
        return str(tokenizer.token(token_id))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{raw.hex(' ')}⟩"
    shown = "".join("␣" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)
    return "◌" * unicodedata.category(text[0]).startswith("M") + shown
