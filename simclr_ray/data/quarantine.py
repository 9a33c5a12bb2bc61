"""Rejected images by name: where each is stored, and what exactly is wrong with it.

Training passes on only a sample's id and a reason. The place follows from the id by the manifest alone; the name of the
original and the decoder's words are found by reading the image once more, for as many as anybody would look at.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.ranges import LostShard
from simclr_ray.data.read import read_range, resolve
from simclr_ray.errors import DataError, StorageError

EXPLAINED_OF_EACH_REASON = 50
"""Images that are read again for their details; a data set with more of one kind is broken in a way that these show."""

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
    return replace(entry, shard=manifest.shard_uri(shard), row=row)


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
        return replace(entry, uri=uri, detail=ascii(str(error).splitlines()[0])[1:-1])
    return replace(entry, uri=uri, detail=verdict.detail if isinstance(verdict, Rejected) else "")


class Quarantine:
    """All rejected images of a run, by sample id; details come in from a thread."""

    def __init__(self, manifest: Manifest, limits: Limits, entries: Iterable[Entry] = ()) -> None:
        self._manifest, self._limits = manifest, limits
        self._entries = {entry.sample_id: entry for entry in entries}
        self._asked = Counter(entry.reason for entry in self._entries.values() if entry.detail or entry.uri)
        self._todo: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        self._changed = False

    def add(self, found: Sequence[Mapping[str, object]]) -> None:
        """Take what training reported: `sample_id`, `reason`, `step`. What is known already is left as it is."""
        for one in found:
            entry = Entry(int(str(one["sample_id"])), str(one["reason"]), int(str(one["step"])))
            if entry.sample_id in self._entries:
                continue
            entry = located(self._manifest, entry)
            with self._lock:
                self._entries[entry.sample_id], self._changed = entry, True
            if entry.shard and self._asked[entry.reason] < EXPLAINED_OF_EACH_REASON:
                self._asked[entry.reason] += 1
                self._ask(entry)

    def take_changed(self) -> list[Entry] | None:
        """All entries, by sample id, if they are others than at the last call."""
        with self._lock:
            changed, self._changed = self._changed, False
            return [self._entries[key] for key in sorted(self._entries)] if changed else None

    def settle(self, timeout_s: float) -> None:
        """Wait for details under way."""
        thread = self._thread if self._open else None
        if thread is not None:
            thread.join(timeout_s)

    def reasons(self, *, examples: int = 3) -> str:
        """Counts by reason, the most frequent first, with names of some images; empty where nothing was rejected."""
        with self._lock:
            entries = list(self._entries.values())
        parts = []
        for reason, count in Counter(entry.reason for entry in entries).most_common():
            names = [entry.name for entry in entries if entry.reason == reason][:examples]
            parts.append(f"{count} {reason} ({', '.join(names)})")
        return "; ".join(parts)

    def __len__(self) -> int:
        """Images in it."""
        return len(self._entries)

    def _ask(self, entry: Entry) -> None:
        with self._lock:
            self._open += 1
            self._todo.put(entry)
            if self._open == 1:  # the thread of an earlier burst has ended, or is about to
                self._thread = threading.Thread(target=self._explain, name="quarantine", daemon=True)
                self._thread.start()

    def _explain(self) -> None:
        while True:
            entry = explained(self._manifest, self._todo.get(), self._limits)
            with self._lock:
                self._entries[entry.sample_id], self._changed = entry, True
                self._open -= 1
                if not self._open:
                    return
