"""A run is a value: saved, read back, overridden, shrunk; and what a folder of results holds of it."""

import json
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import artifact, optim, train, tree, values
from lmx.data import Bpe, Data, Documents, Jsonl, Text
from lmx.losses import Chunked, LoadBalance, NextToken, Term, ZLoss
from lmx.mesh import MeshConfig
from lmx.models import PRESETS, TransformerConfig, preset
from lmx.nn import AttentionConfig, MlpConfig, MoeConfig
from lmx.ops.mask import Causal, PrefixLM, SlidingWindow
from lmx.ops.position import ALiBi, Learned, RoPE
from lmx.run import Run, experiment, load, trained
from lmx.train.checkpoint import best_step, steps
from lmx.train.metrics import NAMES
from lmx.train.standard import rate_of
from lmx.train.standard import run as run_standard
from lmx.weights.surgery import Surgery

RUNS = {
    "default": Run(),
    "everything": Run(
        model=TransformerConfig(
            vocab_size=300,
            attention=AttentionConfig(4, 2, mask=SlidingWindow(8) & PrefixLM(2), softcap=30.0),
            mlp=MlpConfig("geglu", d_ff=100),
            position=Learned(64),
            placement="sandwich",
        ),
        data=Data(
            (Text("a/*.txt", unit="line"), "tfds:wiki40b/hi", Jsonl("b.jsonl")),
            tokenizer=Bpe(320),
            weights=(1.0, 2.0, 0.5),
        ),
        optim=optim.Muon(lr=0.02, partner=optim.Lion(schedule=optim.WSD(warmup=10, decay=0.3)), ema=0.99),
        objective={"ce": Term(Chunked(NextToken(0.1), 64), 0.9), "z": Term(ZLoss(), 1e-4)},
        start=(Surgery(),),
        trainable="blocks/*|embed",
        mesh=MeshConfig(2, -1, 2),
    ),
    "experts": Run(
        model=TransformerConfig(mlp=MoeConfig("geglu", 700, n_experts=64, top_k=6, renormalise=False)),
        objective={"ce": Term(Chunked(NextToken())), "balance": Term(LoadBalance(), 0.01)},
    ),
    "हिन्दी": Run(data=Data((Documents(("नमस्ते 'दुनिया'", 'एक "दो"\n')),))),
    **{name: Run(model=preset(name)) for name in PRESETS},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_saved_and_read_back(name, tmp_path):
    RUNS[name].save(tmp_path / "run.txt")
    assert load(tmp_path / "run.txt") == RUNS[name]
    assert values.diff(load(tmp_path / "run.txt"), RUNS[name]) == {}


@pytest.mark.parametrize(
    "change, want",
    [
        ({"optim.lr": "3e-4"}, {"optim.lr": 3e-4}),
        ({"model.position": "ALiBi"}, {"model.position": ALiBi()}),
        (
            {"model.position": "RoPE(theta=1e6)", "model.position.fraction": "0.5"},
            {"model.position": RoPE(1e6, 0.5)},
        ),
        ({"optim": "Lion(b1=0.8)", "optim.lr": "1"}, {"optim": optim.Lion(b1=0.8, lr=1.0)}),
        ({"objective.ce.loss.smoothing": "0.1"}, {"objective": {"ce": Term(NextToken(0.1))}}),
        ({"data.train": "('a.txt', Jsonl('b.jsonl'))"}, {"data.train": ("a.txt", Jsonl("b.jsonl"))}),
        ({"data.tokenizer": "Bpe(512)"}, {"data.tokenizer": Bpe(512)}),
        ({"mesh.fsdp": "4", "mesh.pmap": "false"}, {"mesh": MeshConfig(fsdp=4)}),
        ({"eval_batches": "none"}, {"eval_batches": None}),
        ({"model.attention.mask": "SlidingWindow(4)"}, {"model.attention.mask": SlidingWindow(4)}),
        ({"optim.schedule.warmup": "100"}, {"optim.schedule": optim.Cosine(warmup=100)}),
    ],
    ids=str,
)
def test_settings_are_overridden_by_text(change, want):
    found = Run().override(change)
    for path, value in want.items():
        place = found
        for name in path.split("."):
            place = getattr(place, name)
        assert place == value and type(place) is type(value)
    changed = {path.split(".")[0] for path in values.diff(found, Run())}
    assert changed <= {path.split(".")[0] for path in change}


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Run(steps=0), "Run: steps=0 must be at least 1"),
        (lambda: Run(n_micro=-1), "n_micro=-1"),
        (lambda: Run(steps=2**31), "steps=2147483648 is beyond"),
        (lambda: Run(objective={}), "objective has no term; use {'ce': Term"),
        *(
            (
                lambda name=name: Run(objective={name: Term(NextToken())}),
                f"objective term '{name}' would write",
            )
            for name in (*NAMES, "valid/loss")
        ),
        (lambda: Run().override({"objective.ce.weight": "nan"}), r"Term: weight=nan is not in \(-inf, inf\)"),
        (lambda: Run().override({"optim.lrate": "1"}), "no setting 'optim.lrate'; did you mean optim.lr"),
        (lambda: Run().override({"model.position": "Rope()"}), "'Rope\\(\\)' is not one of .*RoPE"),
        (lambda: Run().override({"model.attention.mask": "Causal() & SameSegment()"}), "not a plain value"),
    ],
)
def test_mistakes_are_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_a_joined_mask_is_written_as_its_class():
    mask = Causal() & PrefixLM(3)
    assert Run().override({"model.attention.mask": repr(mask)}).model.attention.mask == mask


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_tiny_one_that_can_be_built(name):
    small = RUNS[name].tiny()
    model = small.model
    assert (model.d_model, small.n_micro, small.mesh, model.dtype) == (64, 1, MeshConfig(), "float32")
    assert (
        small.steps <= 50 and model.n_layers <= 2 and small.data.seq_len <= 64 and small.data.batch_size <= 8
    )
    kept = ("position", "placement", "norm", "tie_head", "logit_softcap")
    assert all(getattr(model, k) == getattr(RUNS[name].model, k) for k in kept)
    assert (model.attention.n_heads > model.attention.kv_heads) == (
        RUNS[name].model.attention.n_heads > RUNS[name].model.attention.kv_heads
    )
    small = train.loop.with_vocab(small, 300) if model.vocab_size is None else small
    made = train.program.program(small, small.mesh.build())
    assert tree.count(made.shapes.params) < 20e6


