"""Writes gemma.json: what transformers answers with the GGUF file of Gemma 3 270M.

pip install torch transformers accelerate gguf && python tests/models/make_gemma.py gemma-3-270m-q4_k_m.gguf
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The capital of India is", "भारत की राजधानी", "def fibonacci(n):", "Water boils at")


def main(file: Path) -> None:
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    torch.set_grad_enabled(False)
    prompts = []
    for text in PROMPTS:
        ids = tokenizer(text)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, -1]
        top = torch.topk(logits, 10)
        new = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        tops = [[i, round(x, 4)] for i, x in zip(top.indices.tolist(), top.values.tolist())]
        prompts.append({"text": text, "ids": ids, "greedy": new.tolist(), "top": tops})
    about = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "prompts": prompts}
    out = Path(__file__).with_name("gemma.json")
    out.write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
