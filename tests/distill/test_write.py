"""What a teacher writes for its students: which replies are kept, and that a kill costs nothing that was written."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lmx import cli
from lmx.data import Chat, Report
from lmx.distill import Keep
from lmx.generate import Completion

ROWS = [{"text": f"{'नदी river'.split()[i % 2]} {i}", "n": i} for i in range(70)]


def reply(text, log_p=-1.0, reason="eos", tokens=None):
    tokens = tuple(map(ord, text)) if tokens is None else tokens
    return Completion(text, tokens, reason, (log_p,) * len(tokens))


def test_replies_that_are_no_use_are_left_out_and_counted():
    loop = reply("x", tokens=(1, 2, 3, 4) * 6)
    given = [
        reply(" "),
        reply("cut", reason="length"),
        loop,
        reply("हाँ", -2.0),
        reply("no", -0.5),
        reply("हाँ ", -1.0),
    ]
    kept, out = Keep().of(given)
    assert [x.text for x in kept] == ["no", "हाँ "]  # the likeliest first
    assert out == {"empty_reply": 1, "reply_cut_at_max_tokens": 1, "reply_in_a_loop": 1, "equal_replies": 1}
    assert [x.text for x in Keep(ended=False, loops=1.0).of(given)[0]] == ["no", "cut", "x", "हाँ "]
    assert Keep().of([])[0] == []


def test_one_of_several_is_the_likeliest_or_the_most_frequent():
    given = [reply("a", -3.0), reply("b", -0.1), reply("a", -2.0), reply("c", -0.2), reply("c", -9.0)]
    (best,), out = Keep("likeliest").of(given)
    assert best.text == "b" and out == {"equal_replies": 2, "not_chosen": 2}
    (best,), _ = Keep("vote").of(given)
    assert (best.text, best.logprobs[0]) == ("c", -0.2)  # as often as a, and likelier
    with pytest.raises(ValueError, match="choose='most'; use 'all', 'likeliest', 'vote'"):
        Keep("most")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A command over rows in two scripts; what it makes is in the folder."""
    from lmx.data import Data, Documents
    from lmx.models.presets import llama
    from lmx.run import Run
    from lmx.train import session, standard

    folder = tmp_path_factory.mktemp("write")
    texts = tuple(row["text"] * 3 for row in ROWS)
    data = Data((Documents(texts),), valid_share=0.0, seq_len=64, batch_size=8)
    run = Run(model=llama(16, 1, 2), data=data, steps=2)
    standard.run(session(run, cache=folder / "cache"), folder / "teacher")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    words = ["distill", "write", str(folder / "teacher"), str(rows), "--plain", "--cut", "--keep", "n"]
    return [*words, "--samples", "2", "--max-tokens", "6", "--loops", "1"]


def test_replies_are_conversations_and_a_killed_run_goes_on(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("LMX_CACHE", str(tmp_path / "cache"))
    whole, killed = tmp_path / "पूरा.jsonl", tmp_path / "killed.jsonl"
    cli.main([*asked, "--out", str(whole)])
    rows = [json.loads(line) for line in whole.read_text("utf-8").splitlines()]
    assert len(rows) > 100 and {row["n"] for row in rows} == set(range(70))
    assert all(row["prompt"] == ROWS[row["n"]]["text"] and row["completion"].strip() for row in rows)
    assert sum(1 for _ in Chat(str(whole)).documents(Report())) == len(rows)
    script = textwrap.dedent("""
        import os, signal, sys
        from lmx import cli
        from lmx.distill.lines import Lines
        add = Lines.add
        def dying(self, rows):
            if self.n:  # the second block, of which a part is written
                add(self, rows[:3])
                self._file.write(b'{"prompt": "cut sho')
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, rows)
        Lines.add = dying
        cli.main(sys.argv[1:])
    """)
    words = [*asked, "--out", str(killed)]
    assert subprocess.run([sys.executable, "-c", script, *words], timeout=300).returncode == -9
    part = Path(f"{killed}.part").read_text("utf-8").splitlines()
    assert not killed.exists() and 3 < len(part) < len(rows)
    cli.main(words)
    assert killed.read_text("utf-8") == whole.read_text("utf-8")


def test_what_was_asked_otherwise_is_another_file(asked, tmp_path, capsys):
    out = ["--out", str(tmp_path / "written.jsonl")]
    cli.main([*asked, *out])
    cli.main([*asked, *out])
    for more, said in (
        (["--temperature", "0.5"], "made with another prompt or sampling"),
        (["--template", "Q: {text}"], "made with another prompt or sampling"),
        (["--keep", "n", "prompt"], "rows have a field 'prompt'"),
        (["--samples", "0"], "give at least 1"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*asked, *out, *more])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([word for word in asked if word != "--plain"])
    assert "has no chat template" in capsys.readouterr().err
