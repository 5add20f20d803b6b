"""What a family is: its config.json and its tensor names as values of the one Transformer, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lmx.models.families.fields import Fields
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry


class Family(NamedTuple):
    """config(fields) -> TransformerConfig; fields(config) -> the same as config.json has it;
    entries(config) -> where each parameter lies. architecture: the class that transformers reads it with."""

    model_type: str
    architecture: str
    config: Callable[[Fields], TransformerConfig]
    fields: Callable[[TransformerConfig], dict[str, Any]]
    entries: Callable[[TransformerConfig], list[Entry]]


def config_of(family: Family, asked: Fields) -> TransformerConfig:
    """The config that fields say. Raises: ValueError naming where they are, for what does not fit or is not read."""
    try:
        config = family.config(asked)
    except ValueError as error:
        raise ValueError(str(error) if asked.where in str(error) else f"{asked.where}: {error}") from None
    asked.finish()
    return config


def activation(f: Fields, name: str, default: str, known: dict[str, str]) -> str:
    """Our name of an activation. Raises: ValueError if we have no such."""
    f.only(name, *known)
    return known[f(name, str, default)]


def named(value: str, known: dict[str, str], what: str) -> str:
    """Their name of one of our values. Raises: ValueError if they have none."""
    for theirs, ours in known.items():
        if ours == value:
            return theirs
    raise ValueError(
        f"{what}={value!r}: transformers' models of this family have {', '.join(known.values())} alone"
    )
