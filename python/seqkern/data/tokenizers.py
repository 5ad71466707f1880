"""Text to integers and back: characters, words, or byte-pair encoding.

Each tokenizer is saved as one JSON file with its kind and its vocabulary. `decode(encode(s)) == s`
for the characters and byte pairs, and for words wherever no word of `s` is unknown.

What has no id of its own:

* `char`: a character that the training text lacks is an error;
* `word`: a word is `<unk>`, id 0; white space and punctuation are spelled out, and an error where
  the training text lacks the character;
* `bpe`: nothing, every byte has an id.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from seqkern.errors import UserError, missing_extra, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BpeLibraryTokenizer

UNKNOWN_WORD = "<unk>"


class Tokenizer(ABC):
    """Turns text into token ids in [0, vocab_size) and back."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of distinct token ids."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; `UserError` names a character that has none, and its position."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    @abstractmethod
    def vocabulary(self) -> Any:
        """What `from_vocabulary` needs to make this tokenizer again, as JSON can hold it."""

    @classmethod
    @abstractmethod
    def from_vocabulary(cls, vocabulary: Any) -> "Tokenizer":
        """The tokenizer whose `vocabulary()` this is."""

    @classmethod
    @abstractmethod
    def train_on(cls, chunks: Iterable[str], max_vocab: int) -> "Tokenizer":
        """A tokenizer of at most `max_vocab` ids for a text that comes in chunks.

        The chunks are cut where `seqkern.data.text.text_chunks` cuts, so that none of them ends
        within a token; they are read once and not kept.
        """

    @classmethod
    def train(cls, text: str, max_vocab: int = 4096) -> "Tokenizer":
        """A tokenizer of at most `max_vocab` ids for `text`."""
        return cls.train_on([text], max_vocab)

    def dumps(self) -> str:
        """The JSON form of this tokenizer, which `load_tokenizer` reads."""
        return json.dumps(dump_tokenizer(self), ensure_ascii=False, indent=1)


def _digest(vocabulary: Any) -> str:
    """SHA-256 of a vocabulary: what is loaded is what was saved, or it is an error."""
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _unknown_character(text: str, position: int) -> UserError:
    character = text[position]
    return UserError(
        f"unknown character {character!r} (U+{ord(character):04X}) at position {position}: "
        "it does not occur in the text this vocabulary was made from"
    )


