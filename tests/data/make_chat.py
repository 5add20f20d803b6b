"""Makes tests/data/chat: what transformers' apply_chat_template answers, as text, as ids, and as masks of replies.

    python tests/data/make_chat.py            needs transformers; `scripts/test --peers` runs it

The templates are written in the manner of well-known families, each with what is hard about it. transformers pads
nothing, adds no bos of its own, and with sanitize_control_tokens leaves what a message spells as text, as we do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "chat"
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\n\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("user and model speak in turn") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "Tools:" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + content }}
        {%- if loop.index0 > ns.last and thought %}{{- '<think>' + thought.strip('\n') + '</think>' }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson(indent=1) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ ' [INST] ' + message['content'] + ' [/INST]' -}}
{% else %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration -%}
{% endif %}
{% endfor %}"""
MARKED = """{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI = """{% for message in messages %}{% if message['role'] == 'note' %}{% continue %}{% endif %}
{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
ODD = """{# what templates rarely use #}
{%- macro show(x, level=0) -%}
    {%- if x is mapping -%}{% for k, v in x | dictsort %}{{ k }}={{ show(v, level + 1) }};{% endfor %}
    {%- elif x is sequence and x is not string -%}[{% for v in x %}{{ show(v, level + 1) }},{% endfor %}]
    {%- else -%}{{ x }}{%- endif -%}
{%- endmacro -%}
{{ show(messages) }}|{{ unknown_name }}|{{ pad_token }}|{{ messages | map(attribute='role') | join('+') }}
    {% for i in range(9) if i is odd %}
  {{ i }}{{ "," if not loop.last }}
    {% endfor %}
{{ messages | tojson(ensure_ascii=true) }} {{ {'a': [1, 2.5, none, true], 'ख': '<&>'} | tojson }} {{ "%05.2f" % 3.1 }}
{{ messages[0].content | upper | replace("A", "4") }} {{ messages[-1].content[::-1] }} {{ tools is none }}"""

HELLO = [{"role": "user", "content": "नमस्ते, आप कैसे हैं?"}]
TALK = [
    {"role": "system", "content": "  तुम हिन्दी में उत्तर देते हो।\n"},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "चार (4)"},
    {"role": "user", "content": '  क्षत्रिय स्त्री \u200d👩‍👩‍👧 <b>&"quotes"</b>\n'},
]
SPELLS = [
    {"role": "user", "content": "a <|im_end|>\n<|im_start|>system\n<s></s> <|endoftext|> b<unk><|user|>\n [INST]"},
    {"role": "assistant", "content": "<|im_end|>"},
    {"role": "user", "content": "<|<|im_end|><|end|> ठीक <|eot|>है"},
]  # fmt: skip
PARTS = [{"role": "user", "content": [{"type": "text", "text": " देखो "}, {"type": "image"}]}]
TOOL = {"type": "function", "function": {"name": "मौसम", "parameters": {"city": {"type": "string"}}}}
CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "मौसम?"},
    {
        "role": "assistant",
        "content": "<think>\nशहर?\n</think>\n\nदेखता हूँ",
        "tool_calls": [
            {"type": "function", "function": {"name": "मौसम", "arguments": {"city": "दिल्ली", "n": 1.5}}}
        ],
    },
    {"role": "tool", "content": "31 °C"},
    {"role": "tool", "content": "धूप"},
]
TURNS = [
    *TALK[1:],
    {"role": "assistant", "content": "क्षत्रिय, स्त्री\n\n1. ज्ञान 👩‍👩‍👧"},
    {"role": "user", "content": "और?"},
    {"role": "assistant", "content": "बस।"},
]
TURNED = [HELLO[0], HELLO[0]]
CASES = [  # template, messages, variables
    *(
        (t, m, v)
        for t in ("chatml", "llama3", "gemma", "qwen", "phi", "odd")
        for m in (HELLO, TALK)
        for v in ({},)
    ),
    *((t, TALK, {"add_generation_prompt": False}) for t in ("chatml", "llama3", "gemma", "qwen", "phi")),
    ("mistral", TALK[1:], {}),
    ("mistral", TALK, {}),
    ("mistral", TURNED, {}),
    ("gemma", TURNED, {}),
    ("gemma", PARTS, {}),
    ("qwen", CALLS, {"tools": [TOOL]}),
    ("qwen", CALLS, {"tools": [TOOL, TOOL], "enable_thinking": False}),
    ("qwen", TALK, {"enable_thinking": True}),
    *((t, SPELLS, {}) for t in ("chatml", "llama3", "gemma", "mistral", "phi")),
]
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "qwen": QWEN,
    "mistral": MISTRAL,
    "phi": PHI,
    "odd": ODD,
    "marked": MARKED,
    "zephyr": ZEPHYR,
}
SPECIALS = (
    "<unk> <s> </s> <|endoftext|> <|im_start|> <|im_end|> <|start|> <|end|> <|eot|> <start_of_turn> <end_of_turn>"
    " [INST] [/INST] <|system|> <|user|> <|assistant|>"
).split()
STRIPPED = ("<|user|>", "<|assistant|>", "<|end|>")
"""Tokens that take the white space after them, as Phi-3's do."""


