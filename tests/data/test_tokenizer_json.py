"""A tokenizer.json that others made, or that is damaged or hostile."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lmx.data.tokenizer import (
    Byte,
    File,
    Tokenizer,
)

MINIMAL = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"},
}  # fmt: skip
WORD_PIECE = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "holds a JSON list"), ("{}", "has no 'model'"),
     ('{"model": {"type": "Nope"}}', "no tokenizer that tokenizers .* knows"),
     ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "no tokenizer that .* knows")],
)  # fmt: skip
def test_a_broken_file_is_named(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json {message}|tokenizer\.json is JSON, but {message}"
    ) as error:
        Tokenizer.load(path)
    assert "save_pretrained" in str(error.value), "the way out"


def tokenizer_json(tmp_path, **parts):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(MINIMAL | parts))
    return path


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?", **WORD_PIECE}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA"}},
        {
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False
            }
        },
    ],
    ids=["word", "wordpiece", "unigram", "panic of a map", "panic of a pattern"],
)  # fmt: skip
def test_a_text_that_a_file_cannot_encode_is_a_value_error_with_the_path(parts, tmp_path):
    tokenizer = Tokenizer.load(tokenizer_json(tmp_path, **parts))
    for encode in (tokenizer.encode, tokenizer.spans):
        with pytest.raises(
            ValueError, match=r"tokenizer\.json cannot encode this text \(.+\); mend the file"
        ):
            encode("a" * 60 + "b")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has an empty vocabulary"),
        ({"model": []}, "is JSON, but no tokenizer"),
        ({"added_tokens": [5]}, "is JSON, but no tokenizer"),
        (
            {"decoder": {"type": "Replace", "pattern": {"Regex": "(?~abc)"}, "content": ""}},
            "is JSON, but no tokenizer",
        ),
    ],
)
def test_a_file_of_another_shape_is_a_value_error_with_the_path(parts, told, tmp_path):
    with pytest.raises(ValueError, match=rf"tokenizer\.json {told}"):
        Tokenizer.load(tokenizer_json(tmp_path, **parts))


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_that_would_take_gigabytes_is_refused_before_the_library_sees_it(place, tmp_path):
    huge = 4_000_000_000
    added = {"id": huge, "content": "b", "special": False, "lstrip": False, "rstrip": False}
    parts = {
        "vocab": {"model": MINIMAL["model"] | {"vocab": {"<unk>": 0, "a": huge}}},
        "added_tokens": {"added_tokens": [added | {"normalized": False, "single_word": False}]},
    }[place]
    with pytest.raises(ValueError, match=r"tokenizer\.json: token id 4000000000 is not below 16,777,216"):
        Tokenizer.load(tokenizer_json(tmp_path, **parts))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('{"eos_token": ["a"]}', r"config\.json: eos_token is \['a'\]; use a string"),
        ('{"eos_token": {"x": 1}}', r"config\.json: eos_token is {'x': 1}; use a string"),
        ("[" * 100_000, r"config\.json is not JSON"),
    ],
    ids=["list", "object", "deep"],
)
def test_a_broken_config_is_named(config, told, tmp_path):
    tokenizer_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=told):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "t.json"):
        with pytest.raises(FileNotFoundError, match=r"give a tokenizer\.json or the folder"):
            Tokenizer.load(path)


def foreign(model, tmp_path, specials=(), **parts):
    """A folder as HF's save_pretrained writes it."""
    rust = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(rust, name, part)
    rust.add_special_tokens(list(specials))
    rust.enable_truncation(2)
    rust.enable_padding(length=8)
    rust.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_foreign_file_neither_cuts_nor_pads(tmp_path):
    model = models.WordLevel({"a": 0, "[UNK]": 1, "[PAD]": 2}, unk_token="[UNK]")
    path = foreign(model, tmp_path, ["[PAD]"], pre_tokenizer=pre_tokenizers.Whitespace())
    assert Tokenizer.load(path).encode("a a a a") == [0, 0, 0, 0]


def test_a_foreign_file_leaves_nothing_to_chance(tmp_path):
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)
    tokenizer = Tokenizer.load(foreign(model, tmp_path))
    assert tokenizer.encode("ab" * 50) == [2] * 50
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode("ab" * 50) == [2] * 50


def test_a_foreign_unigram_spells_special_tokens_as_text(tmp_path):
    """Such models keep special tokens among the pieces, with the best score: the library alone gives id 1."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((char, -3.0) for char in "<>/sa")]
    path = foreign(models.Unigram(pieces, unk_id=2), tmp_path, ["<pad>", "</s>", "<unk>"])
    tokenizer = Tokenizer.load(path)
    assert [tokenizer.token(i) for i in tokenizer.encode("a</s>a")] == list("a</s>a")
    assert tokenizer.encode_batch(["a", "</s></s>"]) == [[7], [3, 5, 6, 4] * 2]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (1, None, 2)


def test_token_bytes_follow_the_files_decoder(tmp_path):
    decoders = tokenizers.decoders
    wordpiece = models.WordPiece({"[UNK]": 0, "un": 1, "##known": 2}, unk_token="[UNK]")
    tokenizer = Tokenizer.load(foreign(wordpiece, tmp_path, decoder=decoders.WordPiece("##")))
    assert [tokenizer.token_bytes(i) for i in (1, 2)] == [b" un", b"known"]
    metaspace = models.BPE(
        vocab={"<unk>": 0, "<0xE0>": 1, "\u2581क": 2}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    llama = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer.load(foreign(metaspace, tmp_path, decoder=llama))
    assert [tokenizer.token_bytes(i) for i in (1, 2)] == [b"\xe0", " क".encode()]
    assert tokenizer.decode([2, 2]) == "क क"
    assert not tokenizer.lossless


def test_roles_come_from_the_config_beside_the_file(tmp_path):
    model = models.WordLevel({"a": 0, "<s>": 1, "<end>": 2, "<unk>": 3}, unk_token="<unk>")
    path = foreign(model, tmp_path, ["<s>", "<end>"])
    config = {"bos_token": None, "eos_token": {"content": "<end>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
    with pytest.raises(ValueError, match=r"could not say what the bos_token is; save to a folder"):
        tokenizer.save(tmp_path / "alone.json")
    tokenizer.save(tmp_path / "both")
    assert Tokenizer.load(tmp_path / "both").hash == tokenizer.hash
    (path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(ValueError, match="eos_token '<stop>' is not in the vocabulary"):
        Tokenizer.load(path)


def test_a_file_is_fingerprinted_by_its_content(tmp_path):
    Byte().train().save(tmp_path / "a")
    Byte().train().save(tmp_path / "b")
    assert File(str(tmp_path / "a")).fingerprint() == File(str(tmp_path / "b")).fingerprint()
    Byte("NFC").train().save(tmp_path / "b")
    assert File(str(tmp_path / "a")).fingerprint() != File(str(tmp_path / "b")).fingerprint()
