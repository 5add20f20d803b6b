"""How good a model is, and how near to another."""

from lmx.evals.agreement import Agreement, agreement
from lmx.evals.harness import harness
from lmx.evals.likelihood import Likelihoods, log_likelihoods
from lmx.evals.nearest import Nearest, embed
from lmx.evals.perplexity import Difference, Perplexity, compare, perplexity, summarize
from lmx.evals.prompting import Found, Sensitivity, search, sensitivity
from lmx.evals.tasks import TaskResult, score

__all__ = [
    "Agreement",
    "Difference",
    "Found",
    "Likelihoods",
    "Nearest",
    "Perplexity",
    "Sensitivity",
    "TaskResult",
    "agreement",
    "compare",
    "embed",
    "harness",
    "log_likelihoods",
    "perplexity",
    "score",
    "search",
    "sensitivity",
    "summarize",
]
