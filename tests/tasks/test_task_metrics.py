"""Metrics against formulas written out, against the libraries' public functions, and in Hindi."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lmx.tasks import (
    F1,
    Accuracy,
    Bleu,
    Calibration,
    Chrf,
    Error,
    ExactMatch,
    Expected,
    Lengths,
    Outcome,
    Rouge,
    average,
    difference,
    measure,
)

HINDI = [
    ("नदी पहाड़ से बहती है।", ("नदी पहाड़ों से बहती है।", "पहाड़ से नदी बहती है।")),
    ("मैं कल घर जाऊँगा", ("मैं कल घर जाऊँगा।",)),
    ("", ("खाली नहीं है।",)),
    ("बच्चे स्कूल में पढ़ते हैं।", ("बच्चे विद्यालय में पढ़ रहे हैं।", "बच्चे स्कूल में पढ़ते हैं।")),
]
ENGLISH = [
    ("The cat sat on the mat .", ("The cat is sitting on the mat.", "A cat sat on the mat.")),
    ("It's raining, isn't it?", ("It is raining, isn't it?",)),
    ("dogs bark", ("Dogs bark loudly at night.", "dogs bark")),
]


def texts(pairs):
    return [Outcome(f"row {i}", references, said) for i, (said, references) in enumerate(pairs)]


def labelled(n=200, seed=0, sure=0.7, labels=("a", "b", "c")):
    """Outcomes right with probability `sure` for "a", less for the others."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        right = labels[rng.integers(len(labels))]
        p = rng.dirichlet(np.ones(len(labels)))
        said = labels[int(p.argmax())] if rng.random() > sure else right
        top = sorted(p)
        p = dict(zip([*(x for x in labels if x != said), said], top))
        found.append(Outcome(f"row {i}", (right,), said, {k: float(v) for k, v in p.items()}))
    return found


def test_accuracy_and_f1_by_a_confusion_matrix():
    outcomes = labelled()
    labels = ("a", "b", "c")
    matrix = np.zeros((3, 3))
    for x in outcomes:
        matrix[labels.index(x.references[0]), labels.index(x.prediction)] += 1
    precision, recall = np.diag(matrix) / matrix.sum(0), np.diag(matrix) / matrix.sum(1)
    f1 = 2 * precision * recall / (precision + recall)
    found = {k: v.value for k, v in measure((Accuracy(), F1(labels)), outcomes).items()}
    assert found["accuracy"] == pytest.approx(np.trace(matrix) / 200)
    assert [found[f"f1[{x}]"] for x in labels] == pytest.approx(list(f1))
    assert found["macro_f1"] == pytest.approx(f1.mean())


def test_a_label_that_never_occurs_has_no_f1_and_no_part_in_the_mean():
    outcomes = [Outcome("1", ("a",), "a"), Outcome("2", ("b",), "a")]
    found = {k: v.value for k, v in measure((F1(("a", "b", "c")),), outcomes).items()}
    assert found["f1[a]"] == pytest.approx(2 / 3) and found["f1[b]"] == 0 and np.isnan(found["f1[c]"])
    assert found["macro_f1"] == pytest.approx(1 / 3)


def test_calibration_error_by_its_bins_and_in_closed_form():
    outcomes = labelled(300, seed=1)
    sure = np.array([x.probabilities[x.prediction] for x in outcomes])
    right = np.array([x.prediction in x.references for x in outcomes], float)
    by_hand = 0.0
    for low in np.arange(15) / 15:
        inside = (sure >= low) & (sure < low + 1 / 15)
        if inside.any():
            by_hand += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert measure((Calibration(),), outcomes)["calibration_error"].value == pytest.approx(by_hand)
    certain = [Outcome(str(i), ("a",), "a" if i < 3 else "b", {"a": 1.0, "b": 1.0}) for i in range(4)]
    assert measure((Calibration(),), certain)["calibration_error"].value == pytest.approx(0.25)


@pytest.mark.parametrize("pairs", [HINDI, ENGLISH], ids=["hi", "en"])
@pytest.mark.parametrize("metric", [Bleu(), Bleu("intl"), Chrf(), Chrf(0)], ids=str)
def test_bleu_and_chrf_are_sacrebleus_own_with_several_references(pairs, metric):
    sacrebleu = pytest.importorskip("sacrebleu")
    if isinstance(metric, Bleu):
        theirs = sacrebleu.BLEU(tokenize=metric.tokenize)
    else:
        theirs = sacrebleu.CHRF(word_order=metric.word_order)
    most = max(len(r) for _, r in pairs)
    streams = [[r[i] if i < len(r) else None for _, r in pairs] for i in range(most)]
    want = theirs.corpus_score([p for p, _ in pairs], streams).score
    outcomes = texts(pairs)
    (found,) = measure((metric,), outcomes, resamples=200).values()
    assert found.value == pytest.approx(want, abs=1e-9) and 0 < want < 100
    assert found.low <= found.value <= found.high
    assert metric.signature(outcomes) == str(theirs.get_signature())
    assert "version:" in metric.signature(outcomes)


