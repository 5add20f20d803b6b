"""How good a model is."""

from lmx.evals.perplexity import Difference, Perplexity, compare, perplexity, summarize

__all__ = ["Difference", "Perplexity", "compare", "perplexity", "summarize"]
