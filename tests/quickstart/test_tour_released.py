"""The tour with a released model: skipped while it is out of reach, taken up when it comes, then kept."""

import pytest

from lmx.quickstart import CHAPTERS, Tour, take

pytestmark = pytest.mark.real


def test_a_real_model_is_taken_up_when_it_comes(smollm2, offline, options, tmp_path, monkeypatch):
    monkeypatch.setenv("LMX_CACHE", str(tmp_path / "cache"))

    def once():
        said: list[str] = []
        tour = Tour(tmp_path / "out", options, said.append)
        page = take(tour, CHAPTERS).read_text(encoding="utf-8")
        return tour.facts["released"], page, sum("(kept)" in line for line in said)

    facts, _, _ = once()
    assert "skipped" in facts
    (tmp_path / "cache" / "packages" / smollm2.name).symlink_to(smollm2)
    facts, page, n_kept = once()
    assert n_kept == len(CHAPTERS) - 3  # the next two look at it too
    assert facts["about"]["family"] == "llama" and "8,192 tokens" in facts["about"]["context"]
    capital, people = facts["talks"]["English"]
    assert "New Delhi" in capital["text"] and "New Delhi" in people["text"] and "New Delhi" in page
    english = {name: x["bits_per_byte"]["value"] for name, x in facts["languages"]["English"].items()}
    assert english["released"] < english["yours"]  # which has seen six batches
    again, _, n_kept = once()
    assert again == facts and n_kept == len(CHAPTERS) - 1  # but what is still out of reach
