"""How to pack, and what packing did."""

import os
from dataclasses import dataclass, field

from loaders.sources.images import JPEG_QUALITY


@dataclass(frozen=True)
class Options:
    """How to pack; the fields are the command line's options."""

    kind: str | None = None
    """Kind of source; found from what is there when None."""
    under: str | None = None
    """Take this sub-tree, or part, of the source only."""
    settings: dict[str, str] = field(default_factory=dict)
    """Of the kind of source, by name: those that its module explains in `SETTINGS`."""
    classes: tuple[str, ...] = ()
    """Take these classes only, numbered in this order; empty: all."""
    part: str = "all"
    """all, train or test: a side of the deterministic split."""
    holdout: float = 0.2
    """Fraction of each class that is the test part."""
    shuffle: bool = False
    """Pack in a fixed random order in place of sorted by name, so that neighbours are of different classes."""
    shards: int = 1
    """Number of files."""
    resize: int | None = None
    """Re-encode images to this short side, in pixels, where they are larger."""
    quality: int = JPEG_QUALITY
    """Of JPEGs that are encoded anew, 1 to 95."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that decode, on each rank; 0: none but this one."""
    skip_bad: bool = False
    """Whether files that do not decode are acceptable: they are left out in any case."""
    force: bool = False
    """Replace an existing pack."""
    restart: bool = False
    """Begin anew, without the finished shards of an interrupted packing."""
    mpi: bool = False
    """Share the shards among the ranks of an MPI job."""


@dataclass(frozen=True)
class Report:
    """What packing did."""

    records: int
    """Images in the pack."""
    bad: tuple[tuple[str, str], ...]
    """Key and reason of each file that did not decode."""
    changes: dict[str, int]
    """Images whose bytes are not those of the source, by reason."""
    resumed: int
    """Shards that an interrupted packing had finished."""
