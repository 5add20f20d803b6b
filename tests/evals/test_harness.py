"""lm-evaluation-harness: its tasks give our models the figures that they give transformers' with the same weights."""

import json

import numpy as np
import pytest

from lmx.data import Bpe
from lmx.evals.harness import sampling_of
from lmx.generate import Sampling

CHOICE = {
    "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{text}}\nभाव:", "doc_to_target": "label",
    "doc_to_choice": ["बुरी", "अच्छी", "बहुत अच्छी"], "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "num_fewshot": 1, "fewshot_split": "test",
}  # fmt: skip
WRITTEN = {
    "task": "written", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{text}}",
    "generation_kwargs": {"until": ["ी", "zz"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
READ = {
    "task": "read", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}  # fmt: skip
TEXTS = ["फ़िल्म अच्छी है", "film was bad, and long " * 9, "कहानी", "a b c d e f g"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of transformers with a tokenizer of ours, and three tasks on local rows."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    made = tmp_path_factory.mktemp("tiny")
    tokenizer = Bpe(vocab_size=300).train(TEXTS * 9)
    tokenizer.save(made / "ours.json")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(made / "ours.json"), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content | trim }}<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
    )
    fast.save_pretrained(made)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (made / "tasks").mkdir()
    for task in (CHOICE, WRITTEN, READ):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(made / "rows.jsonl")}}}
        text = json.dumps({**task, **data, "test_split": "test"}, ensure_ascii=False)
        (made / "tasks" / f"{task['task']}.yaml").write_text(text, encoding="utf-8")
    return made


@pytest.mark.peers
def test_tasks_of_the_harness_give_the_figures_of_its_own_model(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lmx.evals import harness
    from lmx.run import trained

    def evaluated(model):
        manager = TaskManager(include_path=str(folder / "tasks"))
        return lm_eval.simple_evaluate(
            model=model, tasks=["choice", "written", "read"], task_manager=manager, bootstrap_iters=0
        )

    ours = evaluated(harness(trained(folder), batch_tokens=256))
    theirs = evaluated(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2))
    for task, found in theirs["results"].items():
        for name, value in found.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task in theirs["samples"]:
        for mine, yours in zip(ours["samples"][task], theirs["samples"][task]):
            if task == "written":
                assert mine["resps"] == yours["resps"]
            else:
                a, b = (np.asarray(x["resps"], np.float64) for x in (mine, yours))
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert any(resp for x in ours["samples"]["written"] for (resp,) in x["resps"])


@pytest.mark.peers
def test_conversations_are_put_into_words_as_there(folder):
    from lm_eval.models.huggingface import HFLM

    from lmx.evals import harness
    from lmx.run import trained

    ours, theirs = harness(trained(folder)), HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    asked = [{"role": "system", "content": "संक्षेप में"}, {"role": "user", "content": " फ़िल्म? "}]
    begun = [*asked, {"role": "assistant", "content": "वह"}]
    for messages, goes_on in ((asked, True), (begun, False)):
        text = theirs.apply_chat_template(messages, add_generation_prompt=goes_on)
        assert ours.apply_chat_template(messages, add_generation_prompt=goes_on) == text
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.tok_encode("कहानी") == theirs.tok_encode("कहानी")
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({}, Sampling(temperature=0.0, max_tokens=256)),
        ({"until": ["\n", ""], "max_gen_toks": 5}, Sampling(temperature=0.0, max_tokens=5, stop=("\n",))),
        (
            {"until": "।", "do_sample": False, "temperature": 0.7, "top_p": 0.9},
            Sampling(temperature=0.0, max_tokens=256, stop=("।",)),
        ),
        ({"do_sample": True, "top_k": 5}, Sampling(temperature=1.0, top_k=5, max_tokens=256)),
        ({"temperature": 0.5, "top_p": 0.9}, Sampling(temperature=0.5, top_p=0.9, max_tokens=256)),
    ],
)
def test_generation_settings_of_tasks_are_ours(settings, meant):
    assert sampling_of(settings) == meant


def test_settings_without_a_counterpart_are_refused():
    with pytest.raises(ValueError, match=r"\{'num_beams': 4\} have no counterpart; there are until, max_gen"):
        sampling_of({"until": ["\n"], "num_beams": 4})
