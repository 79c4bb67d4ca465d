"""Types of csrc/lexicon.cpp."""

import numpy as np
from numpy.typing import NDArray

class Trie:
    @staticmethod
    def count(texts: list[str] | list[bytes], max_length: int, min_count: int, threads: int) -> Trie: ...
    @staticmethod
    def of(
        unicode: bool,
        max_length: int,
        codes: NDArray[np.uint32],
        parents: NDArray[np.int32],
        symbols: NDArray[np.int32],
    ) -> Trie: ...
    def map(
        self, texts: list[str] | list[bytes], threads: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
    @property
    def unicode(self) -> bool: ...
    @property
    def max_length(self) -> int: ...
    @property
    def codes(self) -> NDArray[np.uint32]: ...
    @property
    def parents(self) -> NDArray[np.int32]: ...
    @property
    def symbols(self) -> NDArray[np.int32]: ...
    def __len__(self) -> int: ...