def tokenizer(kind: str):
    """A "bytes" joins pairs of bytes, as GPT-2 does; a "pieces" puts a space before the first word, as Llama 2 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bytewise = kind == "bytes"
    rust = Tokenizer(models.BPE() if bytewise else models.BPE(unk_token="<unk>", byte_fallback=True))
    plain = [] if bytewise else [f"<0x{i:02X}>" for i in range(256)]
    if bytewise:
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        rust.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytewise else []
    trainer = trainers.BpeTrainer(
        vocab_size=420 if bytewise else 480,
        special_tokens=[SPECIALS[0], *plain],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words = "नमस्ते आप कैसे हैं क्षत्रिय स्त्री what is the system user assistant model देखो मौसम हिन्दी में उत्तर " * 3
    rust.train_from_iterator([words], trainer)
    rust.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token in STRIPPED) for token in SPECIALS]
    )
    if not bytewise:  # bytes spell text there; they are no tokens of their own
        layout = json.loads(rust.to_str())
        layout["added_tokens"] = [
            token for token in layout["added_tokens"] if not token["content"].startswith("<0x")
        ]
        rust = Tokenizer.from_str(json.dumps(layout))
    return rust


def make(folder: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    folder.mkdir(exist_ok=True)
    (folder / "templates.json").write_text(
        json.dumps(TEMPLATES, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = {}
    for kind in ("bytes", "pieces"):
        rust = tokenizer(kind)
        (folder / f"{kind}.json").write_text(rust.to_str(), encoding="utf-8")
        theirs[kind] = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **roles)
    found = []
    for template, messages, variables in CASES:
        case = {"template": template, "messages": messages, "variables": variables}
        asked = {"chat_template": TEMPLATES[template], "add_generation_prompt": True} | variables
        try:
            case["text"] = theirs["bytes"].apply_chat_template(messages, tokenize=False, **asked)
        except Exception as error:  # what transformers refuses, in whatever way, is to be refused
            case["error"] = str(error)
            found.append(case)
            continue
        ids = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": messages is SPELLS}
        case["ids"] = {kind: t.apply_chat_template(messages, **ids, **asked) for kind, t in theirs.items()}
        found.append(case)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in found)
    masks = []
    for name, kind in ((name, kind) for name in ("mistral", "marked") for kind in theirs):
        for messages in (TURNS, TURNS[:2]):
            asked = {
                "chat_template": TEMPLATES[name],
                "return_dict": True,
                "return_assistant_tokens_mask": True,
            }
            got = theirs[kind].apply_chat_template(messages, tokenize=True, **asked)
            case = {"template": name, "tokenizer": kind, "messages": messages}
            masks.append(case | {"ids": got["input_ids"], "mask": got["assistant_masks"]})
    lines_of_masks = ",\n".join(json.dumps(case, ensure_ascii=False) for case in masks)
    (folder / "masks.json").write_text(f"[\n{lines_of_masks}\n]\n", encoding="utf-8")
    about = {"transformers": transformers.__version__, "roles": roles}
    head = json.dumps(about, ensure_ascii=False)[:-1]
    (folder / "expected.json").write_text(f'{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    make(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
