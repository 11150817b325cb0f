"""The names of records, decoded when asked for."""

import bisect
from collections.abc import Sequence
from typing import overload

import numpy as np


class Keys(Sequence):
    """The names of the records, decoded when asked for: a pack may hold millions."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = list(arrays)
        self._starts = np.cumsum([0, *map(len, arrays)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        shard = bisect.bisect_right(self._starts, i) - 1
        return self._arrays[shard][i - self._starts[shard]].decode(errors="backslashreplace")
