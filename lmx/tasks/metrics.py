"""How good answers are: every metric is a function of sums over examples, so one bootstrap serves them all.

    sums = metric.rows(outcomes).sum(0)      [n, k] -> [k]: correct answers, a confusion matrix, n-gram counts ...
    metric.values(sums)                      {"accuracy": 0.91}

An interval resamples examples and so rows (Efron & Tibshirani 1993). Two systems are compared on the same draws of the
same examples, which removes what makes an example hard. BLEU and chrF++ are sacrebleu's, ROUGE rouge-score's: they need
lmx[tasks].
"""

from __future__ import annotations

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

import numpy as np

from lmx.report.stats import Interval, drawn_interval, resampled_counts, resampled_sums
from lmx.text.graphemes import clusters
from lmx.text.scripts import words


@dataclass(frozen=True)
class Outcome:
    """What came of one example. where: its place. references: what is right. prediction: a label, text or number, None
    if none could be read. probabilities: of each label, where the answer is a choice; where answers were voted on, the
    share of votes of each."""

    where: str
    references: tuple[str, ...]
    prediction: str | None
    probabilities: Mapping[str, float] = field(default_factory=dict)


Outcomes = Sequence[Outcome]


class Metric(ABC):
    """Base of all metrics. by_rank: those that no sums decide; their `values` take the examples themselves, [n, 1 + k]:
    how often each counts, then its numbers."""

    by_rank: ClassVar[bool] = False

    @abstractmethod
    def rows(self, outcomes: Outcomes) -> np.ndarray:
        """Numbers of each example [n, k], float64, whose sums decide the values."""

    @abstractmethod
    def values(self, sums: np.ndarray) -> dict[str, float]:
        """The values by name, from sums [k]; NaN where there is nothing to judge."""

    def signature(self, outcomes: Outcomes) -> str:
        """What tells another program to compute the same; "" where the name says it."""
        return ""


