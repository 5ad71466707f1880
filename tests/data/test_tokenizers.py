import json
import random

import pytest

from seqkern.data import (
    BpeTokenizer,
    CharTokenizer,
    WordTokenizer,
    embedded_text,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from seqkern.data.tokenizers import UNKNOWN_WORD
from seqkern.errors import UserError

KINDS = ["char", "word", "bpe"]
TEXT = embedded_text()[:40_000]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return train_tokenizer(request.param, TEXT, max_vocab=1000)


@pytest.mark.parametrize("seed", range(5))
def test_decode_undoes_encode_on_any_excerpt(seed):
    rng = random.Random(seed)
    # With room for every word that occurs twice; the words of a doubled text all do.
    doubled = TEXT + TEXT
    start = rng.randrange(len(TEXT))
    excerpt = TEXT[start : start + 3000]
    for kind in ("char", "bpe"):
        made = train_tokenizer(kind, TEXT, max_vocab=600)
        assert made.decode(made.encode(excerpt)) == excerpt
    words = WordTokenizer.train(doubled, max_vocab=100_000)
    whole = excerpt[excerpt.index(" ") : excerpt.rindex(" ")]  # a cut word is another word
    assert words.decode(words.encode(whole)) == whole


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "  a", "a  b", "\n\n a\t", "a,b;c", "a_b 1.5", "  \n  x", "tail  ", "\r\nx"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_white_space_and_punctuation_come_back_exactly(kind, text):
    made = train_tokenizer(kind, f"{text}|{text}|", max_vocab=400)
    assert made.decode(made.encode(text)) == text


def test_ids_are_in_the_vocabulary(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert min(ids) >= 0
    assert max(ids) < tokenizer.vocab_size


def test_what_is_loaded_encodes_as_what_was_saved(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.vocab_size == tokenizer.vocab_size
    ids = tokenizer.encode(TEXT)
    assert loaded.encode(TEXT) == ids
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_char_vocabulary_is_the_sorted_alphabet():
    made = CharTokenizer.train("banana\n")
    assert made.vocabulary() == "\nabn"
    assert made.encode("nab") == [3, 1, 2]


def test_word_vocabulary_keeps_the_most_frequent_that_occur_twice():
    made = WordTokenizer.train("x y y z z z w", max_vocab=100)
    assert made.vocabulary() == [UNKNOWN_WORD, " ", "z", "y"]
    assert made.decode(made.encode("q z y w")) == f"{UNKNOWN_WORD} z y {UNKNOWN_WORD}"


def test_word_vocabulary_is_cut_at_its_largest_size():
    assert WordTokenizer.train("x y y z z z w", max_vocab=3).vocabulary() == ["<unk>", " ", "z"]


def test_counting_words_takes_bounded_memory_and_keeps_the_frequent():
    chunks = [f"often rare{n} often " for n in range(1000)]
    made = WordTokenizer.train_on(iter(chunks), max_vocab=10, max_counted=20)
    assert made.vocabulary() == [UNKNOWN_WORD, " ", "often"]
    twice = WordTokenizer.train_on([*chunks, *chunks], max_vocab=10_000)
    assert twice.vocab_size == 3 + 1000
    # Where there is no room to remember it, a word that comes again is new.
    forgotten = WordTokenizer.train_on([*chunks, *chunks], max_vocab=10_000, max_counted=20)
    assert forgotten.vocabulary()[:3] == [UNKNOWN_WORD, " ", "often"]
    assert forgotten.vocab_size < 3 + 20


def test_unknown_word_costs_neither_its_space_nor_a_whitespace_run():
    made = WordTokenizer.train("a b, \n", max_vocab=50)
    assert made.decode(made.encode("zz \n\n  zz,zz")) == "<unk> \n\n  <unk>,<unk>"


@pytest.mark.parametrize(
    ("kind", "text", "position"),
    [("char", "ab\u2603b", 2), ("word", "ab \u2603b", 3), ("word", "ab  \u2603", 4)],
)
def test_unknown_character_is_named_with_its_position(kind, text, position):
    made = train_tokenizer(kind, "ab ab", max_vocab=50)
    with pytest.raises(UserError, match=rf"'\u2603' \(U\+2603\) at position {position}"):
        made.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_undecodable_byte_of_a_command_line_is_named(kind):
    made = train_tokenizer(kind, "ab ab", max_vocab=300)
    with pytest.raises(UserError, match=r"U\+DCFF\) at position 1"):
        made.encode("a\udcff")


@pytest.mark.parametrize(("kind", "smallest"), [("word", 3), ("bpe", 256)])
def test_vocabulary_that_cannot_hold_the_characters_is_refused(kind, smallest):
    train_tokenizer(kind, "a b, c", max_vocab=smallest)
    with pytest.raises(UserError, match=f"vocab_size must be at least {smallest}"):
        train_tokenizer(kind, "a b, c", max_vocab=smallest - 1)


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="tokenizer must be one of char, word, bpe, got bytes"):
        train_tokenizer("bytes", "abc")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-20],
        lambda raw: raw.replace(b"abc", b"abd"),
        lambda raw: json.dumps(["char"]).encode(),
        lambda raw: b"",
        lambda raw: b"\xff" + raw,
    ],
    ids=["cut", "changed", "list", "empty", "not-utf8"],
)
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(CharTokenizer("abc"), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        load_tokenizer(path)


def test_bpe_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'seqkern\[bpe\]'"):
        BpeTokenizer.train("abc", 300)
