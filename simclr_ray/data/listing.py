"""List what a source holds, however much it is: in parallel, in bounded memory, and continued after a kill.

A folder is cut into jobs along its sub-folders until there are enough to keep the threads busy. Each job lists its
part page by page into Parquet files under the working folder and notes that it is done; what is done is not listed
again. A store gives 1,000 keys a request, so n objects cost about n / 1,000 requests plus three a job, and the time is
that of the requests divided by the threads: 10^9 objects in at least 64 folders take half an hour where a request takes
100 ms. A single folder of very many files is listed by one thread, since its pages come one after another; there a list
file, such as the store's own inventory, is the quicker source.

The result does not depend on threads or on kills: it is in the order of the URIs.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.tar import is_image

Kind = Literal["tar", "parquet", "objects"]

SCHEMA = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("version", pa.string()), ("label", pa.string())])
PAGE = 1000
THREADS = 64
JOBS = 512
"""Folders are cut further until there are so many jobs, or nothing is left to cut."""
LEVELS = 8
"""Folders are cut at most so deep."""
PART_ROWS = 1 << 16


@dataclass(frozen=True)
class Job:
    """A part of the listing that one thread does."""

    uri: str
    deep: bool
    """All below the folder, or only the files directly in it."""


@dataclass(frozen=True)
class Part:
    """What one job found."""

    kinds: Mapping[str, int]
    """Files by kind; `other` are those of no use."""
    rows: int
    bytes: int
    pages: int
    seconds: float
    files: int
    """Parquet files written."""
    first: str
    """Lowest URI kept; empty where none was."""


@dataclass(frozen=True)
class Listing:
    """A finished listing on storage."""

    folder: str
    jobs: tuple[Job, ...]
    parts: tuple[Part, ...]

    @property
    def kinds(self) -> Counter[str]:
        """Files by kind, over all parts."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.kinds)
        return total

    @property
    def rows(self) -> int:
        """Entries kept."""
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """Their size together."""
        return sum(part.bytes for part in self.parts)

    def tables(self) -> Iterator[pa.Table]:
        """All entries as tables of `SCHEMA`, in the order of their URIs; a few parts are in memory at a time."""
        streams = [_Stream(self.folder, number, part) for number, part in enumerate(self.parts) if part.rows]
        streams.sort(key=lambda stream: stream.head)
        opened: list[_Stream] = []
        while streams or opened:
            # A folder's own files lie between those of its sub-folders: only streams that have begun can interleave.
            while streams and (not opened or streams[0].head <= min(one.head for one in opened)):
                opened.append(streams.pop(0))
            opened.sort(key=lambda stream: stream.head)
            others = [one.head for one in (*opened[1:2], *streams[:1])]
            yield opened[0].take(min(others, default=None))
            if opened[0].done:
                opened.pop(0)


class _Stream:
    """The entries of one job, read file by file."""

    def __init__(self, folder: str, job: int, part: Part) -> None:
        self.head, self.done = part.first, False
        self._files = [_part_uri(folder, job, number) for number in range(part.files)]
        self._table: pa.Table | None = None

    def take(self, before: str | None) -> pa.Table:
        """Rows from the head on, those below `before`, as far as one file goes; at least one."""
        if self._table is None:
            self._table = pq.read_table(io.BytesIO(storage.read_bytes(self._files.pop(0))))
        table = self._table
        count = table.num_rows if before is None else max(1, _rows_below(table, before))
        rest = table.slice(count)
        self._table = rest if rest.num_rows else None
        if rest.num_rows:
            self.head = rest["uri"][0].as_py()
        elif self._files:
            self._table = pq.read_table(io.BytesIO(storage.read_bytes(self._files.pop(0))))
            self.head = self._table["uri"][0].as_py()
        else:
            self.done = True
        return table.slice(0, count)


def _rows_below(table: pa.Table, limit: str) -> int:
    """Rows of a sorted table whose URI is below a limit."""
    low, high = 0, table.num_rows
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if table["uri"][middle].as_py() < limit else (low, middle)
    return low


def kind_of(uri: str) -> Kind | None:
    """What a file is by its suffix."""
    if is_image(uri):
        return "objects"
    suffix = uri.rpartition(".")[2].lower()
    return "tar" if suffix == "tar" else "parquet" if suffix == "parquet" else None


