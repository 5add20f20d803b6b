"""Ways to fine-tune side by side: trained and judged once, and told on one page."""

import shutil
from dataclasses import replace

import jax
import pytest

from lmx import tree, tune
from lmx.data import Bpe
from lmx.evals import score
from lmx.losses import Counted, NextToken
from lmx.models import TransformerConfig, build, pretrained
from lmx.nn import AttentionConfig
from lmx.report.runs import read_metrics
from lmx.run import trained
from lmx.tasks import Choices, Number, Records, Shots, Task, Template
from lmx.train import session
from lmx.train.checkpoint import best_step

WORDS = {"0": ("बुरी", "उबाऊ", "फीकी"), "1": ("अच्छी", "कमाल", "सुंदर")}
ROWS = [{"text": f"{WORDS[str(i % 2)][i // 2 % 3]} {i}", "label": i % 2} for i in range(60)]
TASK = Task(
    "समीक्षा",
    test=Records(ROWS[:12]),
    train=Records(ROWS[12:]),
    template=Template("{text}:", " {label}"),
    answer=Choices({"0": "ना", "1": "हाँ"}),
)
TEXT = ("फ़िल्म लंबी थी और अच्छी भी", "कमाल की कहानी है")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "small"
    tokenizer = Bpe(300).train([row["text"] for row in ROWS] * 3 + ["ना हाँ"] * 20)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, attention=AttentionConfig(2), init_std=0.2
    )
    pretrained.save(folder, config, build(config).init(jax.random.key(0)), context=128)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def run(released):
    return tune.tuning(released, TASK, epochs=24, seq_len=64, batch_size=8, valid_share=0.2)


def test_ways_differ_in_what_learns_alone(run):
    ways = {
        "full": tune.full(run),
        "lora": tune.lora(run, 4),
        "qlora": tune.qlora(run, 4),
        "head": tune.head(run),
    }
    counts, shapes = {}, {}
    for name, way in ways.items():
        state = session(way).program.shapes
        counts[name], shapes[name] = tree.count(state.trainable), tree.nbytes(state.params)
    config = run.model
    D, F, N = config.d_model, config.mlp.width(config.d_model), 32
    assert counts["full"] == tree.count(jax.eval_shape(build(config).init, jax.random.key(0)))
    assert counts["lora"] == counts["qlora"] == 2 * 4 * (4 * (D + N) + 3 * (D + F))
    assert counts["head"] == 2 * D
    assert shapes["qlora"] < shapes["full"] < shapes["lora"]


def test_side_by_side(run, tmp_path, monkeypatch):
    ways = {"full": tune.full(run, lr=3e-3), "head": tune.head(run)}
    found = tune.compare(ways, TASK, tmp_path / "out", text=TEXT, shots={"2 shots": Shots(2)})
    assert [x.name for x in found] == ["0 shots", "2 shots", "full", "head"]
    by_name = {x.name: x for x in found}
    assert by_name["full"].metrics["accuracy"].value > by_name["0 shots"].metrics["accuracy"].value
    again = score(trained(tmp_path / "out" / "full", step="best"), TASK).metrics
    assert by_name["full"].metrics["accuracy"] == again["accuracy"]
    # A head changes no word; what is trained in full forgets.
    assert by_name["head"].general == by_name["0 shots"].general != by_name["full"].general
    assert by_name["2 shots"].general is None and by_name["full"].trained > 100 * by_name["head"].trained
    assert by_name["full"].bytes["optimizer"] > 2 * by_name["full"].bytes["gradients"] > 0
    assert by_name["full"].seconds > 0 and len(by_name["full"].valid) >= 3
    text = tune.table(found).text()
    assert "bits per byte of other text" in text and "2 shots" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "full, held out" in page and "समीक्षा" in page

    monkeypatch.setattr(tune, "train", None)  # what is there is not made again
    monkeypatch.setattr(tune.evals, "score", None)
    assert tune.compare(ways, TASK, tmp_path / "out", text=TEXT, shots={"2 shots": Shots(2)}) == found
    with pytest.raises(ValueError, match="holds another run"):
        tune.compare({"head": tune.head(run, lr=1.0)}, TASK, tmp_path / "out", text=TEXT)


