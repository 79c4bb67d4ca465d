"""The units of a hybrid language model (characters and frequent n-grams), and where they occur in a text."""

import functools
import os
import secrets
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sukhops._library import BUILD

try:
    from sukhops._lexicon import Trie
except ImportError as error:
    raise ImportError(f"sukhops._lexicon is not built for this Python: {error}. Build it: {BUILD}") from error

# file format: header, three arrays of little-endian 32-bit integers, CRC-32 of header and arrays
_MAGIC = b"sukhops lexicon\x01"
_HEAD = struct.Struct("<16sIIII")  # magic, 1 for str or 0 for bytes, max_length, characters, n-grams


class Lexicon:
    """A vocabulary of units: characters and frequent n-grams. Create one with `from_text` or `load`.

    Unit 0 stands for every unknown character. Then come the characters of the texts (including newline) by
    code point, then the n-grams by length and, within a length, by code points. A character of a str is a
    code point; a character of bytes is one byte. No unit crosses the end of a line (a newline is a unit of
    its own) or the end of a text.

    A lexicon is immutable: threads may share it, and it can be pickled. `len(lexicon)` is the number V of
    units.

    Source: Grave et al. 2019 (hybrid language models). Their public code also counts n-grams that cross the
    end of a line; this class does not.
    """

    def __init__(self, trie: Trie):
        self._trie = trie

    @classmethod
    def from_text(
        cls, texts: Iterable[str] | Iterable[bytes], max_length: int = 4, min_count: int = 200
    ) -> "Lexicon":
        """Builds a lexicon from texts: all their characters, and the frequent n-grams within their lines.

        Needs about four bytes of memory per character, in addition to the texts.

        Args:
            texts: at least one text, either all str or all bytes.
            max_length: number of characters of the longest unit, >= 1.
            min_count: how often an n-gram of 2 to max_length characters must occur, >= 1; overlapping
                occurrences all count.

        Returns:
            The lexicon.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of range; there is no text; the
                texts have 2**31 characters or more.
        """
        texts = _as_list(texts)
        for name, value in (("max_length", max_length), ("min_count", min_count)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if not 1 <= value < 2**31:
                raise ValueError(f"{name}: expected >= 1 and below 2**31, got {value}")
        if not texts:
            raise ValueError("texts: expected at least one str or bytes, got none")
        return cls(Trie.count(texts, max_length, min_count, torch.get_num_threads()))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Lexicon":
        """Reads a lexicon that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a lexicon, or is truncated or damaged.
        """
        content = Path(path).read_bytes()
        if not content:
            raise ValueError(f"{path}: not a lexicon of sukhops, the file is empty")
        if content[: len(_MAGIC)] != _MAGIC[: len(content)]:
            start = content[: len(_MAGIC)]
            raise ValueError(f"{path}: not a lexicon of sukhops, the file starts with {start!r}")
        size = _HEAD.size + 4
        if len(content) >= size:
            _, unicode, max_length, characters, ngrams = _HEAD.unpack_from(content)
            size += 4 * (characters + 2 * ngrams)
        if len(content) != size:
            raise ValueError(f"{path}: truncated or damaged, expected {size:,} bytes, got {len(content):,}")
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise ValueError(f"{path}: damaged, the checksum does not match")
        codes, parents, symbols = np.split(
            np.frombuffer(content, "<u4", characters + 2 * ngrams, _HEAD.size),
            [characters, characters + ngrams],
        )
        try:
            return cls(Trie.of(bool(unicode), max_length, codes, parents.view("<i4"), symbols.view("<i4")))
        except ValueError as error:
            raise ValueError(f"{path}: not a lexicon of sukhops: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the lexicon to a file. An existing file is replaced only after the new one is complete.

        Raises:
            OSError: the file cannot be written.
        """
        path = Path(path)
        trie = self._trie
        head = _HEAD.pack(_MAGIC, trie.unicode, trie.max_length, len(trie.codes), len(trie.parents))
        arrays = (trie.codes, trie.parents, trie.symbols)
        content = head + b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays)
        content += zlib.crc32(content).to_bytes(4, "little")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def unit_ids(self, texts: Iterable[str] | Iterable[bytes]) -> tuple[Tensor, Tensor]:
        """Finds the units that start at each position of each text.

        Args:
            texts: B texts, str or bytes like the texts of the lexicon.

        Returns:
            The tuple (ids, lengths). ids [B, T, max_length], int64, has T positions, the length of the
            longest text; ids[b, t, k] is the unit that covers positions t .. t+k, or -1 if there is none.
            ids[..., 0] holds the characters, with 0 for an unknown character. lengths [B], int64, is the
            length of each text; ids is -1 at and after this position.

        Raises:
            TypeError: a text is not of the lexicon's type (str or bytes).
        """
        ids, lengths = self._trie.map(_as_list(texts), torch.get_num_threads())
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    @property
    def max_length(self) -> int:
        """Largest number of characters of a unit: the size of the last axis of `unit_ids`."""
        return self._trie.max_length

    @functools.cached_property
    def units(self) -> list[str] | list[bytes]:
        """All units, in the order of their ids. Unit 0, the unknown character, is the empty str or bytes."""
        trie = self._trie
        if trie.unicode:
            units: list[Any] = ["", *map(chr, trie.codes.tolist())]
        else:
            units = [b"", *(bytes([code]) for code in trie.codes.tolist())]
        for parent, symbol in zip(trie.parents.tolist(), trie.symbols.tolist(), strict=True):
            units.append(units[parent] + units[symbol])
        return units

    def __len__(self) -> int:
        return len(self._trie)

    def __repr__(self) -> str:
        trie = self._trie
        return (
            f"Lexicon({len(self):,} units of {'str' if trie.unicode else 'bytes'}: {len(trie.codes):,} "
            f"characters, {len(trie.parents):,} n-grams of 2 to {trie.max_length})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        trie = self._trie
        return _restore, (trie.unicode, trie.max_length, trie.codes, trie.parents, trie.symbols)


def _restore(*state: Any) -> Lexicon:
    return Lexicon(Trie.of(*state))


def _as_list(texts: Iterable) -> list:
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: expected a list of str or bytes, got a single {type(texts).__name__}")
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a list of str or bytes, got {type(texts).__name__}")
    return list(texts)
