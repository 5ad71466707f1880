"""Where the text comes from: the one every Python carries, or the user's file."""

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
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}"
        ) from error


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
