import pytest

from seqkern.data import embedded_text, read_text, split_text, train_tokenizer
from seqkern.data.text import text_chunks
from seqkern.errors import UserError


def test_embedded_text_is_english_of_some_length():
    text = embedded_text()
    assert len(text) > 300_000
    assert "The " in text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"a\r\nb\n", "a\r\nb\n"),
        ("\u00e5\u20ac\U0001f600".encode(), "\u00e5\u20ac\U0001f600"),
        (b"\xef\xbb\xbfabc", "abc"),
    ],
)
def test_read_text_keeps_every_character(tmp_path, raw, text):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    assert read_text(path) == text


def test_read_text_names_the_byte_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        read_text(path)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_read_text_reports_what_cannot_be_read(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot read .*: (No such file|Is a directory)"):
        read_text(tmp_path / name)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_split_loses_nothing_and_holds_out_the_end(fraction):
    text = "0123456789" * 10
    training, validation = split_text(text, fraction)
    assert training + validation == text
    assert len(validation) == int(100 * fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_refuses_a_fraction_outside_its_range(fraction):
    with pytest.raises(UserError, match="val_fraction"):
        split_text("abc", fraction)


SAMPLE = embedded_text()[:30_000] + "\r\n\r\n \t x\u00a0y\u2003z caf\u00e9 \U0001f600\n" * 3


@pytest.fixture
def sample_file(tmp_path):
    path = tmp_path / "sample.txt"
    path.write_bytes(SAMPLE.encode())
    return path


@pytest.mark.parametrize("size", [1, 7, 100, 4096, 1 << 20])
def test_chunks_are_the_text(sample_file, size):
    assert "".join(text_chunks(sample_file, size)) == SAMPLE


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_tokens_of_chunks_are_the_tokens_of_the_whole(sample_file, kind):
    chunks = list(text_chunks(sample_file, 200))
    assert len(chunks) > 100
    tokenizer = train_tokenizer(kind, SAMPLE, 500)
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(SAMPLE)
    in_chunks = type(tokenizer).train_on(iter(chunks), 500)
    assert in_chunks.vocabulary() == tokenizer.vocabulary()


def test_text_without_white_space_is_cut_all_the_same(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x" * 1000)
    assert [len(chunk) for chunk in text_chunks(path, 10)] == [80] * 12 + [40]


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_chunks_name_the_byte_that_is_not_utf8(tmp_path, prefix, size):
    path = tmp_path / "bad.txt"
    path.write_bytes(prefix + "ab \u20ac".encode() + b"\xff b")
    with pytest.raises(UserError, match=rf"byte 0xff at offset {len(prefix) + 6}$"):
        list(text_chunks(path, size))


def test_file_that_ends_within_a_character_is_not_utf8(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("ab \u20ac".encode()[:-1])
    with pytest.raises(UserError, match="byte 0xe2 at offset 3"):
        list(text_chunks(path, 4))