def test_the_best_step_by_a_score_of_held_out_examples(released, tmp_path):
    """Chosen by accuracy, with noise and smoothing; each score is that of the held-out questions, asked anew."""
    run = tune.tuning(
        released, TASK, epochs=24, seq_len=64, valid_share=0.2, best="accuracy", noise=1.0, smoothing=0.1
    )
    assert run.best == "-valid/accuracy" and run.model.embed_noise == 1.0
    assert run.objective["ce"].loss == Counted(NextToken(0.1))
    ways = {"full": tune.full(run, lr=3e-3)}
    tune.compare(ways, TASK, tmp_path / "out")
    kept = trained(tmp_path / "out" / "full", step="best")
    held = {x["id"] for x in run.data.documents("valid")}
    asked = [row for row, x in zip(ROWS[12:], TASK.examples("train")) if x.where in held]
    right = score(kept, replace(TASK, test=Records(asked))).metrics["accuracy"].value
    scores = dict(read_metrics(tmp_path / "out" / "full")["valid/accuracy"])
    best = best_step(tmp_path / "out" / "full" / "checkpoints")
    assert 0 < len(asked) < 20 and scores[best] == max(scores.values()) == right
    assert best == min(step for step, x in scores.items() if x == right)


def test_a_metric_that_the_task_has_not_is_told(released):
    with pytest.raises(ValueError, match=r"metric='bleu': समीक्षा is judged by accuracy"):
        tune.tuning(released, TASK, valid_share=0.2, best="bleu")


def test_another_model_under_the_same_name_is_noticed(released, tmp_path):
    model = shutil.copytree(released, tmp_path / "model")
    run = tune.tuning(model, TASK, epochs=4, seq_len=64, batch_size=8, valid_share=0.2)
    tune.compare({"full": tune.full(run)}, TASK, tmp_path / "out")
    config = pretrained.find(model).config
    pretrained.save(model, config, build(config).init(jax.random.key(1)), context=128)
    with pytest.raises(ValueError, match=r"is not what .*full.* was trained on"):
        tune.compare({"full": tune.full(run)}, TASK, tmp_path / "out")


def test_a_metric_of_nothing_leaves_its_plot_out(released, tmp_path):
    rows = Records([{"text": f"फ़िल्म {i}", "score": i % 3} for i in range(60)])
    task = Task("अंक", test=rows, train=rows, template=Template("{text}:", " {score}"), answer=Number(0, 2))
    run = tune.tuning(released, task, epochs=2, seq_len=64, batch_size=8, valid_share=0.2)
    with pytest.warns(UserWarning, match="60 of 60 test questions"):
        found = tune.compare({"full": tune.full(run, lr=1e-6)}, task, tmp_path / "out", limit=3)
    assert all(x.metrics["answered"].value == 0 for x in found)
    assert "nothing that was written could be read" in (tmp_path / "out" / "report.html").read_text()


def test_where_one_way_passes_another():
    def tuned(*losses):
        return tune.Tuned("x", {}, None, 0, {}, 0.0, list(enumerate(losses, 1)), [])

    assert tune.passing(tuned(3, 1, 2, 4), tuned(3, 2, 2, 2)) == 4
    assert tune.passing(tuned(3, 3, 3), tuned(2, 2, 2)) is None
    assert tune.passing(tuned(1, 1), tuned(2, 2)) is None


def test_too_little_to_train_on_is_told(released):
    with pytest.raises(ValueError, match=r"epochs=0.001 is less than one step of 8 rows"):
        tune.tuning(released, TASK, epochs=0.001, seq_len=64, batch_size=8, valid_share=0.2)


def test_paragraphs_leave_headings_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("= शीर्षक =\n" + "\n".join(["क" * 300] * 5))
    assert tune.paragraphs(path, 700) == ("क" * 300,) * 3
