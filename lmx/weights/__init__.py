"""Weights: leaves that know how to multiply. A plain array is the simplest of them."""

from lmx.weights.base import (
    Transposed,
    Weight,
    axes_of,
    dense,
    is_matrix,
    leaf,
    linear,
    linear_transposed,
    lookup,
    over,
    shape_of,
    static,
)
from lmx.weights.fake import Fake
from lmx.weights.low_rank import Bank, Dora, LowRank, Vera
from lmx.weights.masked import Masked
from lmx.weights.quantized import NF4, Quantized, quantize
from lmx.weights.rotated import Rotated
from lmx.weights.scaled import Scaled

__all__ = [
    "NF4",
    "Bank",
    "Dora",
    "Fake",
    "LowRank",
    "Masked",
    "Quantized",
    "Rotated",
    "Scaled",
    "Transposed",
    "Vera",
    "Weight",
    "axes_of",
    "dense",
    "is_matrix",
    "leaf",
    "linear",
    "linear_transposed",
    "lookup",
    "over",
    "quantize",
    "shape_of",
    "static",
]
