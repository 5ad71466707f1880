"""Token files: a text as integers, mapped into memory rather than read, larger than it if need be.

    uint16 or int32 tokens, little-endian, from offset 0
    JSON: the tokenizer, the number of tokens and characters, digests, entropy
    its length, uint64 little-endian
    8 bytes that say what the file is

What is only known at the end stands at the end, so a file is written in one go.
"""

import codecs
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from seqkern.data.text import text_chunks
from seqkern.data.tokenizers import Tokenizer, dump_tokenizer, parse_tokenizer
from seqkern.errors import UserError, require
from seqkern.files import sync_folder

_MAGIC = b"SEQKTOK1"
_TAIL = 8 + len(_MAGIC)
_PIECE = 1 << 20  # tokens read at once
_HEAD = 1 << 16  # bytes that show what a file is
_DTYPES = {"uint16": "<u2", "int32": "<i4"}


class TokenFile:
    """The tokens of a file that `write_token_file` (`seqkern prepare`) made.

    Opening reads the description at the end alone, and checks that the file is as long as it says;
    the tokens come from the disk as they are used. `verify` reads them all.

    Args:
        path: the file.

    Attributes:
        tokens: uint16 or int32 [N], mapped read-only: never write to it.
        tokenizer: what made them.
        characters: of the text.
        unigram_entropy: of the tokens, nats per token.
        digest: SHA-256 of the tokens.

    Raises:
        UserError: no token file, or a damaged one.

    Example:
        >>> Path("cat.txt").write_text("a cat, a cat")
        12
        >>> tokenizer = train_tokenizer("word", "a cat, a cat")
        >>> write_token_file("cat.txt", tokenizer, "cat.bin")
        >>> TokenFile("cat.bin").tokens[:3].tolist()
        [3, 1, 4]
    """

    def __init__(self, path: str | Path) -> None:
        """See the class."""
        described = _describe(Path(path))
        self.path = Path(path)
        self.tokenizer = parse_tokenizer(described["tokenizer"], self.path)
        self.characters: int = described["characters"]
        self.unigram_entropy: float = described["unigram_entropy"]
        self.digest: str = described["sha256"]
        N = described["tokens"]
        # A map cannot be empty.
        mapped = (
            np.memmap(self.path, dtype=_DTYPES[described["dtype"]], mode="r", shape=(N,))
            if N
            else np.zeros(0, dtype=_DTYPES[described["dtype"]])
        )
        with warnings.catch_warnings():  # that it is read-only is the point
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.tokens: Tensor = torch.from_numpy(mapped)  # [N]

    def verify(self) -> None:
        """Read the file once, and compare it with what was written.

        It takes some two seconds per GB, most of them for the SHA-256, and no memory.

        Raises:
            UserError: an id outside the vocabulary, or other tokens than were written.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), _PIECE):
            ids = self.tokens[start : start + _PIECE].numpy()
            self._check(ids, start)
            digest.update(ids.data)
        require(
            digest.hexdigest() == self.digest,
            f"{self.path} is damaged: its tokens are not those that were written (SHA-256)",
        )

    def check_ids(self, ids: Tensor) -> None:
        """Raise `UserError` for integers of the file that are outside its vocabulary."""
        V = self.tokenizer.vocab_size
        if ids.numel() == 0 or (int(ids.max()) < V and int(ids.min()) >= 0):
            return
        self.verify()  # says where the first in the file is
        raise UserError(f"{self.path} is damaged: an id is outside its vocabulary of {V}")

    def _check(self, ids: Any, start: int) -> None:
        """`check_ids` of an array that stands at `start`."""
        V = self.tokenizer.vocab_size
        if ids.max() < V and ids.min() >= 0:
            return
        wrong = int(((ids < 0) | (ids >= V)).argmax())
        place = start + wrong
        raise UserError(
            f"{self.path} is damaged: id {ids[wrong]} at token {place} (byte "
            f"{place * ids.itemsize}) is outside its vocabulary of {V}"
        )


def is_token_file(path: str | Path) -> bool:
    """Whether a file ends as a token file does; False for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(len(_MAGIC), file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read() == _MAGIC
    except OSError:
        return False


def refuse_cut_token_file(path: str | Path) -> None:
    """Raise `UserError` for a token file without its end, which would pass for a text.

    Small ids have null bytes between them, which texts do not hold: a tenth of the first 64 KiB,
    or any where those are not UTF-8. A file that cannot be read is left to whoever reads it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return
    nulls = head.count(0)
    if nulls == 0 or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        text = nulls < len(head) / 10
    except UnicodeDecodeError:
        text = False
    require(
        text,
        f"{path}: token file cut short or changed at its end (or no UTF-8 text: of its first "
        f"{len(head):,} bytes {nulls:,} are null)",
    )


def write_token_file(
    text: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Encode a text file into a token file, a piece at a time.

    `out` appears when it is whole: until then, and after an error, there is what was there before.

    Args:
        text: a UTF-8 file of any size.
        tokenizer: made from it, or from a text with the same characters.
        out: the file to write.
        on_bytes: called with the number of bytes of text read each time.

    Raises:
        UserError: the text cannot be read, is not UTF-8, or has a character without an id; or the
            disk refused.
    """
    out = Path(out)
    beside = out.with_name(f".{out.name}.new")
    try:
        with open(beside, "wb") as file:
            _write(file, text, tokenizer, on_bytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def _write(
    file: IO[bytes],
    text: str | Path,
    tokenizer: Tokenizer,
    on_bytes: Callable[[int], object] | None,
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    digest = hashlib.sha256()
    characters = 0
    for chunk in text_chunks(text, on_bytes=on_bytes):
        try:
            ids = np.array(tokenizer.encode(chunk), dtype=_DTYPES[dtype])
        except UserError as error:
            raise UserError(f"{text}, from character {characters} on: {error}") from error
        raw = ids.tobytes()
        file.write(raw)
        digest.update(raw)
        counts += np.bincount(ids, minlength=len(counts))
        characters += len(chunk)
    N = int(counts.sum())
    p = counts[counts > 0] / max(N, 1)
    described = {
        "dtype": dtype,
        "tokens": N,
        "characters": characters,
        "sha256": digest.hexdigest(),
        "unigram_entropy": float(-(p * np.log(p)).sum()),
        "tokenizer": dump_tokenizer(tokenizer),
    }
    encoded = json.dumps(described).encode()
    file.write(encoded + len(encoded).to_bytes(8, "little") + _MAGIC)


def _describe(path: Path) -> dict[str, Any]:
    """The parsed JSON, checked against the file's size."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            if tail[8:] != _MAGIC:
                refuse_cut_token_file(path)
            require(tail[8:] == _MAGIC, f"{path} is not a token file of `seqkern prepare`")
            length = min(int.from_bytes(tail[:8], "little"), size - _TAIL)
            file.seek(size - _TAIL - length)
            encoded = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        described: dict[str, Any] = json.loads(encoded)
        width = np.dtype(_DTYPES[described["dtype"]]).itemsize
        whole = described["tokens"] * width + length + _TAIL == size
        described["tokenizer"], int(described["characters"])
        float(described["unigram_entropy"]), str(described["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its description cannot be read") from error
    require(whole, f"{path} is damaged: token file cut short, or longer than it was written")
    return described
