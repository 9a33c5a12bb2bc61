"""Reading a body to its end, whatever happens to the connection on the way."""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from botocore.exceptions import ClientError, FlexibleChecksumError

from simclr_ray.errors import StorageError
from simclr_ray.storage.counting import METER
from simclr_ray.storage.kinds import ends_early, replaced
from simclr_ray.storage.retry import Deadline
from simclr_ray.storage.s3_errors import CHANGED, DamagedError, ReplacedError, ShortBodyError, code_of

SMALLEST, LARGEST = 4 << 10, 1 << 20
"""Bytes asked of the socket at a time. A call returns when all have come, so a slow store is asked for little, lest
the deadline be looked at too late."""
QUICK_S, SLOW_S = 0.05, 0.5


class Body:
    """The bytes `start` to `stop` of an object (to its end where `stop` is None), over as many attempts as it takes."""

    def __init__(
        self, uri: str, place: dict[str, str], deadline: Deadline, *,
        start: int = 0, stop: int | None = None, version: str | None = None,
    ) -> None:  # fmt: skip
        self._uri, self._place, self._deadline = uri, place, deadline
        self._start, self._wanted_stop, self._wanted_version = start, stop, version
        self._forget()

    def _forget(self) -> None:
        """Begin again: what came so far is of another version or damaged."""
        self._parts: list[bytes] = []
        self._attempts = 0
        self._checksum: str | None = None
        self._at, self._stop, self.version = self._start, self._wanted_stop, self._wanted_version

    def attempt(self, api: Any) -> bytes:
        """Ask for what is still missing and read it.

        Raises:
            OutOfRangeError: the object is shorter than `stop`.
            ChangedError: the store sends another version than the one asked for.
            StorageError: the deadline passed while bytes were still coming.
            Exception: botocore's, or one of `s3_errors`; what came before it is kept for the next attempt.
        """
        if self._stop is None or self._at < self._stop:
            try:
                self._attempts += 1
                self._read(self._ask(api))
            except (FlexibleChecksumError, ReplacedError):
                self._forget()
                raise
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        if self._attempts > 1 and self._checksum is not None and self._checksum != _crc32(data):
            self._forget()
            raise DamagedError("the pieces of the body do not fit the checksum of the whole")
        return data

    def _ask(self, api: Any) -> Any:
        """The response to a GET of the missing bytes; sets `_stop` and `version` from it."""
        whole = self._at == 0 and self._stop is None
        query = {} if whole else {"Range": f"bytes={self._at}-" + ("" if self._stop is None else f"{self._stop - 1}")}
        if self.version is not None:
            query["IfMatch"] = f'"{self.version}"'
        try:
            response = api.get_object(**self._place, **query)
        except ClientError as error:
            if code_of(error) in CHANGED and self._wanted_version is None:
                raise ReplacedError from None
            if code_of(error) in ("InvalidRange", "416"):
                raise ends_early(self._uri, self._start, self._stop or 0, _size_of(error)) from None
            raise
        self._check_version(response)
        self._check_place(response, whole)
        return response

    def _check_version(self, response: Any) -> None:
        """Hold the response to the version that was asked for: some stores do not look at `If-Match`."""
        tag = bare_tag(response.get("ETag"))
        if self.version is None:
            self.version = tag
        elif tag is not None and tag != self.version:
            response["Body"].close()
            raise ReplacedError if self._wanted_version is None else replaced(self._uri)

    def _check_place(self, response: Any, whole: bool) -> None:
        """Hold the response to what was asked."""
        if whole:
            self._stop = int(response["ContentLength"])
            self._checksum = response.get("ChecksumCRC32")
            self._deadline.allow_for(self._stop)
            return
        first, size = _content_range(response)
        if first != self._at or size is None:
            response["Body"].close()
            raise StorageError(
                "the store answers a range by something else", where=self._uri,
                got=f"Content-Range {response.get('ContentRange')!r}", expected=f"bytes from {self._at:,}",
                fix="this store, or a proxy before it, does not serve ranges; use one that does",
            )  # fmt: skip
        if self._stop is not None and size < self._stop:
            response["Body"].close()
            raise ends_early(self._uri, self._start, self._stop, size)
        self._deadline.allow_for((self._stop or size) - self._start)

    def _read(self, response: Any) -> None:
        assert self._stop is not None
        with closing(response["Body"]) as body:
            for chunk in _chunks(body):
                self._parts.append(chunk)
                self._at += len(chunk)
                METER.read(len(chunk))
                if not self._deadline.left and self._at < self._stop:
                    raise StorageError(
                        f"too slow: {self._at - self._start:,} of {self._stop - self._start:,} bytes in "
                        f"{self._deadline.elapsed:.1f} s",
                        where=self._uri, fix="check the network, or raise storage.deadline_s",
                    )  # fmt: skip
        if self._at > self._stop:
            self._forget()
            raise ShortBodyError("the body went on behind its announced end")
        if self._at < self._stop:
            raise ShortBodyError(f"{self._stop - self._at:,} bytes are missing")


def bare_tag(tag: object) -> str | None:
    """An ETag as versions are kept: without quotes, and without the mark of a weak one."""
    return str(tag).removeprefix("W/").strip('"') if tag else None


def _crc32(data: bytes) -> str:
    """Checksum as S3 writes it; botocore compares it only where one response brings the whole body."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _chunks(body: Any) -> Iterator[bytes]:
    """Pieces of a body, small while it comes slowly; the last, empty read makes botocore compare the checksum."""
    size = SMALLEST
    while True:
        begun = time.monotonic()
        chunk = body.read(size)
        if not chunk:
            return
        yield chunk
        spent = time.monotonic() - begun
        if spent < QUICK_S:
            size = min(2 * size, LARGEST)
        elif spent > SLOW_S:
            size = max(size // 4, SMALLEST)


def _content_range(response: Any) -> tuple[int | None, int | None]:
    """First byte and size of the whole from `Content-Range: bytes 0-9/100`; None for what it does not say."""
    try:
        unit, _, rest = response["ContentRange"].partition(" ")
        span, _, size = rest.partition("/")
        return (int(span.partition("-")[0]) if unit == "bytes" else None), int(size)
    except (KeyError, ValueError):
        return None, None


def _size_of(error: ClientError) -> int:
    """The object's size from the answer 416, whose `Content-Range` is `bytes */100`; -1 where it does not say."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    size = str(headers.get("content-range", "")).rpartition("/")[2]
    return int(size) if size.isdigit() else int(error.response.get("Error", {}).get("ActualObjectSize", -1))