def test_the_danda_is_parted_from_its_word_by_intl_alone():
    pytest.importorskip("sacrebleu")
    pairs = texts([("एक दो तीन चार पाँच।", ("एक दो तीन चार पाँच",))])
    found = {t: measure((Bleu(t),), pairs)["bleu"].value for t in ("13a", "intl")}
    # 13a: 4/5, 3/4, 2/3, 1/2; intl: 5/6, 4/5, 3/4, 2/3 of the n-grams are right; never shorter than the reference
    assert found["13a"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert found["intl"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_bootstrap_of_bleu_agrees_with_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = np.random.default_rng(0)
    words = "नदी पहाड़ घर पेड़ फूल रास्ता सूरज चाँद".split()
    pairs = []
    for _ in range(150):
        right = [words[i] for i in rng.integers(len(words), size=8)]
        pairs.append((" ".join(w if rng.random() < 0.8 else "कुछ" for w in right), (" ".join(right),)))
    theirs = sacrebleu.BLEU().corpus_score(
        [p for p, _ in pairs], [[r[0] for _, r in pairs]], n_bootstrap=1000
    )
    ours = measure((Bleu(),), texts(pairs))["bleu"]
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.15)


def test_rouge_counts_devanagari_which_the_librarys_own_words_lose():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    said, right = "नदी पहाड़ से नीचे बहती है", "पहाड़ से नदी बहती है"
    assert scorer.score(right, said)["rouge1"].fmeasure == 0
    found = {k: v.value for k, v in measure((Rouge(),), texts([(said, (right,))])).items()}
    # 5 of 6 and of 5 words; पहाड़ से, बहती है of 5 and 4 pairs; पहाड़ से बहती है in order
    assert found["rouge1"] == pytest.approx(2 * 5 / 11)
    assert found["rouge2"] == pytest.approx(2 * 2 / 9)
    assert found["rougeL"] == pytest.approx(2 * 4 / 11)


def test_rouge_in_english_is_the_librarys_own_and_the_best_of_several():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = {k: v.value for k, v in measure((Rouge(),), texts(ENGLISH)).items()}
    for kind, value in found.items():
        want = [max(scorer.score(r, said)[kind].fmeasure for r in several) for said, several in ENGLISH]
        assert value == pytest.approx(np.mean(want)), kind


def test_exact_match_lengths_and_errors():
    found = measure((ExactMatch(), Lengths()), texts([("\u0958लम  है", ("क़लम है",)), ("a b c", ("d", "e f"))]))
    values = {k: v.value for k, v in found.items()}
    assert values["exact_match"] == 0.5
    # क़लम and है are two words; the answers have 2 + 3 words for 2 + 1 right ones
    assert values["words"] == 2.5 and values["length_ratio"] == pytest.approx(5 / 3)
    assert values["characters"] == (len(["क़", "ल", "म", " ", " ", "है"]) + 5) / 2
    numbers = [Outcome("1", ("3",), "5"), Outcome("2", ("1",), "0.5"), Outcome("3", ("4",), None)]
    values = {k: v.value for k, v in measure((Error(),), numbers).items()}
    assert values == {"mean_error": pytest.approx(1.25), "answered": pytest.approx(2 / 3)}


def test_an_interval_is_that_of_the_binomial():
    outcomes = [Outcome(str(i), ("a",), "a" if i % 5 else "b") for i in range(1000)]
    found = measure((Accuracy(),), outcomes)["accuracy"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert found.value == 0.8 and found.n == 1000
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_pairs_show_what_separate_intervals_hide():
    a, b = labelled(400, seed=3), labelled(400, seed=3)
    b = [x if i % 25 else Outcome(x.where, x.references, "none", {"none": 1.0}) for i, x in enumerate(b)]
    alone = [measure((Accuracy(),), x)["accuracy"] for x in (a, b)]
    assert alone[0].low < alone[1].high
    both = difference((Accuracy(),), a, b)["accuracy"]
    assert both.value == pytest.approx(alone[0].value - alone[1].value) and both.low > 0
    same = difference((Accuracy(), F1(("a", "b", "c"))), a, a)
    assert all((x.value, x.low, x.high) == (0, 0, 0) for x in same.values())
    with pytest.raises(ValueError, match="400 outcomes and 399 are not of the same examples"):
        difference((Accuracy(),), a, b[:-1])


def test_one_example_has_no_interval_and_none_is_an_error():
    assert np.isnan(measure((Accuracy(),), [Outcome("1", ("a",), "a")])["accuracy"].low)
    with pytest.raises(ValueError, match="no outcomes"):
        measure((Accuracy(),), [])


def test_a_mean_over_systems_has_the_interval_of_its_examples():
    rng = np.random.default_rng(4)
    right = rng.random((3, 50)) < 0.6  # [systems, examples]
    systems = [[Outcome(f"{i}", ("हाँ",), "हाँ" if x else "ना") for i, x in enumerate(row)] for row in right]
    found = average((Accuracy(),), systems, resamples=300, seed=7)["accuracy"]
    draws = np.random.default_rng(7).integers(0, 50, (300, 50))
    low, high = np.quantile(right.mean(0)[draws].mean(1), [0.025, 0.975])
    assert (found.value, found.low, found.high) == pytest.approx((right.mean(), low, high))
    with pytest.raises(ValueError, match="average: 50 outcomes and 49 are not of the same"):
        average((Accuracy(),), [systems[0], systems[1][1:]])


def test_labels_that_are_numbers_make_a_score():
    rng = np.random.default_rng(0)
    outcomes = []
    for i in range(40):
        p = rng.dirichlet(np.ones(5))
        outcomes.append(
            Outcome(str(i), (str(rng.integers(1, 6)),), "1", {str(k + 1): p[k] for k in range(5)})
        )
    mean = np.array([sum(float(k) * p for k, p in x.probabilities.items()) for x in outcomes])
    right = np.array([float(x.references[0]) for x in outcomes])
    found = measure((Expected(),), outcomes, resamples=50)
    assert found["expected_error"].value == pytest.approx(np.abs(mean - right).mean())
    assert found["correlation"].value == pytest.approx(np.corrcoef(mean, right)[0, 1])
    same = [replace(x, references=("3",)) for x in outcomes]
    assert math.isnan(Expected().values(Expected().rows(same).sum(0))["correlation"])