def test_schedules_that_count_steps_shrink_with_the_run():
    warm = replace(RUNS["everything"], optim=optim.AdamW(schedule=optim.WSD(warmup=100, decay=200)))
    small = warm.tiny()
    lr = [np.asarray(optim.lr_at(r.optim, r.steps, np.arange(r.steps))) for r in (warm, small)]
    peak = [int(x.argmax()) / len(x) for x in lr]
    assert peak == pytest.approx([0.1, 0.1]) and lr[1].max() == pytest.approx(1e-3)
    partner = RUNS["everything"].tiny().optim.partner.schedule
    assert (partner.warmup, partner.decay) == (0.01, 0.3)


def test_the_rates_of_a_run_of_any_length_are_those_of_its_schedule():
    run = Run(steps=2**31 - 1, optim=optim.AdamW(schedule=optim.WSD(warmup=5000, decay=0.5)))
    updates = [0, 4095, 4096, 4095, 5001, run.steps // 4 * 3, run.steps - 1]
    rate = rate_of(run)
    want = optim.lr_at(run.optim, run.steps, np.array(updates))
    np.testing.assert_array_equal(np.float32([rate(update) for update in updates]), want)


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved run here"):
        load(tmp_path / "run.txt")
    for damage in (
        "",
        "Run(",
        "Run(steps=)",
        "Run(steps=1, step=2)",
        "Data()",
        "Run(model=__import__('os'))",
        "\0",
    ):
        (tmp_path / "run.txt").write_text(damage)
        with pytest.raises(ValueError, match=r"run\.txt"):
            load(tmp_path / "run.txt")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_an_experiment_is_a_file(tmp_path):
    file = write(
        tmp_path / "rope_theta.py",
        '"""Does theta matter?"""\n'
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, replace\n"
        "import lmx\n"
        "from lmx.ops.position import RoPE\n\n"
        "@dataclass(frozen=True)\nclass Mine(RoPE):\n    scale: float = 2.0\n\n"
        "def base():\n    return lmx.Run(steps=7)\n\n"
        "def variants():\n"
        "    return {'long': replace(base(), steps=9),\n"
        "            'mine': base().override({'model.position': 'Mine(theta=10)'})}\n",
    )
    found = experiment(file)
    assert (found.name, found.path, found.question) == ("rope_theta", file, "Does theta matter?")
    assert {name: r.steps for name, r in found.runs.items()} == {"base": 7, "long": 9, "mine": 7}
    assert found.variant("long").steps == 9
    assert type(found.variant("mine").model.position).__name__ == "Mine"
    again = experiment(file).variant("mine")
    assert values.parse(values.show(again), Run) == again
    with pytest.raises(ValueError, match=r"no variant 'short'; it has base, long, mine"):
        found.variant("short")


def test_a_file_that_is_no_experiment_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"defines base\(\) -> Run"):
        experiment(write(tmp_path / "empty.py", "x = 1\n"))
    with pytest.raises(FileNotFoundError, match=r"no such experiment; there are empty\.py"):
        experiment(tmp_path / "full.py")
    with pytest.raises(ValueError, match=r"text\.txt: not an experiment; give a Python file"):
        experiment(write(tmp_path / "text.txt", "x"))
    with pytest.raises(FileNotFoundError, match=r"no such experiment$"):
        experiment(tmp_path / "nowhere" / "full.py")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def base(:\n", r"file\.py:1: invalid syntax"),
        ("def base():\n    return 5\n", "'base' is 5, not a Run"),
        (
            "import lmx\nbase = lmx.Run\nvariants = lambda: {'../up': lmx.Run()}\n",
            "'../up' cannot name a folder",
        ),
        ("import lmx\nbase = lmx.Run\nvariants = lambda: {'..': lmx.Run()}\n", "'..' cannot name a folder"),
    ],
)
def test_a_broken_experiment_is_told_with_its_place(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        experiment(write(tmp_path / "file.py", text))


LINES = tuple(f"{i} नदी के पार {i * i} नावें, and {i * 7 % 31} boats" for i in range(120))
SMALL = Run(
    model=TransformerConfig(d_model=32, n_layers=1, attention=AttentionConfig(2)),
    data=Data((Documents(LINES),), seq_len=32, batch_size=8, valid_share=0.1),
    steps=4,
    eval_every=2,
    eval_batches=1,
    save_every=2,
    mesh=MeshConfig(1, 1, 1),
)


def test_a_trained_model_is_read_from_its_folder(tmp_path):
    session = train.session(SMALL, cache=tmp_path / "cache", devices=jax.devices()[:1])
    result = run_standard(session, tmp_path / "out")
    found = trained(tmp_path / "out")
    assert found.run == session.run and found.run.model.vocab_size == session.prepared.tokenizer.vocab_size
    jax.tree.map(np.testing.assert_array_equal, found.params, result.state.params)
    assert found.tokenizer.decode(found.tokenizer.encode(LINES[3])) == LINES[3]
    written = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in written for name in line if not name.startswith("valid/")} <= set(NAMES)
    tokens = jnp.asarray([found.tokenizer.encode(LINES[3])], jnp.int32)
    logits = found.model.apply(found.params, {"tokens": tokens}).logits
    assert logits.shape == (1, tokens.shape[1], found.run.model.vocab_size) and jnp.isfinite(logits).all()
    earlier = trained(tmp_path / "out", step=2)
    assert np.any(earlier.params["embed"] != found.params["embed"])
    with pytest.raises(FileNotFoundError):
        trained(tmp_path / "out", step=3)
    with pytest.raises(FileNotFoundError, match="no saved run here"):
        trained(tmp_path / "elsewhere")


