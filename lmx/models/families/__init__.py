"""The families of released models, each a way to read and write a config.json and a map of tensor names."""

from lmx.models.families import gemma, gpt2, llama, mixture
from lmx.models.families.base import Family, config_of
from lmx.models.families.fields import Fields, check_counts

FAMILIES: dict[str, Family] = {
    family.model_type: family for module in (llama, gpt2, gemma, mixture) for family in module.FAMILIES
}

__all__ = ["FAMILIES", "Family", "Fields", "check_counts", "config_of"]
