"""Tar files of samples (WebDataset's layout): where each member lies, and which byte ranges hold whole samples.

A sample is a run of neighbouring members that share a key, which is the member's path up to the first dot of its last
part: `a/00017.jpg` and `a/00017.cls` are the sample `a/00017`. Its image is the first member with an image's suffix.
Hidden files, names without a dot, folders, links and devices belong to no sample, and nothing is ever extracted.

`walk` reads headers alone (POSIX.1-2017 `pax`: ustar and pax blocks; GNU tar's manual for long names and base-256
numbers), `groups` cuts what it saw into ranges that are read with one request each, and `images` finds the samples in
such a range again. A group holds exactly as many images as `groups` counted: both go by the functions below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from simclr_ray import storage
from simclr_ray.errors import DataError

BLOCK = 512
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
IMAGE_BYTES = 100_000_000
"""An image above this is left out when a tar is indexed, for reading its group would read it too."""
OTHER_BYTES = 8 << 20
"""Any other member above this is kept out of the ranges that are read; a group ends before it."""
GROUP_BYTES = 256 << 20
"""A group of large images ends before it grows above this."""
_APART = 64 << 10
_NAME_BYTES = 1 << 20
"""Longest extended header; names have some hundred bytes."""
_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"
"""Links, devices, folders and pipes: whatever size their header claims, no data follows."""

Read = Callable[[int, int], bytes | memoryview]
"""Bytes start to stop of the file."""


class Member(NamedTuple):
    """One member as its header describes it; byte positions are in the file or range that was walked."""

    name: str
    start: int
    """Of its first header block, extended headers included."""
    data: int
    size: int
    regular: bool
    """Whether it is a file with its bytes in one piece."""

    @property
    def stop(self) -> int:
        """End of the data, without the padding to whole blocks."""
        return self.data + self.size


class Damage(Exception):
    """The tar cannot be walked further than byte `at`."""

    def __init__(self, at: int, what: str) -> None:
        self.at, self.what = at, what
        super().__init__(f"{what} at byte {at:,}")


def sample_key(name: str) -> str | None:
    """Key of the sample that a member belongs to; None for members that belong to none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    return folder + slash + stem if stem and dot else None