def list_folder(source: str, folder: str, *, leave_out: Sequence[str] = (), threads: int = THREADS) -> Listing:
    """List all tars, Parquet files and images below `source` into `folder`, or go on with a listing begun there.

    Args:
        source: Normalised URI of a folder.
        folder: Working folder for the parts.
        leave_out: Folders that are not looked into.
        threads: Listing requests at a time.

    Raises:
        StorageError: the store refuses or fails.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="listing") as pool:
        jobs = _planned(source, folder, pool)
        running: list[Future[Part]] = [
            pool.submit(_do, folder, number, job, tuple(leave_out)) for number, job in enumerate(jobs)
        ]
        try:
            parts = tuple(future.result() for future in running)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Listing(folder, jobs, parts)


def _planned(source: str, folder: str, pool: ThreadPoolExecutor) -> tuple[Job, ...]:
    """The jobs, from the working folder where it has them."""
    uri = storage.join(folder, "jobs.json")
    try:
        return tuple(Job(**job) for job in json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        jobs = cut(source, pool)
        storage.write_bytes(uri, json.dumps([asdict(job) for job in jobs]).encode())
        return jobs


def cut(source: str, pool: ThreadPoolExecutor) -> tuple[Job, ...]:
    """Cut a folder into jobs, sorted: level by level, until there are `JOBS`. A function of what the store holds."""
    done: list[Job] = []
    frontier = [source]
    for _ in range(LEVELS):
        if not frontier or len(done) + len(frontier) >= JOBS:
            break
        below: list[str] = []
        for jobs, folders in pool.map(_looked_into, frontier):
            done += jobs
            below += folders
        frontier = below
    return tuple(sorted((*done, *(Job(uri, True) for uri in frontier)), key=lambda job: (job.uri, job.deep)))


def _looked_into(uri: str) -> tuple[list[Job], list[str]]:
    """Jobs of a folder that are ready, and sub-folders to look into."""
    page = next(storage.scan(uri), [])
    flat = all("/" not in entry.uri[len(uri) :].lstrip("/") for entry in page)
    if len(page) < PAGE or flat:  # small, or one long row of files: never brought into memory as one level
        return ([Job(uri, True)] if page else []), []
    folders, files = storage.list_level(uri)
    if any(len(below) <= len(uri) for below in folders):  # keys with empty parts ("a//b") have no folder of their own
        return [Job(uri, True)], []
    return ([Job(uri, False)] if files else []), folders


def _do(folder: str, number: int, job: Job, leave_out: tuple[str, ...]) -> Part:
    """List one part, unless it has been listed."""
    note = storage.join(folder, f"job-{number:05d}.json")
    try:
        return Part(**json.loads(storage.read_bytes(note)))
    except FileNotFoundError:
        pass
    begun = time.perf_counter()
    kinds: Counter[str] = Counter()
    pages = files = rows = size = 0
    first = ""
    waiting: list[storage.Entry] = []

    def flush() -> None:
        nonlocal files
        write_part(folder, number, files, waiting)
        files += 1
        waiting.clear()

    for page in storage.scan(job.uri) if job.deep else iter([storage.list_level(job.uri)[1]]):
        pages += 1
        for entry in page:
            kind = kind_of(entry.uri)
            if any(entry.uri.startswith(away) for away in leave_out):
                continue
            if kind is not None and not _is_text(entry.uri):
                kind, kinds["name_not_utf8"] = None, kinds["name_not_utf8"] + 1
            kinds[kind or "other"] += 1
            if kind is not None:
                first = first or entry.uri
                rows, size = rows + 1, size + entry.bytes
                waiting.append(entry)
        if len(waiting) >= PART_ROWS:
            flush()
    if waiting:
        flush()
    part = Part(dict(kinds), rows, size, pages, round(time.perf_counter() - begun, 3), files, first)
    storage.write_bytes(note, json.dumps(asdict(part)).encode())
    return part


def _is_text(uri: str) -> bool:
    """Whether a name can be stored in a table; names of local files may be any bytes."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_part(folder: str, job: int, number: int, entries: Sequence[storage.Entry]) -> None:
    """Write one file of a listing."""
    table = pa.table(
        {
            "uri": [entry.uri for entry in entries],
            "bytes": [entry.bytes for entry in entries],
            "version": [entry.version for entry in entries],
            "label": pa.nulls(len(entries), pa.string()),
        },
        schema=SCHEMA,
    )
    write_table(_part_uri(folder, job, number), table)


def write_table(uri: str, table: pa.Table, **options: Any) -> int:
    """Write a table as one Parquet object; its size in bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    data = buffer.getvalue()
    storage.write_bytes(uri, data)
    return len(data)


def _part_uri(folder: str, job: int, number: int) -> str:
    return storage.join(folder, f"part-{job:05d}-{number:05d}.parquet")
