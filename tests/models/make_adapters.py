"""Makes the folders in tests/models/adapters: adapters that PEFT trained on models of `families`, and what they answer.

    python tests/models/make_adapters.py            needs torch, transformers and peft

A folder holds adapter_config.json and adapter_model.safetensors as PEFT writes them, and expected.safetensors: tokens
[2, 24] and the logits of the adapted model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

FAMILIES = Path(__file__).parent / "families"
FOLDER = Path(__file__).parent / "adapters"
LORA = {"r": 3, "lora_alpha": 6}
CASES = {  # name -> (model of `families`, settings of LoraConfig)
    "lora": ("llama", LORA | {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": (
        "qwen3",
        LORA
        | {
            "use_rslora": True,
            "target_modules": r".*\.self_attn\.[qkvo]_proj",
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "o_proj": 2},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "dora": ("llama-heads", LORA | {"use_dora": True, "target_modules": "all-linear"}),
    "layers": (
        "mistral",
        LORA
        | {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "dora-layers": (
        "llama",
        LORA | {"use_dora": True, "target_modules": ["o_proj"], "layers_to_transform": 0},
    ),
    "gpt2": ("gpt2", LORA | {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "mlp.c_fc"]}),
    "gpt2-dora": ("gpt2", LORA | {"use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    "fused": ("phi3", LORA | {"target_modules": "all-linear"}),
    "fused-dora": ("phi3", LORA | {"use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "embedding": ("llama", LORA | {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied": ("qwen2", LORA | {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "pissa": ("llama", LORA | {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]}),
}


def make(name: str, folder: Path) -> None:
    """Trains one adapter for a few steps and writes it and what the model answers with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(sum(map(ord, name)))
    torch.set_num_threads(1)
    base, settings = CASES[name]
    before = folder / "before"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(released(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        if name == "pissa":
            model.save_pretrained(before)
        tokens = torch.randint(3, 48, (2, 24))
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=0.1)
        with torch.no_grad():
            for p in learned:
                p.add_(0.1 * torch.randn_like(p))
        for _ in range(3):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        logits = model.eval()(tokens).logits.detach()
        more = {"path_initial_model_for_weight_conversion": str(before)} if name == "pissa" else {}
        model.save_pretrained(folder, **more)
    shutil.rmtree(before, ignore_errors=True)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    said = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    said = {name: sorted(x) if isinstance(x, list) else x for name, x in said.items()}
    file.write_text(json.dumps(said, indent=1) + "\n")
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")


def released(name: str):
    """A model of `families` in transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        FAMILIES / name, attn_implementation="eager", dtype=torch.float32
    ).eval()


def logits_with(name: str, folder: Path, tokens):
    """What a model of `families` answers with the adapter in a folder, apart and merged; every key finds its place."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(released(name), folder)
        apart = model(torch.tensor(tokens)).logits.numpy()
        merged = model.merge_and_unload()(torch.tensor(tokens)).logits.numpy()
    keys = [str(one.message) for one in told if "adapter keys" in str(one.message)]
    assert not keys, keys
    return apart, merged


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for case in sys.argv[1:] or CASES:
        make(case, FOLDER / case)
        print(case, sorted(path.name for path in (FOLDER / case).iterdir()))
