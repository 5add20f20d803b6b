import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from lmx.train.live import Live, host_bytes, memory


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def write(live, clock, steps, **more):
    for step in steps:
        clock.now += 1.0
        live.write(step, {"loss": 3.0, "tokens_per_sec": 41234.0, "lr": 3e-4, "skipped": 0} | more)


def test_in_a_log_it_prints_a_line_every_so_often_and_one_at_the_end():
    clock, log = Clock(), io.StringIO()
    live = Live(100, console=Console(file=log, width=40), every_seconds=10.0, clock=clock)
    write(live, clock, range(1, 26))
    assert [int(n) for n in re.findall(r"step (\d+)/100", log.getvalue())] == [10, 20]
    live.close()
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and lines[2].startswith("step 25/100  25 %  loss 3  lr 0.0003  41.2k tokens/s")
    assert lines[2].endswith("0:00:25, 0:01:15 left")
    assert "\x1b" not in log.getvalue()


def test_an_evaluation_is_printed_at_once_with_its_step():
    clock, log = Clock(), io.StringIO()
    live = Live(100, console=Console(file=log), every_seconds=1e9, clock=clock)
    write(live, clock, range(1, 4))
    live.write(3, {"valid/loss": 3.25, "valid/hindi/loss": 2.5})
    assert "valid 3.25 at 3  valid hindi 2.5 at 3" in log.getvalue()
    before = log.getvalue()
    live.close()
    assert log.getvalue() == before


def test_the_loss_is_an_unbiased_average_and_a_nan_is_shown_but_not_averaged():
    clock = Clock()
    live = Live(100, console=Console(file=io.StringIO()), smoothing=0.5, clock=clock)
    live.write(1, {"loss": 4.0})
    assert "loss 4  " in live.line()
    live.write(2, {"loss": 1.0})
    assert "loss 2  " in live.line()
    live.write(3, {"loss": float("nan"), "skipped": 1, "mfu": 0.412})
    assert "loss 2  latest loss nan  MFU 41.2 %  skipped 1" in live.line()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal_it_stays_in_place_with_a_bar_and_leaves_the_cursor_as_it_was():
    import pty

    ours, theirs = pty.openpty()
    clock = Clock()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        console = Console(
            file=terminal, force_terminal=True, width=110, height=20, _environ={"TERM": "xterm-256color"}
        )
        live = Live(200, title="हिन्दी [base]", console=console, clock=clock)
        write(live, clock, range(1, 51), mfu=0.4)
        live.write(50, {"valid/loss": 3.5})
        live.close()
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(ours)
    text = shown.decode("utf-8")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "हिन्दी [base]" in plain and "step 50 of 200" in plain and "━" in plain
    assert "0:00:50, 0:02:30 left" in plain
    assert "loss 3   valid 3.5 at 50   lr 0.0003   41.2k tokens/s   MFU 40.0 %" in plain
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_run_that_fails_before_its_first_step_closes_quietly():
    log = io.StringIO()
    Live(10, console=Console(file=log)).close()
    assert log.getvalue() == ""


def test_memory_is_that_of_this_process():
    code = "import os; from lmx.train.live import host_bytes; a = host_bytes(); b = os.urandom(64 << 20)"
    fresh = subprocess.run(
        [sys.executable, "-c", f"{code}; print(host_bytes() - a)"], stdout=subprocess.PIPE, check=True
    )
    assert int(fresh.stdout) >= 60 << 20
    assert host_bytes() > 10 << 20
    assert re.fullmatch(r"\d+\.\d GiB", memory()["host"])
