"""Thin linen modules: they name parameters and wire pure functions of `lmx.ops` together."""

from lmx.nn.attention import Attention, AttentionConfig, Context, Local
from lmx.nn.block import Block, BlockConfig
from lmx.nn.linear import KEPT, PRODUCT, Inputs, Linear, weight
from lmx.nn.mlp import Mlp, MlpConfig
from lmx.nn.moe import Moe, MoeConfig
from lmx.nn.norm import Norm, NormConfig

__all__ = [
    "KEPT",
    "PRODUCT",
    "Attention",
    "AttentionConfig",
    "Block",
    "BlockConfig",
    "Context",
    "Inputs",
    "Linear",
    "Local",
    "Mlp",
    "MlpConfig",
    "Moe",
    "MoeConfig",
    "Norm",
    "NormConfig",
    "weight",
]
