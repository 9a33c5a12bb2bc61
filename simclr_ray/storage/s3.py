"""S3 and stores that speak its protocol.

Each operation is tried again as a whole while what stops it may pass (`retry`, `s3_errors`); a body that breaks off
goes on from the byte reached, held to the version that its beginning had. A put is whole or not at all by the
protocol; large ones go up in parts and appear when the last call closes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from botocore.exceptions import ClientError

from simclr_ray.errors import StorageError
from simclr_ray.storage import settings as settings_
from simclr_ray.storage.counting import METER
from simclr_ray.storage.kinds import Entry, Stat, replaced
from simclr_ray.storage.retry import Deadline, Fault, GaveUp, repeat
from simclr_ray.storage.s3_body import Body, bare_tag
from simclr_ray.storage.s3_client import Client, client, had_credentials, renew
from simclr_ray.storage.s3_errors import ABSENT, CHANGED, EXPIRED, UNRESOLVED, code_of, explain, judge, status_of
from simclr_ray.storage.uris import bucket_and_key

MULTIPART_BYTES = 64 << 20
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
UPLOADS = 4
DELETE_BATCH = 1000
CREDENTIALS_S = 10.0
"""How long credentials that were there before and are not found now are looked for again: a role's service may be
overloaded for a moment, as when all processes of a cluster ask it at once."""

T = TypeVar("T")


class S3Store:
    """The backend for `s3://`."""

    swaps: ClassVar[bool] = True

    def describe(self, uri: str) -> str:
        """Bucket, endpoint, and which link of the chain gave the credentials."""
        bucket, _ = bucket_and_key(uri)
        ours = client(settings_.current())
        return f"bucket {bucket} at {ours.place}; credentials: {ours.origin}"

    def read(self, uri: str) -> tuple[bytes, str | None]:
        """Whole object and its ETag; checksums that the store keeps are compared."""
        operation = _Operation(uri, "read")
        body = Body(uri, operation.place, operation.deadline)
        data = operation.run(lambda api, _: body.attempt(api))
        return data, body.version

    def read_range(self, uri: str, start: int, stop: int, version: str | None) -> bytes:
        """Bytes start to stop of that version."""
        operation = _Operation(uri, "read")
        body = Body(uri, operation.place, operation.deadline, start=start, stop=stop, version=version)
        return operation.run(lambda api, _: body.attempt(api))

    def stat(self, uri: str) -> Stat:
        """One HEAD."""

        def attempt(api: Any, _: int) -> Stat:
            head = _head(api, operation.place)
            return Stat(int(head["ContentLength"]), _tag(head), head["LastModified"].timestamp())

        operation = _Operation(uri, "looked up")
        return operation.run(attempt)

    def write(self, uri: str, data: bytes) -> str | None:
        """One put, or parts that appear together."""
        return self._put(uri, data, {})

    def create(self, uri: str, data: bytes) -> bool:
        """Put with `If-None-Match: *`."""
        return self._put(uri, data, {"IfNoneMatch": "*"}) is not None

    def replace(self, uri: str, data: bytes, version: str) -> str | None:
        """Put with `If-Match`."""
        return self._put(uri, data, {"IfMatch": version})

    def scan(self, uri: str) -> Iterator[list[Entry]]:
        """Pages of at most 1000, in the order of the keys' bytes."""
        for page in _pages(uri):
            if entries := [one for one in _entries(uri, page) if not one.uri.endswith("/")]:
                yield entries

    def level(self, uri: str) -> tuple[list[str], list[Entry]]:
        """Common prefixes up to the next slash, and objects of this level."""
        folders: list[str] = []
        entries: list[Entry] = []
        for page in _pages(uri, Delimiter="/"):
            base = _base(uri)
            folders += [base + one["Prefix"].rstrip("/") for one in page.get("CommonPrefixes", [])]
            entries += [one for one in _entries(uri, page) if not one.uri.endswith("/")]
        return folders, entries

    def exists(self, uri: str) -> bool:
        """Whether there is an object, or any object below."""
        if bucket_and_key(uri)[1]:
            with contextlib.suppress(FileNotFoundError):
                self.stat(uri)
                return True
        return bool(next(_pages(uri, MaxKeys=1)).get("KeyCount"))

    def delete_file(self, uri: str) -> None:
        """Delete; the store says nothing when it was absent."""
        operation = _Operation(uri, "deleted")
        with contextlib.suppress(FileNotFoundError):
            operation.run(lambda api, _: api.delete_object(**operation.place))

    def delete_folder(self, uri: str) -> None:
        """Delete all below, a page at a time."""
        bucket, key = bucket_and_key(uri)
        if not key:
            raise StorageError("a whole bucket is never deleted", where=uri)
        for page in _pages(uri):
            keys = [{"Key": one["Key"]} for one in page.get("Contents", [])]
            for first in range(0, len(keys), DELETE_BATCH):
                _delete_batch(uri, bucket, keys[first : first + DELETE_BATCH])

    def _put(self, uri: str, data: bytes, condition: dict[str, str]) -> str | None:
        """Put under a condition; None when the condition does not hold."""
        operation = _Operation(uri, "written")
        operation.deadline.allow_for(len(data))
        upload = _put_parts if len(data) > MULTIPART_BYTES else _put_whole

        def attempt(api: Any, failures: int) -> str | None:
            try:
                return upload(api, operation, data, condition)
            except ClientError as error:
                if not condition or (code_of(error) not in CHANGED and code_of(error) not in ABSENT):
                    raise
                # An attempt whose answer was lost may have been the one that won.
                return self._own_version(uri, data) if failures else None

        version = operation.run(attempt)
        if version is not None or not condition:
            METER.wrote(len(data))
        return version

    def _own_version(self, uri: str, data: bytes) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            there, version = self.read(uri)
            if there == data:
                return version
        return None


