"""The checksum of a canonical shard's footer, which Parquet itself has none for.

It lies right before the footer, in a gap that readers of Parquet do not look at: they find the footer from the file's
end and the pages from the footer. A damaged footer that is parsed can do anything, from other rows to the end of the
process, so it is held to its checksum first. Shards without one are read as they are.
"""

from __future__ import annotations

import zlib

_MARK = b"footcrc1"
SEAL_BYTES = len(_MARK) + 4
"""Before the footer: a mark, and CRC-32 of all from the footer's start to the file's end."""


def seal(data: bytes) -> bytes:
    """A Parquet file with its footer's checksum put in."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:]
    return b"".join((data[:start], _MARK, _crc32(footer), footer))


def is_sealed(before: bytes) -> bool:
    """Whether the `SEAL_BYTES` bytes before a footer are a checksum, as in every file that this project writes."""
    return before.startswith(_MARK)


def is_damaged(before: bytes, footer: bytes) -> bool:
    """Whether a footer does not fit its checksum.

    Args:
        before: The `SEAL_BYTES` bytes before the footer.
        footer: All from the footer's start to the file's end.
    """
    return before.startswith(_MARK) and before[len(_MARK) :] != _crc32(footer)


def _crc32(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