def test_a_folder_that_something_would_be_lost_in_is_refused(tmp_path):
    session = train.session(SMALL, cache=tmp_path / "cache", devices=jax.devices()[:1])
    foreign, early = tmp_path / "foreign", tmp_path / "early"
    foreign.mkdir()
    (foreign / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds tokenizer.json but no run; choose another folder"):
        run_standard(session, foreign)
    early.mkdir()
    replace(session.run, optim=optim.AdamW(lr=0.5)).save(early / "run.txt")
    (early / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"holds another run \(optim.lr: 0.5 there"):
        run_standard(session, early)
    assert (early / "metrics.jsonl").read_text() and (foreign / "tokenizer.json").read_text() == "{}"
    with artifact.alone(foreign / ".lock"), pytest.raises(ValueError, match="in use by process"):
        run_standard(session, foreign)


def test_evaluation_is_the_mean_over_all_tokens_of_whole_documents(tmp_path):
    """valid/loss, its other lengths and that of the averaged parameters, from the texts themselves in float64."""
    averaged = replace(SMALL, eval_batches=None, eval_lengths=(7,), optim=optim.AdamW(lr=0.1, ema=0.5))
    session = train.session(averaged, cache=tmp_path / "cache", devices=jax.devices()[:1])
    for state, _ in session.steps(session.init()):
        pass
    found = session.evaluate(state)
    tokenizer = session.prepared.tokenizer
    texts = [document["text"] for document in session.run.data.documents("valid")]

    forward = jax.jit(lambda params, tokens: session.program.model.apply(params, {"tokens": tokens}).logits)

    def mean(params, length):
        nats = tokens = 0
        for text in texts:
            ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
            for start in range(0, len(ids) - 1, length):
                piece = ids[start : start + length + 1]
                padded = np.zeros((1, 32), np.int32)
                padded[0, : len(piece) - 1] = piece[:-1]
                logits = np.asarray(forward(params, padded), np.float64)[0, : len(piece) - 1]
                log_z = np.log(np.exp(logits).sum(-1))
                nats += (log_z - logits[np.arange(len(piece) - 1), piece[1:]]).sum()
                tokens += len(piece) - 1
        return nats / tokens

    ema = optim.ema_params(state.opt_state)
    assert found["valid/loss"] == pytest.approx(mean(state.params, 32), rel=1e-5)
    assert found["valid/loss@7"] == pytest.approx(mean(state.params, 7), rel=1e-5)
    assert found["valid/ema_loss"] == pytest.approx(mean(ema, 32), rel=1e-5)
    assert len({round(x, 4) for x in found.values()}) == 3


class Unjudged(train.Session):
    """Whose evaluation fails."""

    def evaluate(self, state):
        raise RuntimeError("no memory left")


def test_a_failed_evaluation_costs_no_training(tmp_path):
    made = train.session(SMALL, cache=tmp_path / "cache", devices=jax.devices()[:1])
    session = Unjudged(replace(made.run, eval_every=3, save_every=4), made.prepared, made.devices)
    with pytest.raises(RuntimeError, match="no memory left"):
        run_standard(session, tmp_path / "out")
    assert steps(tmp_path / "out" / "checkpoints") == [3]


class Judged(train.Session):
    """Whose held-out loss is lowest at step 6."""

    def evaluate(self, state):
        return {"valid/loss": {3: 2.0, 6: 1.0, 8: 5.0}[int(state.step)]}


def test_the_best_step_is_kept_although_it_is_no_step_to_save_at(tmp_path):
    made = train.session(SMALL, cache=tmp_path / "cache", devices=jax.devices()[:1])
    settings = replace(made.run, steps=8, eval_every=3, save_every=4, keep=1)
    run_standard(Judged(settings, made.prepared, made.devices), tmp_path / "out")
    assert steps(tmp_path / "out" / "checkpoints") == [6, 8]
    assert best_step(tmp_path / "out" / "checkpoints") == 6


def test_no_row_is_counted_twice_where_few_are_held_out(tmp_path):
    found = []
    for n in (None, 1, 4):
        few = replace(SMALL, data=replace(SMALL.data, batch_size=64), eval_batches=n)
        session = train.session(few, cache=tmp_path / "cache", devices=jax.devices()[:1])
        assert session.prepared.valid.n_rows % 64
        found.append(session.evaluate(session.init())["valid/loss"])
    assert found[0] == found[1] == found[2]


@dataclass(frozen=True)
class Breaks(train.Enrich):
    """Batches whose loss is not a number."""

    def __call__(self, constants, batch, answer):
        return batch | {"loss_mask": batch["loss_mask"] * jnp.float32(jnp.nan)}


def test_a_run_that_is_never_finite_stops_and_leaves_its_last_good_checkpoint(tmp_path):
    sound = train.session(
        replace(SMALL, max_skips=3, steps=9), cache=tmp_path / "cache", devices=jax.devices()[:1]
    )
    bad = train.session(
        replace(sound.run, enrich=Breaks()), cache=tmp_path / "cache", devices=jax.devices()[:1]
    )
    steps = [0]

    def step(state, batch):
        steps[0] += 1
        return (sound if steps[0] <= 4 else bad).program.step(state, batch)

    session = train.session(sound.run, cache=tmp_path / "cache", devices=jax.devices()[:1])
    session.__dict__["program"] = sound.program._replace(step=step)
    told = r"step 7: .*not finite 3 times in a row.*Last good checkpoint: 2\. Lower optim\.lr"
    with pytest.raises(train.standard.Diverged, match=told):
        run_standard(session, tmp_path / "out")
    assert trained(tmp_path / "out", step=4).params["embed"].shape == (sound.run.model.vocab_size, 32)
    latest = trained(tmp_path / "out")
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(latest.params))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained_lines = {line["step"]: line for line in lines if "streak" in line}
    assert [trained_lines[n]["skipped"] for n in range(1, 8)] == [0, 0, 0, 0, 1, 2, 3]
    rates = optim.lr_at(sound.run.optim, 9, np.array([0, 1, 2, 3, 4, 4, 4]))
    np.testing.assert_allclose([trained_lines[n]["lr"] for n in range(1, 8)], rates, rtol=1e-6)
