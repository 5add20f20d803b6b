"""How good a model is, and how near to another."""

from lmx.evals.agreement import Agreement, agreement
from lmx.evals.perplexity import Difference, Perplexity, compare, perplexity, summarize
from lmx.evals.tasks import TaskResult, log_likelihoods, score

__all__ = [
    "Agreement",
    "Difference",
    "Perplexity",
    "TaskResult",
    "agreement",
    "compare",
    "log_likelihoods",
    "perplexity",
    "score",
    "summarize",
]
