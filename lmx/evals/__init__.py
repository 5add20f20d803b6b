"""How good a model is, and how near to another."""

from lmx.evals.agreement import Agreement, agreement
from lmx.evals.harness import harness
from lmx.evals.perplexity import Difference, Perplexity, compare, perplexity, summarize
from lmx.evals.tasks import Likelihoods, TaskResult, log_likelihoods, score

__all__ = [
    "Agreement",
    "Difference",
    "Likelihoods",
    "Perplexity",
    "TaskResult",
    "agreement",
    "compare",
    "harness",
    "log_likelihoods",
    "perplexity",
    "score",
    "summarize",
]
