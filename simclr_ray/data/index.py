"""Make a data set of what is there already: a manifest over tars, Parquet files or loose images where they lie.

Listing, opening and writing lists go on after a kill with what was done, unless the source is a list that changed; the
manifest is written last. Samples keep the order of the URIs, but loose images are put into an order by seed, up to
`SHUFFLED_WHOLE` of them: neighbours in a folder would else be read as one unit and end up in one batch.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data import tasks
from simclr_ray.data.listing import Listing, write_table
from simclr_ray.data.manifest import (
    MANIFEST_NAME,
    UNIT_ROWS,
    Manifest,
    Shard,
    ShardTable,
    read_manifest,
    shard_from_file,
    write_manifest,
)  # fmt: skip
from simclr_ray.data.open_shards import open_batch
from simclr_ray.data.read import IMAGE_BYTES
from simclr_ray.data.shards import shuffled
from simclr_ray.data.sizes import Sizes, reads_of_a_byte
from simclr_ray.data.sources import Found, Labels, SourceKind, look, state_of
from simclr_ray.data.work import LISTING, OPENED, REJECTED_NAME, REPORT_NAME, SOURCE_STATE, Claim, claim, finish
from simclr_ray.errors import ConfigError, DataError

SHARDS_A_TASK = 16
LIST_ROWS = 8192
"""Images of one list: at 64 a unit its footer has 128 row groups, some 50 kB that each reader of it fetches once."""
SHUFFLED_WHOLE = 4_000_000
"""Loose images that are put into one random order; more stay in the order of their URIs, and only units are mixed."""
MOST_READS = 2.0
"""Bytes read for each byte of images stored, above which packing is advised."""
_WRITERS = 16
_DETAIL_LENGTH = 500
_MANIFEST_COLUMNS = ("uri", "kind", "digest", "version", "bytes", "rows_per_group", "offsets")
REJECTED_SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class IndexOptions:
    """What decides an index."""

    kind: SourceKind | None = None
    """Take only files of this kind; None finds out what the source is."""
    column: str | None = None
    """Column that holds the images (`image.bytes` for a field of a struct), or the addresses of a list."""
    labels: Labels = "none"
    """`folder`: the name of a loose image's folder; `list`: the list's second column, or its column `label`;
    `stored`: a tar's `.cls` members or a Parquet file's column."""
    label_column: str = "label"
    """Column of a Parquet file that holds its labels."""
    seed: int = 0
    """Of the order of loose images."""
    unit_rows: int = UNIT_ROWS
    """Images of a unit."""


@dataclass(frozen=True)
class IndexReport:
    """What `index` did."""

    manifest: Manifest
    rejected: Mapping[str, int]
    """Reason -> shards that are left out, or of which only a part is used (`shard_truncated`)."""
    counts: Mapping[str, int]
    """Further counts, as in `index_report.json`."""
    notes: Sequence[str] = ()
    """Sentences about what training over the index will be like, also in `index_report.json`."""


def index(
    source: str,
    destination: str,
    options: IndexOptions | None = None,
    *,
    ray_ready: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> IndexReport:
    """Write a manifest for the shards or images of `source` into `destination`; nothing is copied.

    Args:
        source: Folder or list; see `sources.look`.
        destination: Empty or absent folder, or one in which the same work was begun.
        options: What decides the result.
        ray_ready: Makes a context in which Ray is connected; entered once the destination is found good.

    Raises:
        DataError: nothing to read, none of it readable, or samples of a tar are not told apart by their keys.
        ConfigError: the destination is not empty, other work was begun there, or the source is ambiguous.
    """
    source, destination = storage.normalise(source), storage.normalise(destination)
    options = options or IndexOptions()
    if storage.exists(storage.join(source, MANIFEST_NAME)):
        raise ConfigError("is a data set already, which can be trained on as it is", where=source)
    if storage.is_local(source) and Path(source).is_dir() and not storage.is_local(destination):
        raise ConfigError(
            "an index in a store may not name files of the machines that read it", where=destination, got=source,
            fix="put the index beside the files, or pack them into the store",
        )  # fmt: skip
    settings = {"verb": "index", "source": source, SOURCE_STATE: state_of(source, options.kind)}
    claimed = claim(destination, settings | asdict(options))
    found = survey(source, destination, options, claimed)
    with ray_ready():
        manifest = build(found, source, destination, options)
    report = json.loads(storage.read_bytes(storage.join(destination, REPORT_NAME)))
    finish(destination)
    return IndexReport(manifest, report["rejected"], report["counts"], report.get("notes", []))


def survey(source: str, folder: str, options: IndexOptions, claimed: Claim) -> Found | None:
    """List a source and find out what it is; None where its index in `folder` is finished.

    Raises:
        DataError: there is nothing of use.
        ConfigError: the source is ambiguous or has no such labels. A claim that is new is withdrawn at both.
    """
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        return None
    try:
        found = look(
            source, storage.join(folder, LISTING), kind=options.kind, labels=options.labels, column=options.column,
            leave_out=[f"{claimed.folder}/"],
        )  # fmt: skip
        _refuse_labels(source, found.kind, options.labels)
    except (DataError, ConfigError):
        claimed.withdraw()
        raise
    return found


def build(found: Found | None, source: str, folder: str, options: IndexOptions) -> Manifest:
    """The manifest of a source, written to `folder` with its report; taken from there where that was done before.

    A data set is its own index. Ray must be connected for tars and Parquet files.
    """
    if found is None:
        return read_manifest(folder, ours=True)
    if found.kind == "data_set":
        return read_manifest(source)
    made = _lists(found, folder, options) if found.kind == "objects" else _opened(found, source, folder, options)
    about: dict[str, Any] = {"source": source, "kind": found.kind, "labels": options.labels}
    about |= {"files": found.entries.rows, "bytes": found.entries.bytes, **made.about}
    manifest = replace(made.manifest, source=about | {"seed": options.seed} if made.shuffled else about)
    counts = dict(made.counts) | {"shards": len(manifest.shards), "images": manifest.rows}
    if isinstance(found.entries, Listing):
        counts["listing_pages"] = sum(part.pages for part in found.entries.parts)
        counts["listing_jobs"] = len(found.entries.parts)
    counts |= {f"listed_{kind}": count for kind, count in sorted(found.entries.kinds.items())}
    report = {**about, "rejected": Counter(entry["reason"] for entry in made.rejected), "counts": counts}
    report["notes"] = _notes(manifest, found.kind)
    if found.kind == "parquet":
        report["read_per_stored"] = round(reads_of_a_byte(manifest), 2)
    if made.rejected:
        write_table(storage.join(folder, REJECTED_NAME), pa.Table.from_pylist(made.rejected, schema=REJECTED_SCHEMA))
    storage.write_bytes(storage.join(folder, REPORT_NAME), json.dumps(report, indent=1).encode())
    write_manifest(manifest)
    return manifest


@dataclass(frozen=True)
class _Made:
    manifest: Manifest
    rejected: list[dict[str, str]]
    counts: Mapping[str, int]
    shuffled: bool = False
    """Whether the rows are in an order by seed."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is noted in the manifest's `source`."""


