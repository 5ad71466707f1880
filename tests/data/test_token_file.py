import json

import pytest
import torch

from seqkern.data import TokenFile, embedded_text, is_token_file, train_tokenizer, write_token_file
from seqkern.data.token_file import refuse_cut_token_file
from seqkern.errors import UserError

TEXT = embedded_text()[:20_000]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def token_file(text_file, tmp_path):
    path = tmp_path / "tokens.bin"
    write_token_file(text_file, train_tokenizer("char", TEXT), path)
    return path


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_file_holds_tokens_tokenizer_and_measures(text_file, tmp_path, kind):
    tokenizer = train_tokenizer(kind, TEXT, 600)
    write_token_file(text_file, tokenizer, tmp_path / "tokens.bin")
    made = TokenFile(tmp_path / "tokens.bin")
    ids = torch.tensor(tokenizer.encode(TEXT))
    assert made.tokens.dtype == torch.uint16
    torch.testing.assert_close(made.tokens.long(), ids)
    assert made.tokenizer.vocabulary() == tokenizer.vocabulary()
    assert made.characters == len(TEXT)
    p = torch.bincount(ids)[torch.bincount(ids) > 0].double() / len(ids)
    assert made.unigram_entropy == pytest.approx(float(-(p * p.log()).sum()))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["text.txt", "tokens.bin"]


def test_large_vocabularies_take_wider_tokens(tmp_path):
    text = "".join(chr(0x1000 + i) for i in range(70_000) if not 0xC800 <= i < 0xD000)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer("char", text)
    assert tokenizer.vocab_size > 1 << 16
    write_token_file(path, tokenizer, tmp_path / "tokens.bin")
    tokens = TokenFile(tmp_path / "tokens.bin").tokens
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == list(range(len(text)))


def test_digest_tells_files_apart(text_file, token_file, tmp_path):
    again = tmp_path / "again.bin"
    write_token_file(text_file, train_tokenizer("char", TEXT), again)
    assert TokenFile(again).digest == TokenFile(token_file).digest
    text_file.write_text(TEXT[:-1] + TEXT[0], encoding="utf-8")
    write_token_file(text_file, train_tokenizer("char", TEXT), again)
    assert TokenFile(again).digest != TokenFile(token_file).digest


def test_what_is_no_token_file_is_known(token_file, text_file, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert is_token_file(token_file)
    assert not any(is_token_file(tmp_path / name) for name in ("text.txt", "empty", "no", "."))
    with pytest.raises(UserError, match=r"text.txt is not a token file"):
        TokenFile(text_file)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        TokenFile(tmp_path / "no")


def changed_vocabulary(raw):
    start = raw.index(b'{"dtype"')
    described = json.loads(raw[start:-16])
    described["tokenizer"]["vocabulary"] = described["tokenizer"]["vocabulary"][::-1]
    encoded = json.dumps(described).encode()
    return raw[:start] + encoded + len(encoded).to_bytes(8, "little") + raw[-8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[100:],
        lambda raw: raw[:100] + raw,
        lambda raw: raw[-16:],
        lambda raw: raw[:-16] + b"\xff" * 8 + raw[-8:],
        lambda raw: raw.replace(b'"tokens"', b'"tukens"'),
        changed_vocabulary,
    ],
    ids=["start-cut", "longer", "only-end", "length", "key", "vocabulary"],
)
def test_damage_is_named(token_file, damage):
    token_file.write_bytes(damage(token_file.read_bytes()))
    with pytest.raises(UserError, match=r"tokens.bin is damaged"):
        TokenFile(token_file)


@pytest.mark.parametrize("size", [-1, -16, 40_000, 5_001, 3])
def test_without_its_end_it_is_called_cut_short(token_file, size):
    token_file.write_bytes(token_file.read_bytes()[:size])
    for open_it in (TokenFile, refuse_cut_token_file):
        with pytest.raises(UserError, match=r"tokens.bin: token file cut short"):
            open_it(token_file)


@pytest.mark.parametrize(
    "raw",
    [b"", b"text", "caf\u00e9".encode("latin-1"), b"a null \0 in a text", "text".encode("utf-16")],
)
def test_other_files_are_not(tmp_path, raw):
    (tmp_path / "file").write_bytes(raw)
    refuse_cut_token_file(tmp_path / "file")
    refuse_cut_token_file(tmp_path / "no")


def test_verify_names_what_is_wrong(token_file):
    TokenFile(token_file).verify()
    whole = token_file.read_bytes()
    token_file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(UserError, match=r"tokens.bin is damaged: its tokens are not those"):
        TokenFile(token_file).verify()
    TokenFile(token_file).check_ids(TokenFile(token_file).tokens[:200].long())
    token_file.write_bytes(whole[:200] + b"\xff\xfe" + whole[202:])
    message = (
        r"tokens.bin is damaged: id 65279 at token 100 \(byte 200\) is outside its voc.* of \d+"
    )
    with pytest.raises(UserError, match=message):
        TokenFile(token_file).verify()
    with pytest.raises(UserError, match=message):
        TokenFile(token_file).check_ids(TokenFile(token_file).tokens[:200].long())


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"ab \xff", "byte 0xff at offset 3"), (b"ab \xc3\xa9", "unknown character '\u00e9'")],
)
def test_file_appears_whole_or_stays_what_it_was(tmp_path, raw, message):
    (tmp_path / "text.txt").write_bytes(raw)
    (tmp_path / "tokens.bin").write_bytes(b"before")
    with pytest.raises(UserError, match=message):
        write_token_file(
            tmp_path / "text.txt", train_tokenizer("char", "ab "), tmp_path / "tokens.bin"
        )
    assert (tmp_path / "tokens.bin").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 2


def test_full_disk_is_the_users_error(text_file, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqkern.data.token_file.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*tokens.bin: No space left on device"):
        write_token_file(text_file, train_tokenizer("char", TEXT), tmp_path / "tokens.bin")
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]
