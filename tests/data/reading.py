"""Sources read to their end, for tests."""

from lmx.data.tally import Report

HINDI = "नमस्ते दुनिया। क्षत्रिय और ज्ञानी हिन्दी में लिखते हैं।"


def whole(documents):
    """Documents as texts, with their parts joined."""
    texts, held = [], ""
    for document in documents:
        held += document["text"]
        if not document.get("more"):
            texts.append(held)
            held = ""
    assert held == "", "the last part closes its document"
    return texts


def read(src):
    report = Report()
    return whole(src.documents(report)), report
