"""What an S3 store's answer means: whether to try again, and what to tell the user."""

from __future__ import annotations

from botocore import exceptions as aws

from simclr_ray.errors import StorageError
from simclr_ray.storage.redaction import redact
from simclr_ray.storage.retry import Fault, GaveUp
from simclr_ray.storage.s3_client import CHAIN, Client

SLOW_DOWN = frozenset({"SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "TooManyRequests"})
PASSING = frozenset({"InternalError", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict"})
DAMAGED = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
CHANGED = frozenset({"PreconditionFailed", "412"})
ABSENT = frozenset({"NoSuchKey", "404", "NotFound"})
UNRESOLVED = (aws.NoCredentialsError, aws.CredentialRetrievalError)
"""The chain gave no credentials; a service that keeps them may have been out of reach."""
REDIRECTS = frozenset({"PermanentRedirect", "301", "TemporaryRedirect", "307", "IllegalLocationConstraintException"})


class ShortBodyError(Exception):
    """A body ended before the length that was announced or asked for, or went on behind it."""


class DamagedError(Exception):
    """A body does not fit the checksum that came with it."""


class ReplacedError(Exception):
    """The object was replaced while its pieces were read; reading starts over."""


def code_of(error: BaseException | None) -> str:
    """The store's code, such as `NoSuchKey`; empty where the error is none of the store's."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, aws.ClientError) else ""


def status_of(error: BaseException | None) -> int:
    """HTTP status of the answer, or 0."""
    if not isinstance(error, aws.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def judge(error: Exception) -> Fault:
    """Say of a failed attempt what it was and whether another may succeed."""
    if isinstance(error, aws.ClientError):
        return _judge_answer(code_of(error), status_of(error))
    for kinds, kind in _CONNECTION:
        if isinstance(error, kinds):
            certificate = isinstance(error, aws.SSLError) and "CERTIFICATE" in str(error).upper()
            return Fault("certificate" if certificate else kind, passing=not certificate)
    return Fault(type(error).__name__, passing=False)


_CONNECTION: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((aws.ReadTimeoutError, aws.ConnectTimeoutError), "timeout"),
    ((aws.FlexibleChecksumError, aws.ChecksumError, DamagedError), "checksum"),
    ((aws.IncompleteReadError, ShortBodyError), "short body"),
    ((ReplacedError,), "replaced"),
    ((aws.ConnectionError, aws.HTTPClientError, ConnectionError), "connection"),
)
"""In this order: botocore's timeouts are connection errors too."""


def _judge_answer(code: str, status: int) -> Fault:
    if code in SLOW_DOWN or "Throttl" in code or status in (429, 503):
        return Fault("slow down", passing=True)
    if code in EXPIRED:
        return Fault("expired token", passing=True)
    if code in DAMAGED:
        return Fault("checksum", passing=True)
    if code in PASSING or status in (500, 502, 504):
        return Fault("server error", passing=True)
    return Fault(code or f"status {status}", passing=False)


def explain(gave_up: GaveUp, uri: str, verb: str, client: Client | None) -> StorageError:
    """The sentence for an operation that failed for good; no key, token or signature is in it."""
    error = gave_up.__cause__
    code = code_of(error)
    what, fix = _words(code, error, uri)
    tried = f" after {gave_up.attempts} attempts in {gave_up.elapsed:.0f} s" if gave_up.attempts > 1 else ""
    head = f"cannot be {verb}: {what}{tried}"
    asked = f"asked {client.place}; credentials from {client.origin}" if client is not None else ""
    return StorageError(redact(head), where=redact(uri), fix=redact("\n  ".join(filter(None, (fix, asked)))))


def _words(code: str, error: BaseException | None, uri: str) -> tuple[str, str]:
    """What happened and what to do about it."""
    bucket = uri.split("://", 1)[-1].partition("/")[0]
    if code in REDIRECTS or _wrong_region(error):
        region = _region_of(error)
        named = f"region {region}" if region else "another region or at another endpoint"
        return (
            f'bucket "{bucket}" is in {named} ({code or status_of(error)})',
            f"set storage.region={region}" if region else "set storage.region or storage.endpoint to the bucket's",
        )
    if code in _SENTENCES:
        what, fix = _SENTENCES[code]
        return f"{what.format(bucket=bucket)} ({code})", fix
    if code:
        assert isinstance(error, aws.ClientError)
        message = str(error.response["Error"].get("Message") or "no reason given")
        return f"the store answers {code}: {message}", _fix_for_status(status_of(error))
    return _connection_words(error)


def _connection_words(error: BaseException | None) -> tuple[str, str]:
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return (
            f"no credentials: looked for {CHAIN}",
            "give the machine a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where Ray's nodes start; "
            "for a public bucket set storage.anonymous=true",
        )
    if isinstance(error, aws.CredentialRetrievalError | aws.TokenRetrievalError | aws.UnauthorizedSSOTokenError):
        return f"credentials cannot be renewed: {error}", "log in again, or mend what the profile names"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, aws.ParamValidationError):
        return "this cannot be the name of a bucket or an object", "check the URI"
    if isinstance(error, aws.ProfileNotFound | aws.ConfigParseError):
        return text, "mend the AWS config file or AWS_PROFILE"
    if isinstance(error, aws.SSLError):
        return f"no secure connection: {text}", "set AWS_CA_BUNDLE where the store has a certificate of its own"
    return text, "check that the endpoint is right and can be reached from here (storage.endpoint)"


def _wrong_region(error: BaseException | None) -> bool:
    return code_of(error) == "AuthorizationHeaderMalformed" and bool(_region_of(error))


def _region_of(error: BaseException | None) -> str | None:
    if not isinstance(error, aws.ClientError):
        return None
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    return str(region) if region else None


def _fix_for_status(status: int) -> str:
    if status in (403, 401):
        return "check the credentials and what they may do"
    if status == 429 or status >= 500:
        return "the store is overloaded or down: check it, then run again; storage.deadline_s sets how long is waited"
    return "check the URI and the store"


_CLOCK = "the clock of this machine is wrong"
_SENTENCES = {
    "AccessDenied": (
        "access denied",
        "these credentials may not do that here; without the right to list, a missing object is answered like this too",
    ),
    "403": ("access denied", "these credentials may not do that here"),
    "AllAccessDisabled": ("access is disabled", "ask the owner of the bucket"),
    "InvalidAccessKeyId": ("the store does not know this access key", "check the credentials, and that they are its"),
    "SignatureDoesNotMatch": ("the secret does not fit the access key", "check the credentials; copy the secret again"),
    "InvalidToken": ("the session token is not valid", "take credentials and session token from the same place"),
    "ExpiredToken": (
        "the credentials expired and what the chain gives now is expired too",
        "log in again, or use a role, whose credentials are renewed by themselves",
    ),
    "RequestTimeTooSkewed": (_CLOCK, "set it, for requests are signed with the time"),
    "NoSuchBucket": ('there is no bucket "{bucket}"', "check its name and the endpoint, or make it first"),
    "NoSuchUpload": ("the upload was ended by someone else", "run again"),
    "InvalidBucketName": ('"{bucket}" cannot be the name of a bucket', "check the URI"),
    "InvalidObjectState": ("the object is archived", "restore it from its storage class first"),
    "EntityTooLarge": ("the object is too large for the store", "check the store's limits"),
    "QuotaExceeded": ("the store's quota is used up", "free room there"),
}
_SENTENCES |= dict.fromkeys(("ExpiredTokenException", "TokenRefreshRequired"), _SENTENCES["ExpiredToken"])
