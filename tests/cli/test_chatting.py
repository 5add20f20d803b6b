"""lmx chat: the conversation, its commands, and the program in a pipe, on a terminal and under Ctrl-C."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import regex

from lmx import cli
from lmx.cli.conversation import COMMANDS, Conversation
from lmx.data import Byte, Word
from lmx.generate import Completion, Sampling

FAMILIES = Path(__file__).parents[1] / "models" / "families"
ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}: {{ m.content }} {% endfor %}"
    "{{ 'a:' if add_generation_prompt }}"
)
WORDS = "u: a: s: the river carries boats past old mills नदी नावों को ले जाती है"


def spelled(messages):
    """A token a character, three for what the template adds."""
    return [0] * sum(len(m["content"]) + 3 for m in messages)


def conversation(context=1000, system=None, **settings):
    return Conversation(spelled, context, Sampling(**settings), system)


def answered(talk, text="ठीक", reason="eos"):
    talk.reply(text, Completion(text, (1, 2), reason, (0.0, 0.0)), 0.5)


def said(talk):
    return [(m["role"][0], m["content"]) for m in talk.messages]


def test_messages_and_replies_take_turns():
    talk = conversation(system="तुम मित्र हो")
    assert not talk.due and talk.say("नमस्ते") == "" and talk.due
    answered(talk)
    assert not talk.due and said(talk) == [("s", "तुम मित्र हो"), ("u", "नमस्ते"), ("a", "ठीक")]
    talk.say("  ")
    assert not talk.due
    talk.say("//tmp और\n/help")
    assert talk.messages[-1]["content"] == "/tmp और\n/help"


def test_undo_retry_reset_and_system():
    talk = conversation()
    for command in ("/undo", "/retry"):
        with pytest.raises(ValueError, match="nothing was said yet"):
            talk.say(command)
    for question in ("एक", "दो"):
        talk.say(question)
        answered(talk)
    assert talk.say("/retry") == "" and talk.due and said(talk)[-1] == ("u", "दो")
    assert talk.reply_number == 2, "another random stream than the first reply to it"
    answered(talk, "फिर")
    assert talk.say("/undo") == "taken back: दो" and said(talk) == [("u", "एक"), ("a", "ठीक")]
    assert talk.say("/system संक्षेप में") == "system: संक्षेप में" and said(talk)[0] == ("s", "संक्षेप में")
    talk.say("/system अब")
    assert [role for role, _ in said(talk)] == ["s", "u", "a"]
    assert talk.say("/history") == "system: अब\nuser: एक\nassistant: ठीक"
    talk.say("/reset")
    assert said(talk) == [("s", "अब")]
    assert talk.say("/system") == "no system message" and talk.messages == []
    assert talk.say("/history") == "nothing was said"


def test_settings_are_checked_by_sampling_itself():
    talk = conversation(seed=3)
    assert "temperature=0.2" in talk.say("/set temperature = 0.2")
    assert talk.say("/set stop=('।',)") == talk.say("/set") and talk.sampling.stop == ("।",)
    for setting, told in {
        "temperature=-1": "temperature=-1.0; use 0",
        "top_p=2": "use a share in",
        "heat=1": "no setting 'heat'; did you mean",
        "top_k=x": "top_k",
        "temperature": "write /set NAME=VALUE",
    }.items():
        with pytest.raises(ValueError, match=told):
            talk.say(f"/set {setting}")
    assert talk.sampling == Sampling(temperature=0.2, seed=3, stop=("।",))


def test_an_unknown_command_names_the_nearest():
    talk = conversation()
    with pytest.raises(ValueError, match=r"no command /hlep; did you mean /help\?.*with //"):
        talk.say("/hlep me")
    with pytest.raises(ValueError, match="there are /help, /system"):
        talk.say("/xyzzy")
    shown = talk.say("/help")
    assert all(command in shown for command in COMMANDS)
    assert talk.say("/quit") == "" and talk.over


def test_messages_are_saved_and_loaded(tmp_path):
    talk, path = conversation(system="मित्र"), tmp_path / "chat.jsonl"
    talk.say("पंक्ति\u2028एक")
    answered(talk)
    assert talk.say(f"/save {path}") == f"saved 3 messages as {path}"
    other = conversation()
    assert other.say(f"/load {path}") == f"loaded 3 messages from {path}" and other.messages == talk.messages
    other.say("और")
    other.say(f"/save {path}")
    assert len(path.read_text("utf-8").split("\n")) == 5
    assert conversation().say(f"/load {path}") and other.due
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt: it is already there"):
        other.say(f"/save {tmp_path / 'notes.txt'}")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"role": "user"}', r"chat\.jsonl:1: .* is no message"),
        (
            '{"role": "user", "content": "a"}\n{"role": "tool", "content": "b"}',
            r"chat\.jsonl:2: .* is no message",
        ),
        ("{", r"chat\.jsonl:1: not JSON"),
        ("[" * 100_000, r"chat\.jsonl:1: not JSON"),
        ("", "no messages"),
        (
            '{"role": "user", "content": "a"}\n{"role": "system", "content": "b"}',
            "a system message stands first",
        ),
    ],
    ids=["no content", "role", "no JSON", "deep", "empty", "late system"],
)
def test_broken_files_of_messages_change_nothing(content, told, tmp_path):
    talk, path = conversation(system="मित्र"), tmp_path / "chat.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        talk.say(f"/load {path}")
    with pytest.raises(ValueError, match="name a file"):
        talk.say("/load")
    with pytest.raises(FileNotFoundError):
        talk.say(f"/load {tmp_path / 'none'}")
    path.write_bytes(b'{"\xff')
    with pytest.raises(ValueError, match="not UTF-8"):
        talk.say(f"/load {path}")
    assert said(talk) == [("s", "मित्र")]


def test_the_oldest_exchanges_give_way_when_the_context_is_full():
    talk = conversation(context=40, system="12345", max_tokens=10)  # the system's message takes 8
    for text in ("aaaa", "bbbb"):
        talk.say(text)
        ids, sampling = talk.prompt()
        answered(talk, "cc")
    assert (len(ids), sampling.max_tokens, talk.left_out) == (8 + 7 + 5 + 7, 10, 0)
    talk.say("dddd")
    ids, sampling = talk.prompt()
    assert (len(ids), sampling.max_tokens, talk.left_out) == (8 + 7 + 5 + 7, 10, 2)
    assert talk.say("/tokens") == "39 of 40 tokens (98%); the last reply saw all but the oldest 2 messages"
    talk.say("/undo")
    talk.say("/set max_tokens=4")
    talk.say("d")
    assert len(talk.prompt()[0]) == 36 and talk.left_out == 0
    talk.say("/undo")
    talk.say("e" * 30)
    with pytest.raises(ValueError, match=r"41 tokens, and a reply needs 4 of the 40 .*/set max_tokens"):
        talk.prompt()


def test_a_reply_may_be_shorter_than_asked_for_in_a_small_context():
    talk = conversation(context=40, max_tokens=512)
    talk.say("a" * 15)
    ids, sampling = talk.prompt()
    assert len(ids) == 18 and sampling.max_tokens == 22


def test_stopped_replies_are_kept_as_far_as_they_were_shown():
    talk = conversation()
    assert talk.say("/stats") == "no reply yet"
    talk.say("गिनो")
    talk.reply("एक दो", None, 1.0)
    assert said(talk) == [("u", "गिनो"), ("a", "एक दो")] and talk.say("/stats") == "stopped"
    talk.say("और")
    talk.reply("", None, 1.0)
    assert said(talk)[-1] == ("a", "एक दो")
    talk.say("और")
    answered(talk, reason="length")
    assert talk.say("/stats") == "2 tokens in 0.50 s, 4.0 tokens/s, cut at max_tokens"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny random Qwen 3 with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "released"
    shutil.copytree(FAMILIES / "qwen3", folder, ignore=shutil.ignore_patterns("expected.*"))
    Word(21).train([WORDS] * 2).save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_template_and_ends_are_found_wherever_a_model_lies(released, tmp_path, lmx):
    from lmx.run import trained

    lmx("convert", released, tmp_path / "run")
    lmx("convert", tmp_path / "run", tmp_path / "again")
    for folder in (released, tmp_path / "run", tmp_path / "again"):
        model = trained(folder)
        assert model.chat.source == TEMPLATE and model.chat.specials["eos_token"] == "<|eos|>"
        assert (model.tokenizer.end_ids, model.context, model.tokenizer.eos_id) == ((2, 5), 128, 2)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"chat_template": "a"}, "a"),
        ({"chat_template": [{"name": "rag", "template": "b"}, {"name": "default", "template": "c"}]}, "c"),
        ({"chat_template": [{"name": "rag", "template": "b"}]}, None),
        ({}, None),
        ({"chat_template": 3}, "is 3, not a text"),
    ],
)
def test_templates_in_a_tokenizer_config(config, found):
    from lmx.models import pretrained

    beside = {
        "tokenizer_config.json": json.dumps(config | {"bos_token": {"content": "<s>"}, "add_bos_token": True})
    }
    if found and "not a text" in found:
        with pytest.raises(ValueError, match=rf"here/tokenizer_config\.json: chat_template {found}"):
            pretrained.chat(beside, Path("here"))
        return
    chat = pretrained.chat(beside, Path("here"))
    assert (chat and chat.source) == found
    assert chat is None or chat.specials == {"bos_token": "<s>"}
    chat = pretrained.chat(beside | {"chat_template.jinja": "d"}, Path("here"))
    assert chat.source == "d"


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"config.json": {"eos_token_id": 3}}, (3,)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [4, 5]}}, (4, 5)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {}}, (3,)),
        ({"config.json": {"eos_token_id": None}}, ()),
    ],
)
def test_what_ends_a_reply_is_read_as_transformers_does(files, ids):
    from lmx.models import pretrained

    assert pretrained.end_ids({name: json.dumps(x) for name, x in files.items()}, Path("here")) == ids
    with pytest.raises(ValueError, match=r"here/config\.json: eos_token_id='</s>'; use an id"):
        pretrained.end_ids({"config.json": '{"eos_token_id": "</s>"}'}, Path("here"))


def test_gguf_metadata_say_template_and_ends():
    from lmx.formats.gguf import Gguf
    from lmx.models import gguf_model, pretrained

    said = {"ggml.tokens": ["<s>", "</s>", "<e>"], "ggml.bos_token_id": 0, "ggml.eos_token_id": 1}
    said |= {
        "ggml.eot_token_id": 2,
        "ggml.eom_token_id": 1,
        "ggml.model": "llama",
        "chat_template": "{{ bos_token }}",
    }
    file = Gguf("llama", {f"tokenizer.{name}": value for name, value in said.items()}, {})
    beside = gguf_model.beside(file)
    assert pretrained.end_ids(beside, Path("x")) == (1, 2)
    chat = pretrained.chat(beside, Path("x"))
    assert chat.render([]) == "<s>" and chat.specials == {"bos_token": "<s>", "eos_token": "</s>"}


def talk(lmx, monkeypatch, lines, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return lmx("chat", *argv)


GREEDY = ("--temperature", "0", "--max-tokens", "6")


def test_replies_are_those_of_generate_on_the_rendered_messages(released, lmx, monkeypatch, capsys):
    first, second = "the river", "नदी नावों"
    options = ("--system", "old", *GREEDY)
    lines = talk(lmx, monkeypatch, [first, second, "/stats"], released, *options).split("\n")
    reply = lmx("generate", released, first, "--chat", *options).removesuffix("\n")
    assert lines[0] == reply and "tokens/s" in lines[2] and len(lines) == 4
    rendered = f"s: old u: {first} a: {reply} u: {second} a:"
    whole = lmx("generate", released, rendered, *GREEDY)
    assert whole == f"{rendered}{lines[1]}\n"


def test_generate_with_chat_in_batches_and_as_json(released, lmx, refused):
    options = ("the river", "नदी", "--chat", *GREEDY)
    alone = [lmx("generate", released, prompt, "--chat", *GREEDY) for prompt in options[:2]]
    found = [json.loads(line) for line in lmx("generate", released, *options, "--json").splitlines()]
    assert [x["prompt"] for x in found] == ["the river", "नदी"]
    assert [x["text"] + "\n" for x in found] == alone
    shown = lmx("generate", released, *options)
    assert all(f"{prompt}\n{reply}" in shown for prompt, reply in zip(options, alone))
    assert lmx("generate", released, "the river", *GREEDY).startswith("the river")
    assert "add --chat" in refused("generate", released, "x", "--system", "y")


def test_a_model_without_a_template_names_the_way_out(run, lmx, refused, monkeypatch, tmp_path):
    for told in (refused("chat", run[0]), refused("generate", run[0], "नदी", "--chat")):
        assert "has no chat template" in told and "--template FILE" in told and "lmx generate" in told
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[-1].content }}")
    found = talk(lmx, monkeypatch, ["नदी"], run[0], "--template", template, *GREEDY)
    assert f"नदी{found}" == lmx("generate", run[0], "नदी", *GREEDY)
    template.write_text("{{ raise_exception('केवल गद्य') }}")
    assert "own.jinja refuses these messages: केवल गद्य" in refused(
        "generate", run[0], "x", "--chat", "--template", template
    )


def test_mistakes_do_not_end_the_chat(released, lmx, monkeypatch, capsys):
    lines = ["/tmp", "/set top_p=7", "/load nowhere.jsonl", "the " * 200, "/history"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    cli.main(["chat", str(released), *GREEDY])
    shown = capsys.readouterr()
    assert shown.out == "nothing was said\n"
    assert [line.split(";")[0][:30] for line in shown.err.splitlines()] == [
        "no command /tmp",
        "Sampling: top_p=7.0",
        "nowhere.jsonl: No such file or",
        "this message makes 206 tokens,",
    ]


def test_a_conversation_that_outgrows_the_context_says_so(released, lmx, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the river\n" + "boats " * 110 + "\n/tokens\n"))
    cli.main(["chat", str(released), *GREEDY])
    shown = capsys.readouterr()
    assert "its oldest 2 messages are left out" in shown.err
    assert "of 128 tokens" in shown.out


def command(*argv):
    return [sys.executable, "-m", "lmx", "chat", *map(str, argv)]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}


def test_in_a_pipe_lines_go_in_and_replies_come_out(released):
    lines = "the river\nले \\\nजाती है\n/history\n"
    done = subprocess.run(
        command(released, *GREEDY), input=lines.encode(), capture_output=True, env=environment(), timeout=120
    )
    assert done.returncode == 0 and done.stderr == b""
    shown = done.stdout.decode().split("\n")
    assert shown[2] == "user: the river" and shown[3] == f"assistant: {shown[0]}"
    assert shown[4:6] == ["user: ले ", "जाती है"] and shown[6] == f"assistant: {shown[1]}"


TEXT = "क्षत्रिय स्त्री 👩‍👩‍👧 हिन्दी "


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A run's folder whose greedy reply is TEXT again and again, whatever is said; a token is a byte."""
    sys.path.insert(0, str(ROOT / "tests" / "generate"))
    from parrot import parrot

    from lmx.data import Data
    from lmx.nn import MlpConfig
    from lmx.run import Run
    from lmx.train.checkpoint import FOLDER, Checkpoints

    folder, tokenizer = tmp_path_factory.mktemp("parrot"), Byte().train()
    ids = tokenizer.encode(TEXT)
    shifted = [ids[(i - 1) % len(ids)] for i in range(2048)]  # after a prompt of 2 tokens, from the first on
    model, params = parrot(shifted, tokenizer.vocab_size, room=2048, mlp=MlpConfig(d_ff=16))
    Run(model=model.config, data=Data(seq_len=2048)).save(folder / "run.txt")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "released").mkdir()
    (folder / "released" / "chat_template.jinja").write_text("u:")
    kept = Checkpoints(folder / FOLDER, best=None, strict=True, made_from=[])
    kept.save(0, {"trainable": params}, {})
    kept.close()
    return folder


