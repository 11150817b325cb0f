"""Records that turn out unusable while a run reads them: replaced, reported, counted, and too many end the run."""

import logging
from pathlib import Path

import numpy as np

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.pipelines.heading import fault

UNSOUND = "its bytes do not match their checksum"
_LOG = logging.getLogger(__name__)


class BadRecords:
    """The unusable records among those of `pool` (n,) that were met so far; at most `budget` different ones."""

    def __init__(self, pack: Pack, pool: np.ndarray, budget: int):
        self.found: dict[int, str] = {}
        """Fault by record number."""
        self._pack, self._pool, self._budget = pack, np.unique(pool), budget
        self._seen = 0

    def report(self, record: int, reason: str) -> None:
        """Note a bad record. UserError when the budget is spent."""
        self.found[record] = reason
        name = f"record {record} ({self._pack.keys[record]})"
        if len(self.found) > self._budget:
            raise UserError(
                f"{self._pack.path}: {name} cannot be used: {reason}. Unusable so far: {sorted(self.found)}; more than"
                f" data.bad_budget={self._budget}; {self._advice()}"
            )
        _LOG.warning("%s: %s is replaced by another one: %s", self._pack.path, name, reason)

    def check(self, ids: np.ndarray, share: float) -> None:
        """Compare this share of the records with their checksums, evenly spread over the calls."""
        before, self._seen = self._seen, self._seen + len(ids)
        if share > 0:
            chosen = np.diff(np.floor(share * np.arange(before, self._seen + 1))) > 0
            for record in self._pack.unsound(ids[chosen]):
                if record not in self.found:
                    self.report(record, UNSOUND)

    def look(self, ids: np.ndarray) -> None:
        """Note those of `ids` (b,) that do not begin and end as images of the sizes in the index."""
        sizes = self._pack.sizes[ids].tolist()
        for record, data, (height, width) in zip(ids.tolist(), self._pack.records(ids), sizes, strict=True):
            if record not in self.found and (said := fault(data, height, width)):
                self.report(record, said)

    def replaced(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids (b,) with each bad one replaced by the next good one of the pool, and (b,) bool: False for those."""
        bad = np.isin(ids, list(self.found))
        while np.isin(ids, list(self.found)).any():
            ids = np.array([self._next_good(i) for i in ids.tolist()])
            self.look(ids[bad])  # what takes a bad one's place may be bad too
        return ids, ~bad

    def _next_good(self, record: int) -> int:
        at = int(np.searchsorted(self._pool, record))
        for step in range(len(self._pool)):
            other = int(self._pool[(at + step) % len(self._pool)])
            if other not in self.found:
                return other
        raise UserError(f"{self._pack.path}: none of the selected records can be used; {self._advice()}")

    def other(self, record: int) -> int | None:
        """A record of the pool that is not known as bad, besides this one; None where there is none."""
        at = int(np.searchsorted(self._pool, record, side="right"))
        others = (int(one) for one in np.roll(self._pool, -at) if one != record and one not in self.found)
        return next(others, None)

    def _advice(self) -> str:
        return f"look for damage with: python -m loaders.pack verify {self._pack.path}"


def nothing_decodes(path: Path, tried: int, backend: str, error: RuntimeError) -> UserError:
    """What to say where every record fails, though their checksums are right: no record is to blame."""
    dali = "data.region=slice or whole, data.decode=cpu or " if backend == "dali" else ""
    return UserError(
        f"{path}: none of {tried} records decodes, and their checksums are right, so it is the decoder that fails: "
        f"{short(error)}. Try {dali}data.backend={'host' if backend == 'dali' else 'dali'}"
    )


def short(error: RuntimeError) -> str:
    """What a decoder says, without its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next(
        (line for line in lines if "rror" in line and "pipeline" not in line.lower()), lines[0] if lines else ""
    )
    return said[:200] or type(error).__name__