def _notes(manifest: Manifest, kind: str) -> list[str]:
    """What training over an index will be like, in sentences."""
    if kind == "parquet":
        times = reads_of_a_byte(manifest)
        note = f"an epoch will read {times:.1f} bytes for each byte of images stored"
        if times > MOST_READS:
            note += (
                f": each unit of {manifest.unit_rows} images reads all of its row group, and these are larger; pack "
                "the source, which makes small ones"
            )
        return [note]
    if kind == "objects" and "seed" not in manifest.source:
        return [
            f"above {SHUFFLED_WHOLE:,} loose images keep the order of their URIs, or of their list if that is Parquet: "
            f"unless it is random, neighbours in a folder share a unit of {manifest.unit_rows} and only units are "
            "mixed; pack them, which mixes such runs over all shards and single images within each, or give a Parquet "
            "list in a random order"
        ]
    return []


def _refuse_labels(source: str, kind: str, labels: Labels) -> None:
    """Raises: ConfigError: labels of a kind that such a source cannot have."""
    possible: dict[str, tuple[str, ...]] = {"objects": ("none", "folder", "list")}
    if labels not in possible.get(kind, ("none", "stored")):
        raise ConfigError(
            f"labels={labels} does not fit a source of the kind {kind}", where=source,
            expected=" or ".join(possible.get(kind, ("none", "stored"))),
        )  # fmt: skip


# --- loose images ---------------------------------------------------------------------------------------------------


