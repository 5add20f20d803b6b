"""Losses as values: a per-token loss, a wrapper that is a loss again, and terms that make an objective."""

from lmx.losses.base import Loss
from lmx.losses.chunked import Chunked, Counted
from lmx.losses.next_token import NextToken, ZLoss
from lmx.losses.objective import Term, counts, total
from lmx.losses.routers import LoadBalance, RouterZLoss

__all__ = [
    "Chunked",
    "Counted",
    "LoadBalance",
    "Loss",
    "NextToken",
    "RouterZLoss",
    "Term",
    "ZLoss",
    "counts",
    "total",
]
