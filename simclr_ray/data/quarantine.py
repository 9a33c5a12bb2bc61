"""Rejected images by name: where each is stored, and what exactly is wrong with it.

Training passes on only a sample's id and a reason. The place follows from the id by the manifest alone; the name of the
original and the decoder's words are found by reading the image once more, for as many as anybody would look at.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simclr_ray import storage
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.ranges import LostShard
from simclr_ray.data.read import read_range, resolve
from simclr_ray.errors import DataError, StorageError, first_line

EXPLAINED_OF_EACH_REASON = 50
"""Images that are read again for their details; a data set with more of one kind is broken in a way that these show."""

_FRESH = 4096

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("reason", pa.string()),
        ("step", pa.int64()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("uri", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """One rejected image."""

    sample_id: int
    reason: str
    step: int
    """First step that met it."""
    shard: str = ""
    """URI of the shard that it is stored in."""
    row: int = -1
    """Its row there."""
    uri: str = ""
    """Of the original, where the shard tells it; for loose objects, of the object."""
    detail: str = ""
    """What is wrong with it, a short line of printable ASCII."""

    @property
    def name(self) -> str:
        """For people: the original's URI, or the place; printable, whatever the name holds."""
        return ascii(self.uri)[1:-1] if self.uri else f"{ascii(self.shard)[1:-1]} row {self.row}"


def place(manifest: Manifest, sample_id: int) -> tuple[int, int, int]:
    """Where a sample is stored: shard, group of the shard, row of the group."""
    table = manifest.table
    shard = int(np.searchsorted(table.first_rows, sample_id, side="right")) - 1
    row = sample_id - int(table.first_rows[shard])
    ends = np.cumsum(table.groups_of(shard), dtype=np.int64)
    group = int(np.searchsorted(ends, row, side="right"))
    return shard, group, row - (int(ends[group - 1]) if group else 0)


def located(manifest: Manifest, entry: Entry) -> Entry:
    """The entry with its place; no I/O."""
    if not 0 <= entry.sample_id < manifest.rows:
        return entry
    shard, _, _ = place(manifest, entry.sample_id)
    row = entry.sample_id - int(manifest.table.first_rows[shard])
    return replace(entry, shard=storage.tellable(manifest.shard_uri(shard)), row=row)


def explained(manifest: Manifest, entry: Entry, limits: Limits) -> Entry:
    """The entry with the original's name and the decoder's words, by reading the image again."""
    shard, group, row = place(manifest, entry.sample_id)
    piece = resolve(manifest, Piece(shard, group, row, row + 1, entry.sample_id))
    kind = piece.source.kind
    try:
        uri = "" if kind == "tar" else str(read_range(piece, ["uri"], manifest.image_column)["uri"][0].as_py() or "")
    except (LostShard, DataError, StorageError):
        uri = ""  # foreign tables have no such column
    try:
        table = read_range(piece, [manifest.image_column], manifest.image_column)
        verdict = decode(table[manifest.image_column][0].as_py(), limits)
    except (LostShard, DataError, StorageError) as error:
        return replace(entry, uri=storage.tellable(uri), detail=ascii(first_line(error))[1:-1])
    return replace(entry, uri=storage.tellable(uri), detail=verdict.detail if isinstance(verdict, Rejected) else "")


