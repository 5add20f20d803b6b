"""Losses as values: a per-token loss, a wrapper that is a loss again, and terms that make an objective."""

from lmx.losses.base import Loss
from lmx.losses.chunked import Chunked, Counted
from lmx.losses.distill import Divergence, ForwardKL, Jsd, ReverseKL, TotalVariation, Uld
from lmx.losses.dpo import Dpo, Ipo, Margin, Preferred
from lmx.losses.match import MatchHidden, MatchRelations
from lmx.losses.next_token import NextToken, ZLoss, log_p
from lmx.losses.objective import Term, counts, reads, total
from lmx.losses.routers import LoadBalance, RouterZLoss
from lmx.losses.score import SoftLabels, SoftLogits

__all__ = [
    "Chunked",
    "Counted",
    "Divergence",
    "Dpo",
    "ForwardKL",
    "Ipo",
    "Jsd",
    "LoadBalance",
    "Loss",
    "Margin",
    "MatchHidden",
    "MatchRelations",
    "NextToken",
    "Preferred",
    "ReverseKL",
    "RouterZLoss",
    "SoftLabels",
    "SoftLogits",
    "Term",
    "TotalVariation",
    "Uld",
    "ZLoss",
    "counts",
    "log_p",
    "reads",
    "total",
]
