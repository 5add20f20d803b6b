"""A config.json read strictly: what has no counterpart here is an error that names the field, never dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmx.nn import Local
from lmx.ops.mask import Causal, Mask, SlidingWindow
from lmx.ops.position import Linear, Llama3, Position, RoPE, Scaling, YaRN

HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
    is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
    n_ctx no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    transformers.js_config typical_p unsloth_fixed use_bfloat16 use_cache""".split()
)
"""Fields that say how a model is trained, batched or sampled from, not what it computes."""


KINDS = {
    int: "a whole number from 0, below 2**31",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
COUNTS = ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts")


def check_counts(found: Mapping[str, Any], n_tensors: int, where: str) -> None:
    """Raises: ValueError if a config has more layers or experts than the file has tensors; nothing is counted out."""
    for name in COUNTS:
        if type(found.get(name)) is int and found[name] > n_tensors:
            raise ValueError(f"{where}: {name}={found[name]:,}, but the file has {n_tensors:,} tensors")


class Fields:
    """The fields of a config.json, each asked for by name; `finish` refuses those nobody asked for."""

    def __init__(self, found: Mapping[str, Any], where: str):
        self.found, self.where = found, where
        self.asked = set(HARMLESS)

    def __call__(self, name: str, kind: type, default: Any = ...) -> Any:
        """The value of a field. Raises: ValueError if it is not of that kind, or absent without a default."""
        self.asked.add(name)
        value = self.found.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.where}: the field {name} is missing")
            return default
        if kind is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not kind or (kind is int and not 0 <= value < 2**31):
            raise ValueError(f"{self.where}: {name} is {value!r:.99}, not {KINDS[kind]}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Raises: ValueError if the field has another value than these; absent is fine."""
        self.asked.add(name)
        value = self.found.get(name)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.where}: {name}={value!r:.99} has no counterpart in lmx, which knows "
                f"{', '.join(map(repr, allowed))}"
            )

    def finish(self) -> None:
        """Raises: ValueError naming the fields that nothing here reads and that are not empty."""
        unread = {
            k: v for k, v in self.found.items() if k not in self.asked and v not in (None, False, [], {})
        }
        if unread:
            told = ", ".join(f"{k}={v!r:.60}" for k, v in unread.items())
            raise ValueError(f"{self.where}: no counterpart in lmx for {told}")


def rope(f: Fields, kind: str | None = None, theta: float = 1e4, partial: bool = False) -> RoPE:
    """The rotation, from `rope_parameters` (transformers 5, one for each kind of layer if they differ), or from
    `rope_theta` and `rope_scaling` (before it). partial: whether the family can turn a part of each head."""
    found = f("rope_parameters", dict, {})
    r = Fields(f("rope_scaling", dict, {}) | found.get(kind, found), f"{f.where}: rope_parameters")
    theta = r("rope_theta", float, f("rope_theta", float, theta))
    fraction = r("partial_rotary_factor", float, f("partial_rotary_factor", float, 1.0))
    if fraction != 1 and not partial:
        raise ValueError(
            f"{r.where}: partial_rotary_factor={fraction} has no counterpart in models of this family"
        )
    form = r("rope_type", str, r("type", str, "default"))
    r("type", str, form)
    scaled = _scaling(form, r, f)
    r.finish()
    return RoPE(theta, fraction, scaled)


def _scaling(form: str, r: Fields, f: Fields) -> Scaling:
    if form == "default":
        return Scaling()
    if form == "linear":
        return Linear(r("factor", float))
    trained = r("original_max_position_embeddings", int, f("max_position_embeddings", int, 0))
    if form == "llama3":
        return Llama3(r("factor", float), r("low_freq_factor", float), r("high_freq_factor", float), trained)
    if form == "yarn":
        fast, slow = r("beta_fast", float, 32.0), r("beta_slow", float, 1.0)
        return YaRN(r("factor", float), trained, fast, slow, r("attention_factor", float, None))
    raise ValueError(
        f"{r.where}: rope_type={form!r} has no counterpart in lmx, which knows default, linear, llama3 and yarn"
    )


def rope_fields(position: Position) -> dict[str, Any]:
    """`rope_parameters` of a rotation. Raises: ValueError for a position or scaling that transformers has not."""
    if not isinstance(position, RoPE):
        raise ValueError(f"position={position}: transformers' models of this family have RoPE alone")
    found: dict[str, Any] = {"rope_theta": position.theta, "rope_type": "default"}
    if position.fraction != 1:
        found["partial_rotary_factor"] = position.fraction
    scaling = position.scaling
    if scaling == Scaling():
        return found
    names = {Linear: "linear", Llama3: "llama3", YaRN: "yarn"}
    if type(scaling) not in names:
        raise ValueError(f"{scaling}: transformers has no such scaling of RoPE")
    found |= {"rope_type": names[type(scaling)], "factor": float(scaling.factor)}
    if isinstance(scaling, Llama3 | YaRN):
        found["original_max_position_embeddings"] = scaling.original_len
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
        if getattr(scaling, name, None) is not None:
            found[name] = getattr(scaling, name)
    return found


def both_spellings(position: Position) -> dict[str, Any]:
    """The rotation as transformers 5 writes it and as versions before read it."""
    found = rope_fields(position)
    old = {"rope_theta": found["rope_theta"], "rope_parameters": found}
    scaling = {k: v for k, v in found.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if position.fraction != 1:
        old["partial_rotary_factor"] = position.fraction
    return old | ({"rope_scaling": scaling} if scaling["rope_type"] != "default" else {})


def windows(f: Fields, kinds: Sequence[str], position: RoPE | None = None) -> tuple[Mask, Local | None]:
    """The mask of all layers and what local ones do otherwise, from `layer_types` or, before it, from `kinds`.

    position: that of local layers, if it is another.
    """
    kinds = f("layer_types", list, list(kinds))
    n_layers = f("num_hidden_layers", int)
    window = f("sliding_window", int, None)
    letters = {"sliding_attention": "L", "full_attention": "G"}
    if len(kinds) != n_layers or any(kind not in letters for kind in kinds):
        raise ValueError(
            f"{f.where}: layer_types={kinds!r:.99} does not say sliding_attention or full_attention for each of "
            f"{n_layers} layers"
        )
    pattern = "".join(letters[kind] for kind in kinds)
    if "L" in pattern and window is None:
        raise ValueError(f"{f.where}: layer_types has sliding_attention, but sliding_window is missing")
    if "L" not in pattern:
        return Causal(), None
    if "G" not in pattern and position is None:
        return SlidingWindow(window), None
    unit = next(n for n in range(1, n_layers + 1) if pattern == (pattern[:n] * n_layers)[:n_layers])
    return Causal(), Local(window, pattern[:unit], position)


def window_fields(mask: Mask, local: Local | None, n_layers: int) -> dict[str, Any]:
    """`sliding_window` and `layer_types`. Raises: ValueError for a mask that transformers has not."""
    if local is not None and mask == Causal():
        names = {"L": "sliding_attention", "G": "full_attention"}
        kinds = [names[local.pattern[i % len(local.pattern)]] for i in range(n_layers)]
        return {"sliding_window": local.window, "layer_types": kinds}
    if isinstance(mask, SlidingWindow) and local is None:
        return {"sliding_window": mask.size, "layer_types": ["sliding_attention"] * n_layers}
    if mask == Causal():
        return {"sliding_window": None, "layer_types": ["full_attention"] * n_layers}
    raise ValueError(f"attention.mask={mask}: transformers has no such mask")
