"""URIs of local folders and object stores: pure text, nothing is opened here."""

from __future__ import annotations

from pathlib import Path

from simclr_ray.errors import DataError, StorageError

S3_SCHEMES = frozenset({"s3", "s3a"})
OTHER_SCHEMES = frozenset({"gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hdfs", "memory"})
WEB_SCHEMES = frozenset({"http", "https"})
"""Only where `storage.allow_http` says so: a list of images from elsewhere could point into the cluster's network."""


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return "://" not in uri or uri.startswith("file://")


def normalise(uri: str | Path) -> str:
    """Absolute local path, or the URI without a trailing slash; workers change their folder, so paths are absolute."""
    text = str(uri)
    if not is_local(text):
        return text.rstrip("/")
    return str(Path(text.removeprefix("file://")).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """Append path parts; a part that is absolute or a URI itself replaces what came before."""
    for part in parts:
        uri = part if part.startswith("/") or "://" in part else f"{uri.rstrip('/')}/{part}"
    return uri


def scheme_of(uri: str) -> str:
    """`s3` of `s3://bucket/key`, and `file` for a local path."""
    return "file" if is_local(uri) else uri.split("://", 1)[0].lower()


def tellable(uri: str) -> str:
    """A URI for messages and tables: a web address without its query, fragment, user and password.

    In them a signed address carries what lets anybody read the object. Other URIs, and what is no URI, stay as they
    are; so does what was made tellable before.
    """
    if scheme_of(uri) not in WEB_SCHEMES:
        return uri
    scheme, _, rest = uri.partition("://")
    rest = rest.partition("#")[0]
    place, mark, _ = rest.partition("?")
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{mark and '?[redacted]'}"


def may_name(list_uri: str, uri: str) -> bool:
    """Whether a list that lies at `list_uri` may name `uri`.

    A list in a store may be by anybody who can write there, and is read on the machines of the cluster: it may not
    name their files. A local list may name anything.
    """
    return is_local(list_uri) or not is_local(uri)


def join_named(folder: str, uri: str) -> str:
    """`join` of a folder with what a list or manifest in it names.

    Raises:
        DataError: it names a file of this machine from a store, see `may_name`.
    """
    joined = join(folder, uri)
    if not may_name(folder, joined):
        raise DataError(
            "a data set in a store may not name files of the machines that read it", where=folder, got=joined[:200],
            fix="put the images into a store too, or the data set beside them",
        )  # fmt: skip
    return joined


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/some/key`; the key is empty for the bucket itself.

    Raises:
        StorageError: there is no bucket, or something beside it that belongs into the settings or nowhere.
    """
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    if "@" in bucket or ":" in bucket:
        raise StorageError(
            "a bucket's name holds no user, password or port", where=f"s3://[redacted]/{key}",
            fix="name an endpoint by storage.endpoint; credentials come from the environment, a file or a role",
        )  # fmt: skip
    if "?" in bucket or "?endpoint_override=" in key or "&endpoint_override=" in key:
        raise StorageError(
            "a URI takes no options", where=uri.partition("?")[0], fix="set storage.endpoint and storage.region"
        )
    if not bucket:
        raise StorageError("the URI names no bucket", where=uri, expected="s3://bucket/key")
    return bucket, key