class CharTokenizer(Tokenizer):
    """One token per character: the distinct characters of the text in code-point order.

    The size of the text's alphabet is what it is; `max_vocab` does not apply.

    Example:
        >>> tokenizer = CharTokenizer.train("hello")
        >>> tokenizer.encode("hole"), tokenizer.decode([1, 0])
        ([1, 3, 2, 0], 'he')
    """

    kind = "char"

    def __init__(self, characters: str) -> None:
        """`characters`: every character once; its place is its id."""
        self._characters = characters
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train_on(cls, chunks: Iterable[str], max_vocab: int = 0) -> "CharTokenizer":
        """See the class."""
        found: set[str] = set()
        for chunk in chunks:
            found.update(chunk)
        return cls("".join(sorted(found)))

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters."""
        return len(self._characters)

    def encode(self, text: str) -> list[int]:
        """One id per character."""
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError as error:
            raise _unknown_character(text, text.index(error.args[0])) from None

    def decode(self, ids: Sequence[int]) -> str:
        """One character per id."""
        return "".join(self._characters[i] for i in ids)

    def vocabulary(self) -> str:
        """All characters in the order of their ids."""
        return self._characters

    @classmethod
    def from_vocabulary(cls, vocabulary: Any) -> "CharTokenizer":
        """From the string `vocabulary()` gave."""
        return cls(vocabulary)


class WordTokenizer(Tokenizer):
    r"""Words, runs of white space, and single punctuation characters.

    Splitting loses nothing: the pieces joined are the text. The vocabulary is

    * id 0, `<unk>`;
    * every character of the text that is not part of a word, on its own: white space and
      punctuation always come back exactly;
    * the most frequent other pieces that occur at least `min_count` (2) times, ties in the order
      of the text, up to `max_vocab` ids in all.

    A word without an id is `<unk>`; a run of white space without one is spelled out. A character
    that is not part of a word and does not occur in the training text is an error.

    Example:
        >>> tokenizer = WordTokenizer.train("a cat, a cat, a dog", max_vocab=100)
        >>> tokenizer.decode(tokenizer.encode("one cat, a dog"))
        '<unk> cat, a <unk>'
    """

    kind = "word"
    _pieces = re.compile(r"\w+|[^\w\s]|\s+")
    _wordless = re.compile(r"\W")

    def __init__(self, pieces: Sequence[str]) -> None:
        """`pieces`: the vocabulary in the order of its ids, `<unk>` first."""
        self._vocabulary = list(pieces)
        self._ids = {piece: i for i, piece in enumerate(self._vocabulary)}

    @classmethod
    def train_on(
        cls, chunks: Iterable[str], max_vocab: int, min_count: int = 2, max_counted: int = 4_000_000
    ) -> "WordTokenizer":
        """See the class; `UserError` where `max_vocab` cannot hold the single characters.

        Memory is bounded: when `max_counted` distinct pieces are being counted, those seen least
        often so far are forgotten, until half are left.
        """
        found: set[str] = set()
        counts: Counter[str] = Counter()
        for chunk in chunks:
            found.update(chunk)
            counts.update(cls._pieces.findall(chunk))
            if len(counts) > max_counted:
                counts = Counter(dict(counts.most_common(max_counted // 2)))
        singles = sorted(filter(cls._wordless.match, found))
        room = max_vocab - 1 - len(singles)
        require(
            room >= 0,
            f"vocab_size must be at least {1 + len(singles)} for the {len(singles)} characters "
            f"outside words and {UNKNOWN_WORD}, got {max_vocab}",
        )
        for single in singles:
            counts.pop(single, None)
        frequent = [piece for piece, count in counts.most_common(room) if count >= min_count]
        return cls([UNKNOWN_WORD, *singles, *frequent])

    @property
    def vocab_size(self) -> int:
        """Number of pieces, `<unk>` included."""
        return len(self._vocabulary)

    def encode(self, text: str) -> list[int]:
        """See the class."""
        ids: list[int] = []
        for piece in self._pieces.findall(text):
            piece_id = self._ids.get(piece)
            if piece_id is not None:
                ids.append(piece_id)
            elif self._wordless.match(piece):
                ids.extend(self._spelled(piece, text))
            else:
                ids.append(0)  # an unknown word
        return ids

    def _spelled(self, piece: str, text: str) -> list[int]:
        """Ids of the characters of a piece that is no word, and has no id itself."""
        try:
            return [self._ids[character] for character in piece]
        except KeyError as error:
            raise _unknown_character(text, text.index(error.args[0])) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The pieces joined."""
        return "".join(self._vocabulary[i] for i in ids)

    def vocabulary(self) -> list[str]:
        """All pieces in the order of their ids."""
        return self._vocabulary

    @classmethod
    def from_vocabulary(cls, vocabulary: Any) -> "WordTokenizer":
        """From the list `vocabulary()` gave."""
        return cls(vocabulary)


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding by the `tokenizers` library: no character is unknown."""

    kind = "bpe"

    def __init__(self, library_tokenizer: "BpeLibraryTokenizer") -> None:
        """Wraps a tokenizer of the `tokenizers` library."""
        self._tokenizer = library_tokenizer

    @classmethod
    def train_on(cls, chunks: Iterable[str], max_vocab: int) -> "BpeTokenizer":
        """Learn merges from a text; the 256 bytes always have an id."""
        require(max_vocab >= 256, f"vocab_size must be at least 256 for bpe, got {max_vocab}")
        library = _bpe_library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=max_vocab,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        lines = (line for chunk in chunks for line in chunk.splitlines(keepends=True))
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Bytes and merges."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of the merged bytes of the text's UTF-8."""
        for position, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":  # an undecodable byte of a command line
                raise _unknown_character(text, position)
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; U+FFFD where the ids stop in the middle of a character's bytes."""
        return str(self._tokenizer.decode(list(ids)))

    def vocabulary(self) -> Any:
        """The library's own JSON form."""
        return json.loads(self._tokenizer.to_str())

    @classmethod
    def from_vocabulary(cls, vocabulary: Any) -> "BpeTokenizer":
        """From the library's JSON form."""
        return cls(_bpe_library().Tokenizer.from_str(json.dumps(vocabulary)))


def _bpe_library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise missing_extra("tokenizers", "bpe", "the bpe tokenizer") from error
    return tokenizers


TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (CharTokenizer, WordTokenizer, BpeTokenizer)
}


def train_tokenizer(kind: str, text: str, max_vocab: int = 4096) -> Tokenizer:
    """A tokenizer of a kind (`char`, `word`, `bpe`) for `text`."""
    return _tokenizer_class(kind).train(text, max_vocab)


def train_tokenizer_on(kind: str, chunks: Iterable[str], max_vocab: int = 4096) -> Tokenizer:
    """The same for a text that comes in chunks, as `Tokenizer.train_on` takes them."""
    return _tokenizer_class(kind).train_on(chunks, max_vocab)


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write the tokenizer as JSON."""
    Path(path).write_text(tokenizer.dumps(), encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what `save_tokenizer` wrote; `UserError` names a missing or damaged file."""
    try:
        parsed = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged or not a tokenizer of seqkern's") from error
    return parse_tokenizer(parsed, path)


def dump_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as JSON can hold it."""
    vocabulary = tokenizer.vocabulary()
    return {"kind": tokenizer.kind, "sha256": _digest(vocabulary), "vocabulary": vocabulary}


def parse_tokenizer(parsed: Any, path: str | Path) -> Tokenizer:
    """The tokenizer that `dump_tokenizer` gave; `path` is where it was read, for the errors."""
    try:
        kind, digest, vocabulary = parsed["kind"], parsed["sha256"], parsed["vocabulary"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a tokenizer of seqkern's") from error
    require(digest == _digest(vocabulary), f"{path} is damaged: its vocabulary was changed")
    return _tokenizer_class(kind).from_vocabulary(vocabulary)


def _tokenizer_class(kind: str) -> type[Tokenizer]:
    require(kind in TOKENIZERS, f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {kind}")
    return TOKENIZERS[kind]