class Terminal:
    """A program on a terminal of its own, and what it wrote so far, in the pieces that arrived."""

    def __init__(self, argv):
        self.master, terminal = pty.openpty()
        listen = {
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        }  # also below a background job
        ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.program = subprocess.Popen(argv, env=environment(), start_new_session=True, **ends, **listen)
        os.close(terminal)
        self.shown = ""

    def until(self, pattern, seconds=120):
        deadline = time.monotonic() + seconds
        while not regex.search(pattern, self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.master, 1 << 16).decode("utf-8", "replace")
                except OSError:
                    break
        found, self.shown = self.shown, ""
        return found

    def write(self, text):
        os.write(self.master, text.encode())


def test_on_a_terminal_ctrl_c_stops_a_reply_and_then_the_chat(parrot):
    terminal = Terminal(command(parrot, "--temperature", "0", "--max-tokens", "2000"))
    try:
        assert "/help for commands" in terminal.until("> $")
        terminal.write("नमस्ते\n")
        terminal.until("हिन्दी")
        terminal.program.send_signal(signal.SIGINT)
        assert "stopped" in terminal.until("> $")
        terminal.write("/history\n")
        history = terminal.until("> $")
        reply = regex.search(r"assistant: (.*?)\s*> $", history, regex.S)[1]
        assert "user: नमस्ते" in history and len(reply) < 2000
        assert (TEXT * 100).startswith(reply) and regex.findall(r"\X", TEXT * 100)[
            : len(regex.findall(r"\X", reply))
        ][-1] == regex.findall(r"\X", reply)[-1], "whole clusters"
        time.sleep(0.5)  # readline misses a signal that comes between its prompt and its wait for keys
        terminal.program.send_signal(signal.SIGINT)
        assert terminal.program.wait(30) == 0
    finally:
        terminal.program.kill()
        os.close(terminal.master)


def test_replies_come_in_whole_clusters(parrot, lmx, monkeypatch):
    parts = []

    class Shown(io.StringIO):
        def write(self, text):
            parts.append(text)
            return super().write(text)

    monkeypatch.setattr(sys, "stdin", io.StringIO("नमस्ते\n"))
    monkeypatch.setattr(sys, "stdout", Shown())
    cli.main(["chat", str(parrot), "--temperature", "0", "--max-tokens", "200"])
    parts = [part for part in parts if part]
    assert "".join(parts).startswith(TEXT) and len(parts) > 20
    assert [c for part in parts for c in regex.findall(r"\X", part)] == regex.findall(r"\X", "".join(parts))
