"""Progress of long readings: lines in a log, one line in place on a terminal, nothing for a short one."""

import io

from lmx.cli.progress import Progress, Steps

DOCUMENTS = [{"text": "क" * 1000}] * 3  # 3000 bytes of UTF-8 each


def test_a_log_gets_lines_with_bytes_of_text():
    log = io.StringIO()
    with Progress(log, quiet_seconds=0, every_seconds=0) as progress:
        assert list(progress.watch(DOCUMENTS, "reading", 12_000)) == DOCUMENTS
    lines = log.getvalue().splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        "reading: 3.0 kB of 12.0 kB (25 %)",
        "reading: 6.0 kB of 12.0 kB (50 %)",
        "reading: 9.0 kB of 12.0 kB (75 %)",
    ]


def test_a_short_reading_is_silent():
    log = io.StringIO()
    with Progress(log) as progress:
        list(progress.watch(DOCUMENTS, "reading", None))
    assert log.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_keeps_one_line_which_is_removed():
    terminal = Terminal()
    with Progress(terminal, quiet_seconds=0) as progress:
        progress("train", 5_000_000, None)
    written = terminal.getvalue()
    assert written.startswith("\rtrain: 5.0 MB, ") and "\n" not in written
    assert written.endswith("\r") and not written.split("\r")[-2].strip()


def test_short_steps_are_silent_and_long_ones_tell_what_is_left(capsys):
    with Steps("prompts") as steps:
        steps(1, 4)
        assert capsys.readouterr().err == ""
        steps._began, steps._next = steps._began - 30, steps._began
        steps(2, 4)
        steps(3, 4)  # too soon for another line
    assert capsys.readouterr().err == "prompts: 2 of 4, about 30 s left\n"
