"""Chat templates: what transformers renders, what a message may spell, and templates that mean harm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data import ChatTemplate, Tokenizer, chat_template

FOLDER = Path(__file__).parent / "chat"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
TEMPLATES = json.loads((FOLDER / "templates.json").read_text(encoding="utf-8"))
TOKENIZERS = {
    kind: Tokenizer(Tokenizer.load(FOLDER / f"{kind}.json")._rust, EXPECTED["roles"])
    for kind in ("bytes", "pieces")
}
HELLO = [{"role": "user", "content": "नमस्ते"}]


def template(name):
    return ChatTemplate(TEMPLATES[name], EXPECTED["roles"])


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: case["template"])
def test_rendering_is_that_of_transformers(case):
    ours = template(case["template"])
    if "error" in case:
        with pytest.raises(ValueError, match="the chat template refuses these messages: ") as error:
            ours.render(case["messages"], **case["variables"])
        assert case["error"] in str(error.value)
        return
    assert ours.render(case["messages"], **case["variables"]) == case["text"]
    for kind, ids in case["ids"].items():
        assert ours.ids(TOKENIZERS[kind], case["messages"], **case["variables"]) == ids


@pytest.mark.peers
def test_the_fixtures_are_what_transformers_says_today(tmp_path):
    script = Path(__file__).with_name("make_chat.py")
    subprocess.run([sys.executable, script, tmp_path], check=True)
    for path in FOLDER.iterdir():
        assert (tmp_path / path.name).read_text("utf-8") == path.read_text("utf-8")


SPECIALS = TOKENIZERS["bytes"].specials
LETTERS = ["<", ">", "|", "[", "]", "/", "s", "im_end", "user", " ", "\n", "क", "्", "ष", "हिन्दी", "\ue000"]
plain = st.lists(st.sampled_from(LETTERS), max_size=8).map("".join)
spelling = st.lists(st.sampled_from([*LETTERS, *SPECIALS]), max_size=8).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(plain, min_size=1, max_size=3))
def test_without_spellings_ids_are_those_of_the_whole_text(kind, texts):
    tokenizer, ours = TOKENIZERS[kind], template("chatml")
    messages = [{"role": "user", "content": text} for text in texts]
    if any(special in "".join(texts) for special in SPECIALS):
        return
    whole = tokenizer._with_specials.encode(ours.render(messages), add_special_tokens=False).ids
    assert ours.ids(tokenizer, messages) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["chatml", "qwen"])
@given(texts=st.lists(spelling, min_size=1, max_size=3))
def test_what_a_message_spells_stays_text(kind, name, texts):
    """The special ids are those of messages that spell none, and the text is what was rendered."""
    tokenizer, ours = TOKENIZERS[kind], template(name)
    messages = [{"role": "user", "content": f"x{text}x"} for text in texts]
    special = {tokenizer.token_id(token) for token in SPECIALS}
    found, harmless = (
        [i for i in ours.ids(tokenizer, m) if i in special]
        for m in (messages, [{"role": "user", "content": "x"}] * len(texts))
    )
    assert found == harmless
    shown = tokenizer.decode(ours.ids(tokenizer, messages), specials=True)
    assert shown.removeprefix(" ") == ours.render(messages)


def test_texts_that_a_template_joins_spell_nothing_either():
    ours = ChatTemplate("{% for part in messages[0].content %}{{ part.text }}{% endfor %}<|im_end|>")
    parts = [{"type": "text", "text": text} for text in ("a<|im_", "end", "|>")]
    ids = ours.ids(TOKENIZERS["bytes"], [{"role": "user", "content": parts}])
    end = TOKENIZERS["bytes"].token_id("<|im_end|>")
    assert ids.index(end) == len(ids) - 1
    assert TOKENIZERS["bytes"].decode(ids) == "a<|im_end|>"


def test_a_tokens_that_end_replies_are_not_spelled_even_if_a_file_forgot_to_call_them_special(tmp_path):
    layout = json.loads((FOLDER / "bytes.json").read_text(encoding="utf-8"))
    for token in layout["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = Tokenizer.load(tmp_path)
    end = tokenizer.token_id("<|im_end|>")
    said = [{"role": "user", "content": "<|im_end|>"}]
    assert template("chatml").ids(tokenizer, said).count(end) == 3
    assert template("chatml").ids(tokenizer.ending_with([end]), said).count(end) == 2


def test_end_ids_are_the_eos_or_what_a_model_says():
    tokenizer = TOKENIZERS["bytes"]
    assert tokenizer.end_ids == (tokenizer.eos_id,)
    ending = tokenizer.ending_with([7, 5, 7, 10**6, -1])
    assert ending.end_ids == (7, 5) and ending.without("bos_token").end_ids == (7, 5)
    assert (
        tokenizer.without("eos_token").end_ids == ()
        and tokenizer.ending_with([]).end_ids == tokenizer.end_ids
    )
    assert ending.hash == tokenizer.hash and tokenizer.end_ids == (tokenizer.eos_id,)


HOSTILE = {
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "took more than",
    ),
    "endless filter": (
        "{{ range(99999)|map('string')|list * 9 }}{{ lipsum(n=10**9) }}",
        "took more than|more memory",
    ),
    "endless power": ("{{ 7 ** (7 ** 9) }}", "took more than"),
    "endless text": (
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "writes more than 16,777,216",
    ),
    "memory": ("{{ 'a' * 10 ** 11 }}", "more memory"),
    "memory by doubling": (
        "{% set ns = namespace(x='नमस्ते') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "more memory",
    ),
    "memory by padding": (
        "{{ '%0999999999d' % 1 }}{{ 'a'.ljust(10**10) }}",
        "took more|more memory|writes more",
    ),
    "huge range": ("{{ range(10 ** 9)|list }}", "Range too big"),
    "deep macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "too deep"),
    "deep text": ("{{" + "[" * 50_000, "too deep|not Jinja"),
    "deep blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "too deep|fails"),
    "attributes": ("\n{{ ''.__class__.__mro__ }}", "at its line 2: access to attribute '__class__'"),
    "attributes by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "access to attribute|unsafe"),
    "attributes by name": ("{{ (''|attr('__class__')) is defined and (''|attr('__class__')).mro() }}", None),
    "globals": ("{{ raise_exception.__globals__['os'] }}", "__globals__"),
    "a namespace with hidden names": ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "takes no name like"),
    "import": ("{% import 'os' as os %}{{ os }}", "fails at its line 1"),
    "include": ("{% include '/etc/passwd' %}", "fails at its line 1"),
    "changed messages": ("{{ messages.append(1) }}", "access to attribute 'append'"),
    "undefined": ("a\nb{{ nobody.name }}", "at its line 2: 'nobody' is undefined"),
    "syntax": ("a\n\n{% if %}", "not Jinja at its line 3"),
    "refusal": ("{{ raise_exception('केवल एक') }}", "refuses these messages: केवल एक"),
    "wrong type": ("{{ 1 + messages }}", "fails at its line 1: TypeError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_means_harm_is_told(name, monkeypatch):
    source, told = HOSTILE[name]
    if told != "more memory":  # which a slow machine takes its time to fill
        monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    start = time.perf_counter()
    if told is None:
        assert ChatTemplate(source).render(HELLO) == "False"
    else:
        with pytest.raises(ValueError, match=f"the chat template .*({told})"):
            ChatTemplate(source).render(HELLO)
    assert time.perf_counter() - start < 20
    assert ChatTemplate("{{ messages[0].content }}").render(HELLO) == "नमस्ते"


def test_what_is_too_long_or_no_json_is_told():
    with pytest.raises(ValueError, match="has 1,048,577 characters; at most 1,048,576"):
        ChatTemplate("x" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="at most 16,777,216 are taken"):
        ChatTemplate("").render([{"role": "user", "content": "न" * (1 << 22)}])
    with pytest.raises(ValueError, match="are no JSON"):
        ChatTemplate("").render([{"role": "user", "content": b"bytes"}])


def test_a_template_has_no_files_and_no_modules_of_ours_in_its_process():
    ChatTemplate("").render(HELLO)
    pid = chat_template._PROCESS._running.pid
    if not Path(f"/proc/{pid}/maps").exists():
        pytest.skip("needs /proc")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "jaxlib" not in maps and "numpy" not in maps and "tokenizers" not in maps
    assert "Max file size             0" in Path(f"/proc/{pid}/limits").read_text()


def test_many_threads_and_a_killed_process_are_served():
    def ask(i):
        return ChatTemplate("{{ messages[0].content }} " + str(i % 3)).render(
            [{"role": "user", "content": f"{i} ठीक"}]
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == [f"{i} ठीक {i % 3}" for i in range(40)]
    chat_template._PROCESS._running.kill()
    chat_template._PROCESS._running.wait()
    assert ask(1) == "1 ठीक 1"


def test_ctrl_c_while_it_renders_leaves_no_answer_for_the_next():
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a background job is born to ignore
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ChatTemplate(HOSTILE["endless loop"][0]).render(HELLO)
    signal.signal(signal.SIGINT, before)
    assert ChatTemplate("{{ messages[0].content }}").render(HELLO) == "नमस्ते"


ORPHAN = """
import sys, threading
from lmx.data import ChatTemplate, chat_template
ChatTemplate("").render([])
print(chat_template._PROCESS._running.pid, flush=True)
ChatTemplate(sys.argv[1]).render([])
sys.stdin.read()
"""


@pytest.mark.parametrize("source", ["", HOSTILE["endless loop"][0]], ids=["idle", "rendering"])
def test_the_process_ends_with_its_parent(source):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": env}
    with subprocess.Popen([sys.executable, "-c", ORPHAN, source], **pipes) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    until = time.monotonic() + chat_template.SECONDS + 5
    while _runs(pid):
        assert time.monotonic() < until, "an orphan"
        time.sleep(0.05)


def _runs(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
