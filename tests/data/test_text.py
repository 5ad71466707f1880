import pytest

from seqkern.data import embedded_text, read_text, split_text
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