class _Operation:
    """One operation on one URI: runs attempts under a deadline and explains what went wrong."""

    def __init__(self, uri: str, verb: str) -> None:
        self.uri, self.verb = uri, verb
        bucket, key = bucket_and_key(uri)
        self.place = {"Bucket": bucket, "Key": key}
        self._settings = settings_.current()
        self.deadline = Deadline(self._settings.deadline_s)
        self._client: Client | None = None
        self._renewed = False
        self._without: float | None = None
        """When credentials were missed first, in seconds of `deadline.elapsed`."""

    def run(self, attempt: Callable[[Any, int], T]) -> T:
        """Raises: FileNotFoundError where there is no such object, ChangedError, StorageError."""

        def once(failures: int) -> T:
            fresh = self._client is None
            self._client = client(self._settings)
            if fresh:
                self.deadline.restart()  # making a process's first client takes a while, which is not the store's
            return attempt(self._client.api, failures)

        try:
            return repeat(once, self._judge, self.deadline, what=self.uri)
        except GaveUp as gave_up:
            cause = gave_up.__cause__
            if code_of(cause) in ABSENT:
                raise FileNotFoundError(2, "no such object", self.uri) from None
            if code_of(cause) in CHANGED:
                raise replaced(self.uri) from None
            raise explain(gave_up, self.uri, self.verb, self._client) from None

    def _judge(self, error: Exception) -> Fault:
        if code_of(error) in EXPIRED:
            if self._renewed or self._client is None:
                return Fault("expired token", passing=False)
            self._renewed = True
            renew(self._client)
        if isinstance(error, UNRESOLVED) and had_credentials():
            self._without = self.deadline.elapsed if self._without is None else self._without
            if self._client is not None:
                renew(self._client)
            return Fault("credentials", passing=self.deadline.elapsed - self._without < CREDENTIALS_S)
        return judge(error)


def _head(api: Any, place: dict[str, str]) -> Any:
    """HEAD; a refusal of HEAD has no body, so the reason is asked for by a GET of one byte."""
    try:
        return api.head_object(**place)
    except ClientError as error:
        if status_of(error) in (301, 307, 400, 403, 404):
            api.get_object(**place, Range="bytes=0-0")["Body"].close()
        raise


def _put_whole(api: Any, operation: _Operation, data: bytes, condition: dict[str, str]) -> str | None:
    return _tag(api.put_object(**operation.place, Body=data, **condition))


def _put_parts(api: Any, operation: _Operation, data: bytes, condition: dict[str, str]) -> str | None:
    """Upload in parts, in parallel, each with its own attempts; what fails leaves nothing behind."""
    upload = {"UploadId": api.create_multipart_upload(**operation.place)["UploadId"]}
    size = max(PART_BYTES, -(-len(data) // MAX_PARTS))
    view = memoryview(data)

    def part(number: int) -> dict[str, Any]:
        piece = bytes(view[(number - 1) * size : number * size])
        answer = _Operation(operation.uri, operation.verb).run(
            lambda api, _: api.upload_part(**operation.place, **upload, PartNumber=number, Body=piece)
        )
        checksums = {
            name: value for name, value in answer.items() if name.startswith("Checksum") and "Type" not in name
        }
        return {"PartNumber": number, "ETag": answer["ETag"]} | checksums

    try:
        with ThreadPoolExecutor(UPLOADS, thread_name_prefix="storage-upload") as pool:
            parts = list(pool.map(part, range(1, -(-len(data) // size) + 1)))
        return _tag(
            api.complete_multipart_upload(**operation.place, **upload, MultipartUpload={"Parts": parts}, **condition)
        )
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            api.abort_multipart_upload(**operation.place, **upload)
        raise


def _pages(uri: str, **options: Any) -> Iterator[Any]:
    """Pages of a listing, each with its own attempts."""
    bucket, key = bucket_and_key(uri)
    query: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **options}
    while True:
        page = _Operation(uri, "listed").run(lambda api, _: api.list_objects_v2(**query))
        yield page
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]


def _entries(uri: str, page: Any) -> list[Entry]:
    base = _base(uri)
    return [Entry(base + one["Key"], int(one["Size"]), _tag(one)) for one in page.get("Contents", [])]


def _base(uri: str) -> str:
    return uri[: uri.index("://") + 3] + bucket_and_key(uri)[0] + "/"


def _delete_batch(uri: str, bucket: str, keys: list[dict[str, str]]) -> None:
    def attempt(api: Any, _: int) -> None:
        answer = api.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        for refused in answer.get("Errors", []):
            if refused.get("Code") not in ABSENT:
                raise ClientError({"Error": refused}, "DeleteObjects")

    _Operation(uri, "deleted").run(attempt)


def _tag(answer: Any) -> str | None:
    return bare_tag(answer.get("ETag"))
