"""What is written beside a run's results is enough to have its code again."""

import subprocess

from lmx.train.record import _uncommitted


def test_uncommitted_changes_and_new_modules_apply_to_the_commit(tmp_path):
    def git(*command, at):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=at, check=True)

    here, there = tmp_path / "here", tmp_path / "there"
    package = here / "lmx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n\n", encoding="utf-8")
    git("init", "-q", ".", at=here)
    git("add", ".", at=here)
    git("commit", "-qm", "first", at=here)
    git("clone", "-q", "here", "there", at=tmp_path)
    assert _uncommitted(package) == ""
    (package / "__init__.py").write_text("a = 2\n\n", encoding="utf-8")
    (package / "नया.py").write_text("शब्द = 'नमस्ते'\n\nb = 3", encoding="utf-8")
    (package / "notes.txt").write_text("not code", encoding="utf-8")
    (tmp_path / "diff").write_text(_uncommitted(package), encoding="utf-8")
    git("apply", "../diff", at=there)
    for name, text in (("__init__.py", "a = 2\n\n"), ("नया.py", "शब्द = 'नमस्ते'\n\nb = 3\n")):
        assert (there / "lmx" / name).read_text(encoding="utf-8") == text
    assert not (there / "lmx" / "notes.txt").exists()
