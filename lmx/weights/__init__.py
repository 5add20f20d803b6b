"""Weights: leaves that know how to multiply. A plain array is the simplest of them."""

from lmx.weights.base import Transposed, Weight, dense, leaf, linear, lookup, shape_of, static

__all__ = ["Transposed", "Weight", "dense", "leaf", "linear", "lookup", "shape_of", "static"]
