"""Makes the folders in tests/models/families: tiny random models of transformers, and what they answer.

    python tests/models/make_families.py            needs torch and transformers; `scripts/test --peers` runs it

Every parameter is drawn anew, norms and biases too, so that one which is swapped or left out shows. A folder holds
config.json and model.safetensors as transformers writes them, and expected.safetensors: tokens [2, 24], logits, the
mean loss of the next token and its gradient for every tensor, and 64 greedy tokens after the first 6 of each row.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "families"
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
CASES = {  # name -> (configuration class, what differs from SIZES)
    "llama": ("LlamaConfig", {}),
    "llama-heads": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma2-caps": (
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "sliding_window": 5}),
    "phi3-partial": ("Phi3Config", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": ("GPT2Config", {}),
    "gpt2-untied": ("GPT2Config", {"tie_word_embeddings": False, "n_inner": 24}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen3-moe": ("Qwen3MoeConfig", MOE | {"num_experts": 4, "norm_topk_prob": True}),
    "qwen3-moe-plain": ("Qwen3MoeConfig", MOE | {"num_experts": 4, "norm_topk_prob": False}),
}


def make(name: str, folder: Path) -> None:
    """Writes one model and what it answers."""
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    torch.manual_seed(sum(map(ord, name)))
    torch.set_num_threads(1)
    kind, more = CASES[name]
    sizes = GPT2 if kind == "GPT2Config" else SIZES
    config = getattr(transformers, kind)(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.25 if p.dim() < 2 else 0.15))
            if ("norm" in path and "gemma" not in name) or (".ln_" in path and path.endswith("weight")):
                p.add_(1.0)
    tokens = torch.randint(3, 48, (2, 24))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 48), tokens[:, 1:].reshape(-1))
    loss.backward()
    greedy = tokens[:, :6]
    with torch.no_grad():
        for _ in range(64):
            following = model(greedy).logits[:, -1].argmax(-1, keepdim=True)
            greedy = torch.cat([greedy, following], 1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    stored = gradients(model, folder)
    found = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach(), "greedy": greedy[:, 6:]}
    save_file({k: v.contiguous() for k, v in (found | stored).items()}, folder / "expected.safetensors")


def gradients(model, folder: Path) -> dict:
    """The gradient of every tensor in the file, under its name there."""
    from safetensors import safe_open

    own = {name: p.grad for name, p in model.named_parameters()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    found = {}
    for name in names:
        inside = name.replace("block_sparse_moe", "mlp")
        if inside in own:
            found[f"grad:{name}"] = own[inside]
            continue
        at, _, expert = inside.partition(".experts.")
        number, which, _ = expert.split(".")
        joined = own[f"{at}.experts." + ("down_proj" if which in ("w2", "down_proj") else "gate_up_proj")][
            int(number)
        ]
        if which in ("w1", "gate_proj", "w3", "up_proj"):
            joined = joined.chunk(2, 0)[which in ("w3", "up_proj")]
        found[f"grad:{name}"] = joined
    return found


def logits_of(folder: Path, tokens):
    """What transformers answers with the model in a folder; every tensor of it must find its place."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for case in sys.argv[1:] or CASES:
        make(case, FOLDER / case)
        print(case, json.loads((FOLDER / case / "config.json").read_text())["model_type"])