def extension(name: str) -> str:
    """What follows the key, in lower case and without the first dot: `seg.png` of `a/1.SEG.png`."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def walk(read: Read, size: int, *, whole: bool = True) -> Iterator[Member]:
    """Members of a tar, in order, from its headers.

    Args:
        read: Reads bytes; called with rising positions, for headers only.
        size: Bytes of the file, or of a range of it that begins at a member.
        whole: Whether the end-of-archive mark must be there; a range has none.

    Raises:
        Damage: after the last good member, when the rest cannot be understood or is missing.
    """
    at = start = 0
    long_name: str | None = None
    records: dict[str, str] = {}
    while at < size:
        if at + BLOCK > size:
            raise Damage(at, "the file ends inside a header")
        header = bytes(read(at, at + BLOCK))
        if not header.strip(b"\0"):
            return
        name, kind, length = _fields(header, at)
        data = at + BLOCK
        if kind in b"LKxg":  # extended headers: they describe the member that follows
            if length > _NAME_BYTES:
                raise Damage(at, f"an extended header claims {length:,} bytes")
            if data + length > size:
                raise Damage(at, "the file ends inside an extended header")
            body = bytes(read(data, data + length))
            if kind == b"L":
                long_name = _text(body)
            elif kind == b"x":
                records |= _records(body, at)
            at = data + _padded(length)
            continue
        if kind == b"S":
            data = _after_sparse_map(read, header, at, size)
        if records.get("size"):
            length = _decimal(records["size"], at)
        name = records.get("path") or long_name or name
        if kind in _WITHOUT_DATA:
            length = 0
        if data + length > size:
            raise Damage(at, f"the file ends inside a member of {length:,} bytes")
        sparse = any(key.startswith("GNU.sparse") for key in records)
        regular = kind in _REGULAR and not sparse and not (kind == b"\0" and name.endswith("/"))
        yield Member(name, start, data, length, regular)
        at = start = data + _padded(length)
        long_name, records = None, {}
    if whole:
        raise Damage(size, "the end-of-archive mark is missing")


def _fields(header: bytes, at: int) -> tuple[str, bytes, int]:
    """Name, type flag and size of a header block, whose checksum is verified."""
    # The checksum is the sum of all bytes, its own field taken as blanks; old writers summed signed bytes.
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if _number(header[148:156], at) not in (unsigned, signed):
        raise Damage(at, "what should be a header has a wrong checksum")
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name, header[156:157], _number(header[124:136], at)


def _number(field: bytes, at: int) -> int:
    """Octal digits, or base 256 where the highest bit is set (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise Damage(at, f"a number of the header is {field!r}") from None


def _decimal(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Damage(at, f"a size of the extended header is {text[:20]!r}")
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(body: bytes, at: int) -> dict[str, str]:
    """Records of a pax header: `LENGTH KEY=VALUE` and a line feed, the length counting all of it."""
    records, place = {}, 0
    while place < len(body) and body[place]:
        digits, blank, _ = body[place : place + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = body[place + len(digits) + 1 : place + length]
        if not blank or not record.endswith(b"\n") or b"=" not in record:
            raise Damage(at, "an extended header makes no sense")
        key, _, value = record[:-1].partition(b"=")
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
        place += length
    return records


def _after_sparse_map(read: Read, header: bytes, at: int, size: int) -> int:
    """Where the data of a GNU sparse member begins: further blocks of its map come first."""
    more, data = header[482], at + BLOCK
    while more:
        if data + BLOCK > size:
            raise Damage(at, "the file ends inside a sparse member's map")
        more, data = bytes(read(data, data + BLOCK))[504], data + BLOCK
    return data


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


@dataclass(frozen=True)
class TarGroups:
    """What a tar holds, cut into ranges of consecutive samples."""

    rows_per_group: tuple[int, ...]
    """Images of each range. A range of 0 is a gap: members too large to be read along with their neighbours."""
    offsets: tuple[int, ...]
    """Start of each range, and the end of the last; empty where there is no image."""
    without_image: int
    """Samples that have none; they are skipped."""
    too_large: int
    """Samples whose image is above `IMAGE_BYTES`; they are skipped."""
    damage: str | None
    """Why the tar was not read to its end; what is before that is used."""

    @property
    def rows(self) -> int:
        """Images of the tar."""
        return sum(self.rows_per_group)


class _Cutter:
    """Collects ranges: each of some samples' images, none of what is too large."""

    def __init__(self, unit_rows: int) -> None:
        self.unit_rows = unit_rows
        self.rows_per_group: list[int] = []
        self.offsets: list[int] = []
        self.start = self.stop = self.rows = 0
        self.after_gap = False

    def gap(self) -> None:
        """Nothing before this point shares a range with what follows."""
        self._close()
        self.after_gap = True

    def image(self, sample_start: int, stop: int) -> None:
        """One more image, of a sample that can be read from `sample_start` on."""
        if self.rows == self.unit_rows or (self.rows and stop - self.start > GROUP_BYTES):
            self._close()
        if not self.rows:
            # What lies between two ranges is read along where it is little: folders, or samples without an image.
            apart = self.after_gap or sample_start - _padded(self.stop) > _APART
            if self.rows_per_group and apart:
                self.rows_per_group.append(0)
                self.offsets.append(self.stop)
            self.start, self.after_gap = sample_start, False
        self.rows, self.stop = self.rows + 1, stop

    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and offsets of all ranges."""
        self._close()
        return tuple(self.rows_per_group), (*self.offsets, self.stop) if self.rows_per_group else ()

    def _close(self) -> None:
        if self.rows:
            self.rows_per_group.append(self.rows)
            self.offsets.append(self.start)
        self.rows = 0


def groups(members: Iterable[Member], unit_rows: int, *, where: str = "tar") -> TarGroups:
    """Cut a tar into ranges of `unit_rows` images; the last, and those before a large member, hold fewer.

    Args:
        members: As `walk` yields them; `Damage` that it raises ends the tar there.
        unit_rows: Images of a range.
        where: The tar's URI, for messages.

    Raises:
        DataError: a sample's members are not neighbours, or two of them have one name: which belong together cannot
            be told without reading the whole tar.
    """
    cut = _Cutter(unit_rows)
    seen: set[str] = set()
    key, names = None, set[str]()
    begun: int | None = None  # where the part of this sample begins that can be read
    found = skipped = in_range = True  # nothing is counted before the first sample
    without_image = too_large = 0
    damage = None
    try:
        for member in members:
            image = member.regular and is_image(member.name)
            own = sample_key(member.name) if member.regular else None
            if own is not None and own != key:
                without_image += not (found or skipped)
                if own in seen:
                    raise _apart(own, where)
                seen.add(own)
                key, names = own, set()
                begun, found, skipped, in_range = None, False, False, False
            if own is not None:
                if extension(member.name) in names:
                    raise _twice(member.name, where)
                names.add(extension(member.name))
            if member.size > (IMAGE_BYTES if image else OTHER_BYTES):
                cut.gap()
                begun, in_range = None, False
                if image and own is not None and not found and not skipped:
                    too_large, skipped = too_large + 1, True
                continue
            if own is None:
                continue
            begun = member.start if begun is None else begun
            if image and not found and not skipped:
                cut.image(begun, member.stop)
                found = in_range = True
            elif in_range:
                cut.stop = member.stop
    except Damage as error:
        damage = str(error)
    without_image += not (found or skipped)
    rows_per_group, offsets = cut.layout()
    return TarGroups(rows_per_group, offsets, without_image, too_large, damage)


def _apart(key: str, where: str) -> DataError:
    return DataError(
        f'members of the sample "{_shown(key)}" are not neighbours, or two samples have this key', where=where,
        expected="all members of a sample one after another, and each key once",
        fix="write the tar sorted by name (tar --sort=name), with a key of its own for each sample",
    )  # fmt: skip


def _twice(name: str, where: str) -> DataError:
    return DataError(
        f'the member "{_shown(name)}" is there twice', where=where, expected="each name once",
        fix="write the tar again; tar -r and tar -u append a changed file instead of replacing it",
    )  # fmt: skip


def _shown(name: str) -> str:
    """A name from a file as printable ASCII."""
    return ascii(name)[1:-1][:200]


class Sample(NamedTuple):
    """An image in a range, and what lies beside it."""

    key: str
    image: Member
    others: tuple[Member, ...]
    """Members of the same sample."""


def images(data: bytes | memoryview) -> Iterator[Sample]:
    """Samples with an image in one range of a tar, in order; as many as `groups` counted for it.

    Raises:
        Damage: the range cannot be understood: it is not what was indexed.
    """

    def finished(key: str | None, run: list[Member]) -> Iterator[Sample]:
        image = next((member for member in run if is_image(member.name)), None)
        if key is not None and image is not None:
            yield Sample(key, image, tuple(member for member in run if member is not image))

    key: str | None = None
    run: list[Member] = []
    for member in walk(lambda start, stop: data[start:stop], len(data), whole=False):
        own = sample_key(member.name) if member.regular else None
        if own is None:
            continue
        if own != key:
            yield from finished(key, run)
            key, run = own, []
        run.append(member)
    yield from finished(key, run)


class Windows:
    """Reads a stored file forwards for `walk`: small windows where bodies are jumped over, large where they are not.

    A body is worth a request of its own where reading it takes longer than a request does: above some 2 MiB, for a
    store that answers in 25 ms and gives one reader 80 MB/s. So a window doubles, up to 8 MiB, while the next header
    is in it or just behind it, and starts small again after a jump. Tars of usual photos are thus read through, those
    of large members by their headers alone. Requests and MiB read, and seconds at the figures above, for tars of
    samples of an image, a text and a JSON member:

        tar                       these windows        headers alone      read through
        2500 x 50 kB, 125 MiB     22, 124, 2.2 s    7501,   3, 188 s     16, 125, 2.0 s
        1000 x 110 kB, 107 MiB    20, 106, 1.9 s    3001,   1,  75 s     14, 106, 1.7 s
        40 x 4 MB, 152 MiB        41,   2, 1.1 s     121,   0, 3.0 s     14, 107, 1.8 s

    A local file is read by small windows always, for there a request costs nothing.
    """

    FIRST, LARGEST = 64 << 10, 8 << 20
    JUMP = 2 << 20

    def __init__(self, uri: str, size: int, version: str | None = None) -> None:
        self._uri, self._size, self._version = uri, size, version
        self._local = storage.is_local(uri)
        self._at, self._data = 0, b""
        self._window = self.FIRST
        self.requests = self.bytes = 0

    def __call__(self, start: int, stop: int) -> memoryview:
        """Bytes start to stop.

        Raises:
            StorageError: the store fails, or the file has another version now.
            FileNotFoundError: it is gone.
        """
        end = self._at + len(self._data)
        if not (self._at <= start and stop <= end):
            near = start - end <= self.JUMP
            if self.requests and not self._local:
                self._window = min(2 * self._window, self.LARGEST) if near else self.FIRST
            upto = min(self._size, max(stop, start + self._window))
            self._at = start
            self._data = storage.read_range(self._uri, start, upto, version=self._version)
            self.requests += 1
            self.bytes += len(self._data)
        return memoryview(self._data)[start - self._at : stop - self._at]