def _lists(found: Found, folder: str, options: IndexOptions) -> _Made:
    """Lists of loose images, in an order by seed where they fit into memory."""
    classes = _classes(found, options.labels)
    sizes = Sizes(found.entries.rows)
    tables: Iterator[pa.Table] = (
        _numbered(table, classes, options.labels) for table in map(sizes.seen, found.tables())
    )
    whole_order = found.entries.rows <= SHUFFLED_WHOLE
    if whole_order:
        whole = pa.concat_tables(tables).combine_chunks()
        tables = iter([whole.take(shuffled(len(whole), options.seed))])
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="lists") as pool:
        shards = [
            shard
            for some in _batches(_rechunked(tables, LIST_ROWS), 4 * _WRITERS)
            for shard in pool.map(lambda one: _write_list(folder, one[0], one[1], options.unit_rows), some)
        ]
    manifest = Manifest(folder, shards, unit_rows=options.unit_rows, classes=classes)
    mean = sizes.mean()
    return _Made(manifest, [], {}, whole_order, {} if mean is None else {IMAGE_BYTES: mean})


def _classes(found: Found, labels: Labels) -> tuple[str, ...]:
    """Names of the classes, sorted."""
    if labels == "none":
        return ()
    names: set[str] = set()
    for table in found.tables():
        names.update(name for name in _label_texts(table, labels).unique().to_pylist() if name is not None)
    return tuple(sorted(names))


def _label_texts(table: pa.Table, labels: Labels) -> pa.Array | pa.ChunkedArray:
    if labels == "list":
        return table["label"]
    return pa.array([_folder_name(uri) for uri in table["uri"].to_pylist()], pa.string())


def _folder_name(uri: str) -> str | None:
    """Name of the folder that holds a file."""
    parts = uri.split("/")
    return parts[-2] if len(parts) > 1 else None


def _numbered(table: pa.Table, classes: Sequence[str], labels: Labels) -> pa.Table:
    """Entries with their labels as numbers, or without labels."""
    plain = table.drop_columns("label")
    if labels == "none":
        return plain
    numbers = pc.index_in(_label_texts(table, labels), value_set=pa.array(classes, pa.string()))
    return plain.append_column("label", numbers.cast(pa.int32()))


