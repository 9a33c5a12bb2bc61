"""Which rows of an indexed source go into which output shard: pure arithmetic over (manifest, seed).

Runs of neighbouring rows, which are read together, are permuted over the whole source by seed, laid end to end and cut
into output shards of the same number of rows. Every row falls into exactly one shard. Memory is 24 bytes a run, and
three times as much while they are permuted; there is one run for 64 images of a tar: for 10^9 images, 1.1 GB and 15 s.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.shards import shuffled

RUN_ROWS = 1024
"""Longest run. Larger row groups are cut, and read once for each run of theirs."""

Int64s = npt.NDArray[np.int64]


class PackOrder:
    """The rows of a manifest in the order in which they are packed, cut into shards."""

    def __init__(self, manifest: Manifest, rows_per_shard: int, *, seed: int | None) -> None:
        """Cut the groups into runs and permute them by seed; without a seed they keep the manifest's order."""
        assert rows_per_shard > 0, rows_per_shard
        table = manifest.table
        self.rows_per_shard = rows_per_shard
        self._table = table
        group_rows = table.rows_per_group.astype(np.int64)
        cuts = -(-group_rows // RUN_ROWS)  # runs of each group: none where it is empty
        self._group = np.repeat(np.arange(len(group_rows)), cuts)
        nth = np.arange(len(self._group)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        begin = nth * group_rows[self._group] // cuts[self._group]
        stop = (nth + 1) * group_rows[self._group] // cuts[self._group]
        if seed is not None:
            order = shuffled(len(self._group), seed)
            self._group, begin, stop = self._group[order], begin[order], stop[order]
        self._begin = begin.astype(np.int32)
        self._ends = np.cumsum(stop - begin)
        self._first_ids = np.cumsum(group_rows) - group_rows
        self.rows = int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        """Output shards."""
        return -(-self.rows // self.rows_per_shard)

    def pieces(self, shard: int) -> Iterator[Piece]:
        """Where the rows of an output shard are, in order."""
        at, last = shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard)
        run = int(np.searchsorted(self._ends, at, side="right"))
        while at < last:
            before = int(self._ends[run - 1]) if run else 0
            stop = min(last, int(self._ends[run]))
            yield self._piece(int(self._group[run]), int(self._begin[run]) + at - before, stop - at)
            at, run = stop, run + 1

    def _piece(self, group: int, start: int, rows: int) -> Piece:
        bounds = self._table.group_bounds
        source = int(np.searchsorted(bounds, group, side="right")) - 1
        return Piece(source, group - int(bounds[source]), start, start + rows, int(self._first_ids[group]) + start)
