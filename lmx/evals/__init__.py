"""How good a model is, and how near to another."""

from lmx.evals.agreement import Agreement, agreement
from lmx.evals.perplexity import Difference, Perplexity, compare, perplexity, summarize

__all__ = ["Agreement", "Difference", "Perplexity", "agreement", "compare", "perplexity", "summarize"]
