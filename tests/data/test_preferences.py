"""Pairs of replies: every shape of row, what is passed over, and that a pair stays together in one row."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx import values
from lmx.data import Batches, Byte, Chat, Clean, Data, Preferences, Report, Split, prepare
from lmx.data.store import TokenStore, Writer

pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer comes without a chat template")
ASKED = {"role": "user", "content": "भारत की राजधानी?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("नई दिल्ली।", "मुंबई।"))
SYSTEM = {"role": "system", "content": "संक्षेप में।"}
WANTED = ([ASKED, GOOD], [ASKED, BAD])
PROMPT, CHOSEN, REJECTED = ASKED["content"], GOOD["content"], BAD["content"]
EARLIER = [ASKED, BAD, {"role": "user", "content": "सच?"}]

ROWS = [
    ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED, "score": 3}, WANTED),
    ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, WANTED),
    ({"prompt": [ASKED], "chosen": CHOSEN, "rejected": [BAD]}, WANTED),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, WANTED),
    ({"prompt": PROMPT, "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, WANTED),
    (
        {"prompt": PROMPT, "chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]},
        ([SYSTEM, ASKED, GOOD], [SYSTEM, ASKED, BAD]),
    ),
    ({"prompt": EARLIER, "chosen": [GOOD], "rejected": [BAD]}, ([*EARLIER, GOOD], [*EARLIER, BAD])),
    (
        {
            "chosen": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": CHOSEN}],
            "rejected": [ASKED, BAD],
        },
        WANTED,
    ),
    ({"chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, BAD]}, WANTED),
]
USELESS = [
    ({"prompt": "x", "completion": "y"}, "field_missing"),
    ({"prompt": "x", "chosen": "y"}, "field_missing"),
    ({"prompt": "x", "chosen": "y", "rejected": None}, "field_missing"),
    ({"prompt": "x", "chosen": "", "rejected": "y"}, "empty_reply"),
    ({"prompt": "x", "chosen": "y", "rejected": " \n"}, "empty_reply"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "equal_replies"),
    ({"prompt": " ", "chosen": "y", "rejected": "z"}, "empty_text"),
    ({"prompt": 5, "chosen": "y", "rejected": "z"}, "not_text"),
    ({"prompt": "x", "chosen": ["y"], "rejected": "z"}, "field_missing"),
    ({"prompt": "x", "chosen": [{"role": "narrator", "content": "y"}], "rejected": "z"}, "wrong_role"),
    ({"chosen": "y", "rejected": "z"}, "reply_to_nothing"),
    ({"chosen": [ASKED], "rejected": [ASKED]}, "no_reply"),
    ({"chosen": [], "rejected": []}, "no_reply"),
    ({"chosen": [ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}, "different_prompts"),
    ({"chosen": [ASKED, GOOD], "rejected": [EARLIER[2], BAD]}, "different_prompts"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, "different_prompts"),
    ({"prompt": "?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "different_prompts"),
    ({"prompt": "x", "chosen": "half \ud800", "rejected": "y"}, "invalid_unicode"),
]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("i", range(len(ROWS)))
def test_every_shape_of_row_is_read(tmp_path, i, ending):
    row, wanted = ROWS[i]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        write(path, [row])
    report = Report()
    (document,) = Preferences(str(path)).documents(report)
    assert (document["messages"], document["rejected"]) == wanted
    assert report.noted == ({"messages_after_the_last_reply": 1} if i == len(ROWS) - 1 else {})
    assert report.text_bytes == sum(len(m["content"].encode()) for said in wanted for m in said)


@pytest.mark.parametrize("row, reason", USELESS, ids=[f"{i}-{r}" for i, (_, r) in enumerate(USELESS)])
def test_useless_rows_are_counted_and_named(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", [ROWS[0][0], row])
    report = Report()
    assert len(list(Preferences(path).documents(report))) == 1
    assert report.skipped == {reason: 1} and report.examples[reason][0].startswith(f"{path}:2 ")
    with pytest.raises(
        ValueError, match=rf"no usable document(.|\n)*1 {reason.replace('_', ' ')}(.|\n)*'chosen'"
    ):
        list(Preferences(write(tmp_path / "b.jsonl", [row])))


def test_it_is_written_and_read_as_a_setting_and_never_cut():
    data = Data(train=(Preferences("a.jsonl"), Chat("b.jsonl", keep="tail")))
    assert values.parse(values.show(data), Data) == data == values.parse(repr(data), Data)
    with pytest.raises(ValueError, match="would cut replies from their prompts"):
        Data(train=(Preferences("a.jsonl"),), packing="concat")


def test_streams_take_a_pair_as_one_document():
    pairs = [
        {
            "messages": [{"role": r, "content": f"e\u0301\x00 {i}"} for r in ("user", "assistant")],
            "rejected": [{"role": r, "content": f"e\u0301\x00 {i} {r}"} for r in ("user", "assistant")],
            "id": f"d{i}",
        }
        for i in range(500)
    ]
    report = Report()
    cleaned = list(Clean()(pairs, report))
    assert [m["content"] for m in cleaned[7]["rejected"]] == ["é 7 user", "é 7 assistant"]
    assert [m["content"] for m in cleaned[7]["messages"]] == ["é 7", "é 7"]
    assert report.noted == {"control_characters_removed": 2000}
    valid, train = ([d["id"] for d in Split(part, 0.2)(pairs)] for part in ("valid", "train"))
    assert sorted(valid + train) == sorted(d["id"] for d in pairs) and valid and train


# --- rows and batches


def pair_store(path, pairs):
    """Pairs of documents, each a list of (id, whether of a reply)."""
    with Writer(path, 4000, masked=True) as writer:
        writer.facts["keep"] = "pair"
        for document in (document for pair in pairs for document in pair):
            ids, mask = zip(*document)
            writer.add(ids, mask=np.array(mask))
    return TokenStore(str(path))


@given(data=st.data())
def test_pairs_stay_whole_in_one_row_and_each_is_counted_once(tmp_path_factory, data):
    """Against plain loops: every pair that fits lies in one row, chosen before rejected, each label in its mask."""
    lengths = data.draw(
        st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=12).filter(
            lambda drawn: min(2 * p + a + b - 2 for p, a, b in drawn) <= 20
        )
    )
    token = iter(range(4000))
    pairs = [
        [[(next(token), i) for i, n in enumerate((prompt, reply)) for _ in range(n)] for reply in replies]
        for prompt, *replies in lengths
    ]
    seq_len = data.draw(st.integers(min(2 * p + a + b - 2 for p, a, b in lengths), 30))
    store = pair_store(tmp_path_factory.mktemp("s") / "s", pairs)
    batches = Batches((store,), seq_len, 3, seed=data.draw(st.integers(0, 99)), shuffle=False)
    fitting = [pair for pair in pairs if sum(len(document) - 1 for document in pair) <= seq_len]
    found = []
    for batch in batches.once():
        for row in range(3):
            segments = batch["segment_ids"][row]
            assert segments.max() % 2 == 0
            assert batch["pair_mask"][row].sum() == segments.max() // 2
            for s in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == s)
                assert (np.diff(at) == 1).all() and batch["positions"][row, at].tolist() == list(
                    range(len(at))
                )
                masks = [batch[name][row, at] for name in ("loss_mask", "rejected_mask")]
                told, other = masks if s % 2 else masks[::-1]
                assert not other.any()
                found.append((batch["tokens"][row, at], batch["labels"][row, at], told))
                ends = batch["pair_mask"][row, at]
                assert ends.sum() == (s % 2 == 0) and (s % 2 or ends[-1] == 1)
            padding = segments == 0
            for name in ("loss_mask", "rejected_mask", "pair_mask"):
                assert not batch[name][row, padding].any()
    told = [
        [tuple(zip(*map(np.ndarray.tolist, one))) for one in both] for both in zip(found[::2], found[1::2])
    ]
    wanted = [[tuple((a, b, of) for (a, _), (b, of) in pairwise(one)) for one in pair] for pair in fitting]
    assert sorted(told) == sorted(wanted)
    share = sum(of for pair in wanted for one in pair for _, _, of in one) / (batches.n_rows * seq_len)
    assert batches.loss_share == pytest.approx(share)


def test_from_files_to_batches_with_conversations_beside_them(tmp_path):
    rows = [{"prompt": f"प्रश्न {i}?", "chosen": f"हाँ {i}", "rejected": f"नहीं {i}!"} for i in range(30)]
    long = {"prompt": "x" * 300, "chosen": "y", "rejected": "z"}
    same = {"prompt": "x", "chosen": "y\x00", "rejected": "y"}
    pairs = write(tmp_path / "a.jsonl", [*rows, long, same])
    told = write(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": f"r{i}"} for i in range(9)])
    data = Data(
        train=(Preferences(pairs), Chat(told)), valid_share=0.0, tokenizer=Byte(), seq_len=200, batch_size=4
    )
    prepared = prepare(data, tmp_path / "cache")
    assert prepared.report.skipped == {"equal_replies": 1, "pairs_too_long": 1}
    assert prepared.report.noted == {"control_characters_removed": 1, "plain_chat_template": 1}
    learned = {"loss_mask": [], "rejected_mask": []}
    n_pairs = 0
    for batch in prepared.train.once():
        assert batch["tokens"].shape == batch["pair_mask"].shape == (4, 200)
        n_pairs += int(batch["pair_mask"].sum())
        for name, texts in learned.items():
            for labels, mask, segments in zip(batch["labels"], batch[name], batch["segment_ids"]):
                for s in np.unique(segments[mask > 0]):
                    texts.append(prepared.tokenizer.decode(labels[(mask > 0) & (segments == s)]))
    assert n_pairs == 30
    assert sorted(learned["loss_mask"]) == sorted(
        [row["chosen"] for row in rows] + [f"r{i}" for i in range(9)]
    )
    assert sorted(learned["rejected_mask"]) == sorted(row["rejected"] for row in rows)
    alone = prepare(Data(train=(Chat(told),), valid_share=0.0, seq_len=200, batch_size=4), tmp_path / "cache")
    assert "pair_mask" not in alone.train.batch(0)