class Quarantine:
    """All rejected images of a run, by sample id: 20 bytes each, for a hundredth of 10^9 images may be among them.

    What makes an image findable is computed when the table is; names and words of a few come in from a thread.
    """

    def __init__(self, manifest: Manifest, limits: Limits, before: pa.Table | None = None) -> None:
        """Begin with the table that an earlier start left, if there is one."""
        self._manifest, self._limits = manifest, limits
        before = SCHEMA.empty_table() if before is None else before
        self._reasons: list[str] = sorted(set(before["reason"].to_pylist()))
        self._ids = before["sample_id"].to_numpy().astype(np.int64)  # sorted, as it was written
        self._codes = np.array([self._reasons.index(one) for one in before["reason"].to_pylist()], dtype=np.int16)
        self._steps = before["step"].to_numpy().astype(np.int64)
        self._fresh: dict[int, tuple[int, int]] = {}
        """(reason, step) by sample id, of those that are not in the arrays yet."""
        told = before.filter(pc.or_(pc.not_equal(before["uri"], ""), pc.not_equal(before["detail"], "")))
        self._told = {row["sample_id"]: Entry(**row) for row in told.to_pylist()}
        self._asked = Counter(entry.reason for entry in self._told.values())
        self._todo: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._open = 0
        self._changed = False

    def add(self, found: Sequence[Mapping[str, object]]) -> None:
        """Take what training reported: `sample_id`, `reason`, `step`. What is known already is left as it is."""
        for one in found:
            sample_id, reason, step = int(str(one["sample_id"])), str(one["reason"]), int(str(one["step"]))
            with self._lock:
                if self._known(sample_id):
                    continue
                if reason not in self._reasons:
                    self._reasons.append(reason)
                self._fresh[sample_id] = (self._reasons.index(reason), step)
                self._changed = True
                if len(self._fresh) > _FRESH:
                    self._merge()
            if self._asked[reason] < EXPLAINED_OF_EACH_REASON:
                self._asked[reason] += 1
                self._ask(located(self._manifest, Entry(sample_id, reason, step)))

    def take_changed(self) -> pa.Table | None:
        """All entries, by sample id, if they are others than at the last call."""
        with self._lock:
            changed, self._changed = self._changed, False
            return self._table() if changed else None

    def settle(self, timeout_s: float) -> None:
        """Wait for details under way."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def reasons(self, *, examples: int = 3) -> str:
        """Counts by reason, the most frequent first, with names of some images; empty where nothing was rejected."""
        with self._lock:
            self._merge()
            counts = np.bincount(self._codes, minlength=len(self._reasons))
            parts = []
            for code in np.argsort(-counts, kind="stable").tolist():
                reason = self._reasons[code]
                some = self._ids[self._codes == code][: 10 * examples].tolist()
                known = [self._told[one] for one in some if one in self._told]
                entries = (known or [located(self._manifest, Entry(one, reason, 0)) for one in some])[:examples]
                parts.append(f"{counts[code]:,} {reason} ({', '.join(entry.name for entry in entries)})")
            return "; ".join(parts)

    def __len__(self) -> int:
        """Images in it."""
        with self._lock:
            return len(self._ids) + len(self._fresh)

    def _known(self, sample_id: int) -> bool:
        place = int(np.searchsorted(self._ids, sample_id))
        return sample_id in self._fresh or (place < len(self._ids) and int(self._ids[place]) == sample_id)

    def _merge(self) -> None:
        ids = np.array([*self._fresh], dtype=np.int64)
        codes, steps = np.array([*self._fresh.values()], dtype=np.int64).reshape(-1, 2).T
        order = np.argsort(np.concatenate([self._ids, ids]), kind="stable")
        self._ids = np.concatenate([self._ids, ids])[order]
        self._codes = np.concatenate([self._codes, codes.astype(np.int16)])[order]
        self._steps = np.concatenate([self._steps, steps])[order]
        self._fresh = {}

    def _table(self) -> pa.Table:
        self._merge()
        table = self._manifest.table
        inside = (self._ids >= 0) & (self._ids < self._manifest.rows)
        shards = np.clip(np.searchsorted(table.first_rows, self._ids, side="right") - 1, 0, len(table) - 1)
        used, index = np.unique(shards, return_inverse=True)
        uris = pa.array([storage.tellable(self._manifest.shard_uri(int(shard))) for shard in used], pa.string())
        place = pa.array(index.astype(np.int32), mask=~inside)
        told = [self._told.get(one) for one in self._ids.tolist()] if self._told else [None] * len(self._ids)
        return pa.table(
            [
                self._ids,
                pa.array(self._reasons, pa.string()).take(pa.array(self._codes)),
                self._steps,
                pc.fill_null(uris.take(place), ""),
                np.where(inside, self._ids - table.first_rows[shards], -1),
                pa.array([entry.uri if entry else "" for entry in told], pa.string()),
                pa.array([entry.detail if entry else "" for entry in told], pa.string()),
            ],
            schema=SCHEMA,
        )

    def _ask(self, entry: Entry) -> None:
        if not entry.shard:
            return
        with self._lock:
            self._open += 1
            self._todo.put(entry)
            if self._open == 1:  # the thread of an earlier burst has ended, or is about to
                self._thread = threading.Thread(target=self._explain, name="quarantine", daemon=True)
                self._thread.start()

    def _explain(self) -> None:
        while True:
            entry = self._todo.get()
            try:
                entry = explained(self._manifest, entry, self._limits)
            except Exception as error:  # details are a courtesy; nothing may keep the others from theirs
                entry = replace(entry, detail=ascii(f"{type(error).__name__}: {error}")[1:-1][:200])
            with self._lock:
                self._told[entry.sample_id], self._changed = entry, True
                self._open -= 1
                if not self._open:
                    return