def _rechunked(tables: Iterator[pa.Table], rows: int) -> Iterator[tuple[int, pa.Table]]:
    """The same rows in tables of exactly `rows`, the last one shorter, with their numbers."""
    waiting: list[pa.Table] = []
    number = 0
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) < rows:
            continue
        joined = pa.concat_tables(waiting)
        for start in range(0, joined.num_rows - rows + 1, rows):
            yield number, joined.slice(start, rows)
            number += 1
        waiting = [joined.slice(joined.num_rows // rows * rows)]
    if sum(one.num_rows for one in waiting):
        yield number, pa.concat_tables(waiting)


def _batches(items: Iterator[Any], count: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_list(folder: str, number: int, table: pa.Table, unit_rows: int) -> Shard:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=unit_rows, compression="zstd", use_dictionary=False,
                   write_statistics=False)  # fmt: skip
    data, name = buffer.getvalue(), f"list-{number:05d}.parquet"
    version = storage.write_bytes(storage.join(folder, name), data)
    groups = [min(unit_rows, table.num_rows - start) for start in range(0, table.num_rows, unit_rows)]
    return replace(shard_from_file(name, data, groups, version=version), kind="objects")


# --- tars and Parquet files -----------------------------------------------------------------------------------------


def _opened(found: Found, source: str, folder: str, options: IndexOptions) -> _Made:
    """Shards of others, described by Ray tasks that read their headers or footers."""
    uris = [uri for table in found.tables() for uri in table["uri"].to_pylist()]
    notes = storage.join(folder, OPENED)
    names = [f"batch-{start:07d}.parquet" for start in range(0, len(uris), SHARDS_A_TASK)]
    done = set(storage.list_names(notes))
    labels = options.label_column if options.labels == "stored" else None
    calls = [
        (uris[number * SHARDS_A_TASK : (number + 1) * SHARDS_A_TASK], found.kind, options.unit_rows, labels,
         storage.join(notes, name))
        for number, name in enumerate(names) if name not in done
    ]  # fmt: skip
    for _ in tasks.run(open_batch, calls):
        pass
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="opened") as pool:
        read = pool.map(lambda name: pq.read_table(io.BytesIO(storage.read_bytes(storage.join(notes, name)))), names)
        opened = pa.concat_tables(read)
    column = _image_column(opened, source, options.column) if found.kind == "parquet" else "image"
    rejected, usable = _judged(opened, column if found.kind == "parquet" else None)
    if not usable.any():
        empty = pc.sum(pc.and_(pc.equal(opened["reason"], ""), pc.equal(opened["rows"], 0))).as_py() or 0
        first = f"; the first: {rejected[0]['uri']}: {rejected[0]['detail']}" if rejected else ""
        raise DataError(
            f"none of {len(opened):,} {found.kind} files can be used", where=source,
            got=f"{_reasons(rejected)}{first}" if rejected else f"{empty:,} empty ones",
        )  # fmt: skip
    kept = opened.filter(pa.array(usable)).append_column("kind", pa.array([found.kind] * int(usable.sum())))
    columns = {name: kept[name] for name in _MANIFEST_COLUMNS}
    table = ShardTable.from_arrow(pa.table(columns))
    manifest = Manifest(folder, table, unit_rows=options.unit_rows, image_column=column, classes=_names(opened))
    totals = ("without_image", "too_large", "requests", "read")
    counts = {name: pc.sum(opened[name]).as_py() or 0 for name in totals}
    counts["empty"] = int(np.sum((opened["rows"].to_numpy() == 0) & (np.array(opened["reason"].to_pylist()) == "")))
    counts["row_groups" if found.kind == "parquet" else "groups"] = len(manifest.table.rows_per_group)
    return _Made(manifest, rejected, counts)


def _judged(opened: pa.Table, column: str | None) -> tuple[list[dict[str, str]], np.ndarray]:
    """What is left out or used in part, with reasons, and which shards are used."""
    rejected, usable = [], np.zeros(len(opened), dtype=bool)
    light = opened.select(["uri", "rows", "reason", "detail", "columns", "all_columns", "too_large_columns"])
    for number, row in enumerate(light.to_pylist()):
        reason, detail = row["reason"], row["detail"]
        if not reason and column is not None and column not in row["columns"]:
            reason, detail = "no_column", f'no column "{column}" of images; it has {row["all_columns"]}'
        elif not reason and column in row["too_large_columns"]:
            reason, detail = "row_group_too_large", "a row group is above 512 MiB: write the file with smaller ones"
        if reason:
            rejected.append({"uri": row["uri"], "reason": reason, "detail": ascii(detail)[1:-1][:_DETAIL_LENGTH]})
        usable[number] = row["rows"] > 0 and reason in ("", "shard_truncated")
    return rejected, usable


def _image_column(opened: pa.Table, source: str, wanted: str | None) -> str:
    """The column that holds the images of Parquet files.

    Raises:
        DataError: no file has it, or there are several that could be it.
    """
    readable = opened.filter(pc.equal(opened["reason"], ""))
    found = Counter(name for names in readable["columns"].to_pylist() for name in names)
    if wanted is not None and (found[wanted] or not len(readable)):
        return wanted
    everywhere = [name for name, count in found.items() if count == len(readable)]
    if wanted is None and len(everywhere) == 1:
        return str(everywhere[0])
    if not len(readable):
        return "image"  # no file can be read, which is said where that is found
    first = str(readable["all_columns"][0].as_py())
    if wanted is not None or not found:
        what = f'no column "{wanted}" of encoded images' if wanted else "no column of encoded images"
        fix = f"name one with --column: {' or '.join(sorted(found))}" if found else None
        raise DataError(what, where=source, got=first, expected="binary values, one a row", fix=fix)
    raise DataError(
        "which column holds the images cannot be told", where=source, got=", ".join(sorted(found)),
        fix="name it with --column",
    )  # fmt: skip


def _names(opened: pa.Table) -> tuple[str, ...]:
    """Names of the classes: those that the files agree on, or all labels that are text."""
    some = [names for names in opened["label_names"].to_pylist() if names]
    if not some:
        return ()
    if pc.any(opened["text_labels"]).as_py():
        return tuple(sorted({name for names in some for name in names}))
    return tuple(some[0])


def _reasons(rejected: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(e["reason"] for e in rejected).most_common())
