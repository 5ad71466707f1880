"""Where the text comes from: the one every Python carries, or the user's file."""

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from seqkern.errors import UserError, require


def embedded_text() -> str:
    """Python's language reference as `pydoc_data.topics` holds it: real English, no download.

    Example:
        >>> len(embedded_text()) > 300_000
        True
    """
    return "\n\n".join(topics.values())


def read_text(path: str | Path) -> str:
    """The characters of a UTF-8 file, line ends as they are, without a byte-order mark.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 (the message gives the byte).
    """
    return "".join(text_chunks(path))


# A cut before a lone space or line end leaves the tokens of all tokenizers whole: it starts a piece
# of words and of byte pairs alike, whatever follows it.
_CUTS = re.compile(r"\S\s(?=\S)")


def text_chunks(
    path: str | Path, size: int = 1 << 20, on_bytes: Callable[[int], object] | None = None
) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about `size` bytes, for files larger than memory.

    Tokens of the pieces, one after the other, are the tokens of the whole: a piece ends before the
    last white-space character that stands alone. Only where `8 size` bytes have none is a piece
    cut elsewhere, perhaps within a word.

    Args:
        path: the file.
        size: bytes read at once.
        on_bytes: called with the number of bytes read each time.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 (the message gives the byte).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, kept = 0, ""
    try:
        with open(path, "rb") as file:
            while raw := file.read(size):
                text = _decoded(decoder, raw, path, offset)
                text = kept + (text.removeprefix("\ufeff") if offset == 0 else text)
                offset += len(raw)
                cut = _last_cut(text)
                if not cut and len(text) >= 8 * size:
                    cut = len(text)
                if cut:
                    yield text[:cut]
                kept = text[cut:]
                if on_bytes is not None:
                    on_bytes(len(raw))
            kept += _decoded(decoder, b"", path, offset, final=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if kept:
        yield kept


def _decoded(
    decoder: codecs.IncrementalDecoder,
    raw: bytes,
    path: str | Path,
    offset: int,
    final: bool = False,
) -> str:
    """The characters of the bytes that the file has at `offset`."""
    offset -= len(decoder.getstate()[0])  # the first bytes of a character whose rest is in `raw`
    try:
        return decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path} is not UTF-8 text: byte {byte:#04x} at offset {offset + error.start}"
        ) from error


def _last_cut(text: str) -> int:
    """Where the last lone white-space character stands, 0 where there is none."""
    # Looked for in growing tails: nearly always it is in the first.
    for tail in (1 << 10, 1 << 14, len(text)):
        start = max(0, len(text) - tail)
        cuts = [found.start() + 1 for found in _CUTS.finditer(text, start)]
        if cuts:
            return cuts[-1]
    return 0


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Training text and, from the end, the `fraction` of the characters held out for validation.

    Raises:
        UserError: `fraction` is not in [0, 1).

    Example:
        >>> split_text("abcdefgh", 0.25)
        ('abcdef', 'gh')
    """
    require(0 <= fraction < 1, f"val_fraction must be in [0, 1), got {fraction}")
    cut = len(text) - int(len(text) * fraction)
    return text[:cut], text[cut:]