def measure(
    metrics: Sequence[Metric], outcomes: Outcomes, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Every value of the metrics with its 95 % interval over examples. Raises: ValueError without outcomes."""
    if not outcomes:
        raise ValueError("measure: there are no outcomes")
    return _intervals(metrics, (outcomes,), lambda values: values[0], resamples, seed)


def average(
    metrics: Sequence[Metric], systems: Sequence[Outcomes], resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """The mean over systems of every value, with its 95 % interval over the examples: each resample draws the same
    for all.

    Raises: ValueError if they are not outcomes of the same examples in the same order.
    """
    _check_same("average", systems)
    return _intervals(metrics, systems, lambda values: float(np.mean(values)), resamples, seed)


def difference(
    metrics: Sequence[Metric], a: Outcomes, b: Outcomes, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """a - b of every value, paired: each resample draws the same examples for both.

    Raises: ValueError if they are not outcomes of the same examples in the same order.
    """
    _check_same("difference", (a, b))
    return _intervals(metrics, (a, b), lambda values: values[0] - values[1], resamples, seed)


def average_difference(
    metrics: Sequence[Metric],
    a: Sequence[Outcomes],
    b: Sequence[Outcomes],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """The mean over the systems a, such as seeds of one way, minus that over b, paired: each resample draws the same
    examples for all.

    Raises: ValueError if they are not outcomes of the same examples in the same order.
    """
    _check_same("average_difference", (*a, *b))

    def gap(values):
        return float(np.mean(values[: len(a)]) - np.mean(values[len(a) :]))

    return _intervals(metrics, (*a, *b), gap, resamples, seed)


def _check_same(where: str, systems: Sequence[Outcomes]) -> None:
    first = [(x.where, x.references) for x in systems[0]]
    for other in systems:
        if [(x.where, x.references) for x in other] != first or not first:
            raise ValueError(
                f"{where}: {len(first)} outcomes and {len(other)} are not of the same examples in the same order; "
                "judge all systems on the same task with the same limit and seed"
            )


def _intervals(metrics, systems, combined, resamples, seed):
    """combined: the values of all systems -> one."""
    found = {}
    n = len(systems[0])
    for metric in metrics:
        several = [metric.rows(outcomes) for outcomes in systems]
        if metric.by_rank:
            drawn = chain([np.ones(n)], *resampled_counts(n, resamples, seed))
            each = [[metric.values(np.column_stack([c, rows])) for rows in several] for c in drawn]
        else:
            rows = np.concatenate(several, 1)
            all_sums = np.concatenate([rows.sum(0)[None], resampled_sums(rows, resamples, seed)])
            each = [[metric.values(part) for part in np.split(sums, len(systems))] for sums in all_sums]
        for name in each[0][0]:
            values = [combined([v[name] for v in several]) for several in each]
            found[name] = drawn_interval(values[0], np.array(values[1:]), n)
    return found


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of right labels."""

    def rows(self, outcomes):
        return np.array([[x.prediction in x.references, 1] for x in outcomes], np.float64)

    def values(self, sums):
        return {"accuracy": _over(sums[0], sums[1])}


@dataclass(frozen=True)
class F1(Metric):
    """F1 = 2 tp / (2 tp + fp + fn) of each label, and their plain mean over those labels that occur."""

    labels: tuple[str, ...]

    def rows(self, outcomes):
        rows = np.zeros((len(outcomes), 3, len(self.labels)))
        for row, x in zip(rows, outcomes):
            for i, label in enumerate(self.labels):
                said, right = x.prediction == label, label in x.references
                row[:, i] = said and right, said and not right, right and not said
        return rows.reshape(len(outcomes), -1)

    def values(self, sums):
        tp, fp, fn = sums.reshape(3, -1)
        each = [_over(2 * a, 2 * a + b + c) for a, b, c in zip(tp, fp, fn)]
        known = [x for x in each if not math.isnan(x)]
        mean = sum(known) / len(known) if known else math.nan
        return {"macro_f1": mean, **{f"f1[{label}]": x for label, x in zip(self.labels, each)}}


@dataclass(frozen=True)
class Calibration(Metric):
    """Expected calibration error: how far the probability of the chosen label lies from the share of right ones.

        sum over bins b of n_b / n |right_b / n_b - confidence_b / n_b|, equal bins of [0, 1]

    A resample adds noise of its own to every bin, so that intervals lean upwards.
    Source: Guo et al. 2017, arXiv:1706.04599, section 2.
    """

    bins: int = 15

    def rows(self, outcomes):
        rows = np.zeros((len(outcomes), 3, self.bins))
        for row, x in zip(rows, outcomes):
            sure = x.probabilities[x.prediction]
            row[:, min(int(sure * self.bins), self.bins - 1)] = 1, sure, x.prediction in x.references
        return rows.reshape(len(outcomes), -1)

    def values(self, sums):
        n, sure, right = sums.reshape(3, -1)
        return {"calibration_error": _over(np.abs(right - sure).sum(), n.sum())}


@dataclass(frozen=True)
class ExactMatch(Metric):
    """The share of texts that equal a reference, but for spaces and Unicode form (NFC)."""

    def rows(self, outcomes):
        return np.array([[plain(x.prediction) in map(plain, x.references), 1] for x in outcomes], np.float64)

    def values(self, sums):
        return {"exact_match": _over(sums[0], sums[1])}


@dataclass(frozen=True)
class Error(Metric):
    """The mean distance of numbers from the right ones, over those that could be read, and the share of these."""

    def rows(self, outcomes):
        read = [x.prediction is not None for x in outcomes]
        far = [abs(float(x.prediction) - float(x.references[0])) if r else 0 for x, r in zip(outcomes, read)]
        return np.array([far, read, np.ones(len(read))], np.float64).T

    def values(self, sums):
        return {"mean_error": _over(sums[0], sums[1]), "answered": _over(sums[1], sums[2])}


@dataclass(frozen=True)
class Expected(Metric):
    """Of labels that are numbers their mean by probability, as a score: how far it lies from the right one on average,
    and Pearson's correlation with it; NaN where either does not vary."""

    def rows(self, outcomes):
        pairs = [
            (sum(p * float(label) for label, p in x.probabilities.items()), float(x.references[0]))
            for x in outcomes
        ]
        return np.array([[abs(a - b), 1, a, b, a * a, b * b, a * b] for a, b in pairs], np.float64)

    def values(self, sums):
        far, n, a, b, aa, bb, ab = sums
        spread = max(0.0, (aa - _over(a * a, n)) * (bb - _over(b * b, n)))
        together = ab - _over(a * b, n)
        return {"expected_error": _over(far, n), "correlation": _over(together, math.sqrt(spread))}


@dataclass(frozen=True)
class Ranking(Metric):
    """How well scores put in order: AUROC, the chance that of two examples the one above the threshold has the higher
    score, ties half; average precision, sum of precision * rise in recall from the highest score down; Spearman's
    correlation with the right scores, of mid-ranks. NaN where all are on one side, or do not vary.

    Source: Fawcett 2006, Pattern Recognition Letters 27, section 7; average precision as scikit-learn has it, without
    interpolation.
    """

    threshold: float = 0.5
    by_rank: ClassVar[bool] = True

    def rows(self, outcomes):
        return np.array([[_said(x), float(x.references[0])] for x in outcomes], np.float64)

    def values(self, sums):
        count, said, right = sums.T
        positive = right > self.threshold
        said_at, right_at = (np.unique(x, return_inverse=True)[1] for x in (said, right))
        yes, no = (np.bincount(said_at, count * x) for x in (positive, ~positive))
        above = no.sum() - np.cumsum(no)
        auroc = 1 - _over((yes * (above + no / 2)).sum(), yes.sum() * no.sum())
        tp, fp = np.cumsum(yes[::-1]), np.cumsum(no[::-1])
        found = tp + fp > 0
        precision = tp[found] / (tp + fp)[found]
        ranks = [_mid_ranks(at, count) for at in (said_at, right_at)]
        a, b = (x - np.average(x, weights=count) for x in ranks)
        spread = math.sqrt((count * a * a).sum() * (count * b * b).sum())
        return {
            "auroc": auroc,
            "average_precision": _over((precision * yes[::-1][found]).sum(), yes.sum()),
            "spearman": _over((count * a * b).sum(), spread),
        }


@dataclass(frozen=True)
class ScoreError(Metric):
    """How far scores lie from the right ones: the mean square (Brier's), and by the expected calibration error, where
    those of a bin are averaged before they are compared.

    Source: Brier 1950, Monthly Weather Review 78(1); Guo et al. 2017, arXiv:1706.04599, section 2.
    """

    bins: int = 15

    def rows(self, outcomes):
        rows = np.zeros((len(outcomes), self.bins + 2))
        for row, x in zip(rows, outcomes):
            said, right = _said(x), float(x.references[0])
            row[min(int(said * self.bins), self.bins - 1)] = said - right
            row[-2:] = (said - right) ** 2, 1
        return rows

    def values(self, sums):
        gaps, (square, n) = sums[: self.bins], sums[-2:]
        return {"brier": _over(square, n), "score_calibration_error": _over(np.abs(gaps).sum(), n)}


@dataclass(frozen=True)
class Lengths(Metric):
    """Words and characters (grapheme clusters) of an answer on average, and its words for each of the first
    reference."""

    def rows(self, outcomes):
        pairs = [(x.prediction or "", x.references[0]) for x in outcomes]
        return np.array([[len(words(p)), len(clusters(p)), len(words(r)), 1] for p, r in pairs], np.float64)

    def values(self, sums):
        n_words, n_chars, right, n = sums
        return {
            "words": _over(n_words, n),
            "characters": _over(n_chars, n),
            "length_ratio": _over(n_words, right),
        }


class _Sacrebleu(Metric):
    """Sums of n-gram counts, which `_extract_corpus_statistics` gives for each example, are all that sacrebleu's own
    bootstrap resamples too."""

    def rows(self, outcomes):
        metric, texts, references = self._metric(), [x.prediction or "" for x in outcomes], _streams(outcomes)
        return np.array(metric._extract_corpus_statistics(texts, references), np.float64)

    def values(self, sums):
        counts = np.rint(sums).astype(np.int64).tolist()
        return {self.name: self._metric()._compute_score_from_stats(counts).score}

    def signature(self, outcomes):
        metric = self._metric()
        metric.corpus_score([""] * len(outcomes), _streams(outcomes))
        return str(metric.get_signature())


@dataclass(frozen=True)
class Bleu(_Sacrebleu):
    """BLEU in [0, 100] (Papineni et al. 2002) by sacrebleu. tokenize: "13a" for European languages; "intl" also parts
    the danda from its word, as Hindi needs."""

    tokenize: str = "13a"
    name = "bleu"

    def _metric(self):
        return _sacrebleu().BLEU(tokenize=self.tokenize, force=True)


@dataclass(frozen=True)
class Chrf(_Sacrebleu):
    """chrF++ in [0, 100]: F2 of 1- to 6-grams of characters and 1- to 2-grams of words (Popović 2017), by sacrebleu."""

    word_order: int = 2

    @property
    def name(self) -> str:
        return "chrf" + "+" * self.word_order

    def _metric(self):
        return _sacrebleu().CHRF(word_order=self.word_order)


@dataclass(frozen=True)
class Rouge(Metric):
    """Mean F1 of shared 1-grams, 2-grams and of the longest common subsequence of words (Lin 2004), by rouge-score;
    the best one of several references.

    Words are those of `lmx.text`, in lower case: rouge-score's own drop every letter that is not ASCII.
    """

    kinds: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")

    def rows(self, outcomes):
        scorer = _rouge(self.kinds)
        found = (scorer.score_multi(x.references, x.prediction or "") for x in outcomes)
        return np.array([[*(scores[kind].fmeasure for kind in self.kinds), 1] for scores in found])

    def values(self, sums):
        return {kind: _over(x, sums[-1]) for kind, x in zip(self.kinds, sums)}


class _Words:
    """What rouge-score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text.lower())


def _rouge(kinds):
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("ROUGE needs rouge-score: pip install 'lmx[tasks]'") from None
    return RougeScorer(list(kinds), tokenizer=_Words())


def _sacrebleu():
    try:
        import sacrebleu
    except ImportError:
        raise ImportError("BLEU and chrF++ need sacrebleu: pip install 'lmx[tasks]'") from None
    return sacrebleu


def _streams(outcomes: Outcomes) -> list[list[str | None]]:
    """The i-th reference of every example, for each i; None where an example has fewer."""
    most = max(len(x.references) for x in outcomes)
    return [[x.references[i] if i < len(x.references) else None for x in outcomes] for i in range(most)]


def plain(text: str | None) -> str | None:
    """A text by which answers are compared: spaces made one, in Unicode form NFC."""
    return None if text is None else unicodedata.normalize("NFC", " ".join(text.split()))


def _said(x: Outcome) -> float:
    """The score that was answered."""
    return float(x.prediction)


def _mid_ranks(at: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean rank of each example among all, by its place among the different values; ties share theirs."""
    sizes = np.bincount(at, count)
    return (np.cumsum(sizes) - sizes / 2)[at]


def _over(a: float, b: float) -> float:
    return float(a / b) if b else math.nan
