"""Tables as Parquet, through pyarrow where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import UserError


@contextmanager
def writing(path: Path, kinds: Mapping[str, type]) -> Iterator[Callable[[Sequence[Any]], None]]:
    """A function that appends rows, given in columns, to a new file. `kinds`: str or float of each column by name; NaN
    is written as missing. UserError without pyarrow."""
    arrow, parquet = _library(path)
    types = [arrow.string() if kind is str else arrow.float64() for kind in kinds.values()]
    schema = arrow.schema(list(zip(kinds, types, strict=True)))

    def add(columns: Sequence[Any]) -> None:
        arrays = [arrow.array(each, kind, from_pandas=True) for each, kind in zip(columns, types, strict=True)]
        file.write_table(arrow.table(arrays, schema=schema))

    with parquet.ParquetWriter(path, schema) as file:
        yield add


def read(path: Path, wanted: Callable[[list[str]], list[int]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of all columns, and those that `wanted` chooses among them by their places; missing values are NaN
    among numbers, None among text. UserError without pyarrow; whatever pyarrow raises for a damaged file."""
    _, parquet = _library(path)
    with parquet.ParquetFile(path) as file:
        header = list(file.schema_arrow.names)
        chosen = [header[i] for i in wanted(header)]
        table = file.read(columns=chosen)
    return header, {name: table.column(name).to_numpy() for name in chosen}


def _library(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install pyarrow, or take .csv") from error
    return pyarrow, pyarrow.parquet
