"""Samples of a tar's group: one range read, then the headers inside it. Nothing is ever extracted to disk."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from simclr_ray.data import ranges, tar
from simclr_ray.data.ranges import Source
from simclr_ray.errors import DataError

LABEL, KEY = "label", "key"
_LABEL_EXTENSION = "cls"


def read_group(
    source: Source, group: int, rows: int, columns: Sequence[str], *, start: int, stop: int, images: str
) -> pa.Table:
    """Samples of one group of a tar.

    Args:
        source: The shard.
        group: Number of the group.
        rows: Images it holds, as the manifest knows.
        columns: `images`, or `label`: the number in the sample's `.cls` member, null where there is none, or `key`.
        start: First byte of the group.
        stop: Byte after the last.
        images: What the column of images is called.

    Raises:
        LostShard: the shard is gone or damaged, or the group is too large.
        DataError: it is another shard than the manifest's, or has no such column, or a label is no number.
        StorageError: the store fails.
    """
    unknown = [name for name in columns if name not in (images, LABEL, KEY)]
    if unknown:
        raise DataError(f'no column "{unknown[0]}"', where=source.uri, got=f"a tar, which has {images}, {LABEL}, {KEY}")
    if stop - start > ranges.GROUP_BYTES:
        raise ranges.too_large(source.uri, group, stop - start)
    ranges.verify(source)
    data = memoryview(ranges.read(source, start, stop))
    try:
        samples = list(tar.images(data))
    except tar.Damage as damage:
        raise ranges.unreadable(source.uri, f"{damage.what} at byte {start + damage.at:,}") from None
    if len(samples) != rows:
        raise ranges.unreadable(source.uri, f"group {group} has {len(samples)} images where {rows} were found before")
    made = {}
    if images in columns:
        encoded = [data[s.image.data : s.image.stop] for s in samples]
        made[images] = pa.array(encoded, pa.binary())
    if LABEL in columns:
        made[LABEL] = pa.array([_label(data, s, source.uri) for s in samples], pa.int64())
    if KEY in columns:  # names may be any bytes, a table's text may not
        made[KEY] = pa.array([s.key.encode("utf-8", "backslashreplace").decode() for s in samples], pa.string())
    return pa.table({name: made[name] for name in columns})


def _label(data: memoryview, sample: tar.Sample, uri: str) -> int | None:
    for member in sample.others:
        if tar.extension(member.name) == _LABEL_EXTENSION:
            text = bytes(data[member.data : member.stop][:32]).strip()
            if not text.isdigit():
                raise DataError(f"the label of sample {sample.key!a} is no number", where=uri, got=ascii(text))
            return int(text)
    return None
