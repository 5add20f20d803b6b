"""What comes beside a released model's weights: its tokenizer, the template of its conversations, what ends a reply.

A Hugging Face folder says it in files, a GGUF file in its metadata; a run keeps, in its subfolder KEPT, what its model
came with. Nothing of it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmx.formats import gguf

from .chat_template import ChatTemplate
from .tokenizer_gguf import beside_of, tokenizer_of
from .tokenizer_json import Tokenizer

BESIDE = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
KEPT = "released"
"""The subfolder of a run that keeps what came beside the weights of the model it was made from."""


def is_released(path: Path) -> bool:
    """Whether a path is a GGUF file or a folder with a config.json and no run in it."""
    return path.suffix == ".gguf" or ((path / "config.json").exists() and not (path / "run.txt").exists())


def beside(path: Path) -> dict[str, str]:
    """Name -> text of those of the files in BESIDE that a folder has; a run has them in KEPT, and of a GGUF file the
    metadata say what they would."""
    if path.suffix == ".gguf":
        return beside_of(gguf.read(path).metadata)
    folder = path / KEPT if (path / "run.txt").exists() else path
    kept = (file for file in map(folder.joinpath, BESIDE) if file.is_file())
    return {file.name: file.read_text(encoding="utf-8") for file in kept}


def tokenizer(path: Path) -> Tokenizer:
    """That of a GGUF file, a folder or a tokenizer.json. A released model's has a bos token only if its texts begin
    with it; `end_ids` are those that end its replies.

    Raises: FileNotFoundError if there is none; ValueError if it is damaged.
    """
    if path.suffix == ".gguf":
        said = gguf.read(path).metadata
        found, files = tokenizer_of(said, str(path)), beside_of(said)
    else:
        found = in_folder(path) if is_released(path) else Tokenizer.load(path)
        files = beside(path)
    return found.ending_with(end_ids(files, path))


def in_folder(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with a bos token only if the model's texts begin with it."""
    found = Tokenizer.load(path)
    config = object_in(beside(path), "tokenizer_config.json", path)
    return found if config.get("add_bos_token", found.begins) else found.without("bos_token")


def chat(beside: Mapping[str, str], where: Path) -> ChatTemplate | None:
    """The chat template among what came beside a model; None if there is none, or none that is the default.

    Raises: ValueError for a file that is damaged, or a template that is no text.
    """
    config = object_in(beside, "tokenizer_config.json", where)
    name, source = "chat_template.jinja", beside.get("chat_template.jinja")
    if source is None:
        name, source = "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{where / name}: chat_template is {source!r:.99}, not a text")
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    tokens = {key: x.get("content") if isinstance(x, dict) else x for key, x in tokens.items()}
    specials = {key: token for key, token in tokens.items() if isinstance(token, str)}
    return ChatTemplate(source, specials, f"the chat template {where / name}")


def end_ids(beside: Mapping[str, str], where: Path) -> tuple[int, ...]:
    """The ids that end a reply, as what came beside a model says: eos_token_id of generation_config.json, else of
    config.json.

    Raises: ValueError for a file that is damaged, or an eos_token_id that is neither an id nor a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        found = object_in(beside, name, where).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int for i in ids):
                raise ValueError(f"{where / name}: eos_token_id={found!r:.99}; use an id or a list of ids")
            return tuple(ids)
    return ()


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object. Raises: ValueError if it holds something else."""
    try:
        return object_in({file.name: file.read_text(encoding="utf-8")}, file.name, file.parent)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a JSON object ({error!s:.200})") from None


def object_in(files: Mapping[str, str], name: str, where: Path) -> dict[str, Any]:
    """The JSON object of one of the files, by name -> text; {} if it is not there."""
    try:
        found = json.loads(files.get(name, "{}"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where / name}: not a JSON object ({error!s:.200})") from None
    return found
