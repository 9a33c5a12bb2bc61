"""Faults between a process and its store: rows 21 to 24, on a real server behind a proxy that misbehaves to order.

The proxy counts what was really sent, so a second layer of retries under ours would be seen.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from simclr_ray import storage
from simclr_ray.errors import StorageError
from simclr_ray.storage.s3_client import client, renew
from tests.servers.proxy import Fault, Proxy
from tests.servers.seaweed import ACCESS_KEY, READER_ACCESS_KEY, READER_SECRET_KEY, SECRET_KEY, Seaweed

Configure = Callable[..., None]


@pytest.fixture(scope="module")
def running(s3: Seaweed) -> Iterator[Proxy]:
    with Proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: Proxy) -> Iterator[Proxy]:
    running.clear()
    yield running
    running.clear()


@pytest.fixture
def settle(proxy: Proxy, configure: Callable[[storage.StorageSettings], None]) -> Configure:
    """Reach the store through the proxy, with short limits."""

    usual = storage.StorageSettings(endpoint=proxy.endpoint, deadline_s=60.0, connect_timeout_s=5.0, read_timeout_s=5.0)

    def through(**changes: object) -> None:
        configure(dataclasses.replace(usual, **changes))  # type: ignore[arg-type]

    through()
    return through


@pytest.fixture
def uri(s3_folder: str, settle: Configure) -> str:
    return f"{s3_folder}/object"


class Spent:
    """What happened since it was made."""

    def __init__(self) -> None:
        self._counters, self._begun = storage.counters(), time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def requests(self) -> int:
        return storage.counters().requests - self._counters.requests

    @property
    def retries(self) -> dict[str, int]:
        now = storage.counters().retries
        gained = {kind: count - self._counters.retries.get(kind, 0) for kind, count in now.items()}
        return {kind: count for kind, count in gained.items() if count}


def fails(operation: Callable[[], object], within_s: float = 10.0) -> str:
    spent = Spent()
    with pytest.raises(StorageError) as caught:
        operation()
    assert spent.seconds < within_s
    assert caught.value.exit_code == 4
    for secret in (SECRET_KEY, READER_SECRET_KEY):
        assert secret not in str(caught.value)
    return str(caught.value)


# Row 21: what will not pass is said at once, after one request, with cause and chain.


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "AccessDenied", "access denied"),
        (403, "SignatureDoesNotMatch", "the secret does not fit"),
        (403, "InvalidAccessKeyId", "does not know this access key"),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong"),
        (403, "AccountProblem", "the store answers AccountProblem"),
        (400, "InvalidToken", "the session token is not valid"),
    ],
)
def test_row_21_403(proxy: Proxy, uri: str, status: int, code: str, says: str) -> None:
    proxy.fault(Fault("status", times=-1, status=status, code=code))
    text = fails(lambda: storage.read_bytes(uri))
    assert says in text
    assert code in text
    assert "credentials from the environment" in text
    assert proxy.requests() == 1


def test_row_21_403_to_head_is_explained_too(proxy: Proxy, uri: str) -> None:
    proxy.fault(Fault("status", times=-1, status=403, code="SignatureDoesNotMatch"))
    assert "the secret does not fit" in fails(lambda: storage.stat(uri))
    assert (proxy.requests(method="HEAD"), proxy.requests(method="GET")) == (1, 1)


@pytest.mark.parametrize("operation", ["read", "stat", "list", "write"])
@pytest.mark.parametrize("region", ["eu-central-1", ""])
def test_row_21_301_wrong_region(proxy: Proxy, uri: str, operation: str, region: str) -> None:
    headers = {"x-amz-bucket-region": region} if region else {}
    proxy.fault(Fault("status", times=-1, status=301, code="PermanentRedirect", headers=headers))
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read_bytes(uri),
        "stat": lambda: storage.stat(uri),
        "list": lambda: storage.list_names(uri),
        "write": lambda: storage.write_bytes(uri, b""),
    }
    text = fails(operations[operation])
    assert 'bucket "train" is in ' in text
    assert (f"storage.region={region}" if region else "storage.region or storage.endpoint") in text
    assert proxy.requests() == (2 if operation == "stat" else 1)  # a HEAD's answer has no body to explain it


@pytest.mark.parametrize("operation", [storage.read_bytes, storage.stat, storage.list_names])
def test_row_21_unknown_bucket(proxy: Proxy, settle: Configure, operation: Callable[[str], object]) -> None:
    assert 'there is no bucket "nowhere"' in fails(lambda: operation("s3://nowhere/key"))


def test_row_21_no_credentials(proxy: Proxy, uri: str, settle: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    settle()
    text = fails(lambda: storage.read_bytes(uri))
    assert "no credentials: looked for AWS_ACCESS_KEY_ID in the environment, the shared credentials" in text
    assert "the machine's role" in text
    assert proxy.requests() == 0


# Row 22: what may pass is tried again, by one layer, until the deadline.


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", "slow down"),
        (503, "ServiceUnavailable", "slow down"),
        (429, "TooManyRequests", "slow down"),
        (500, "InternalError", "server error"),
        (502, "BadGateway", "server error"),
        (504, "GatewayTimeout", "server error"),
        (400, "RequestTimeout", "server error"),
        (409, "ConditionalRequestConflict", "server error"),
    ],
)
def test_row_22_503_storm(proxy: Proxy, uri: str, status: int, code: str, kind: str) -> None:
    storage.write_bytes(uri, b"hello")
    proxy.clear()
    proxy.fault(Fault("status", times=3, status=status, code=code))
    spent = Spent()
    assert storage.read_bytes(uri) == b"hello"
    assert spent.retries == {kind: 3}
    assert proxy.requests() == spent.requests == 4


@pytest.mark.parametrize("name", ["write", "create", "stat", "list", "scan", "exists", "delete", "delete folder"])
def test_row_22_503_storm_in_every_operation(proxy: Proxy, uri: str, name: str) -> None:
    operations: dict[str, Callable[[], object]] = {
        "write": lambda: storage.write_bytes(uri, b"1"),
        "create": lambda: storage.create_bytes(f"{uri}-new", b"1"),
        "stat": lambda: storage.stat(uri),
        "list": lambda: storage.list_names(uri),
        "scan": lambda: list(storage.scan(uri)),
        "exists": lambda: storage.exists(uri),
        "delete": lambda: storage.delete_file(uri),
        "delete folder": lambda: storage.delete_folder(uri),
    }
    storage.write_bytes(uri, b"1")
    storage.write_bytes(f"{uri}/1", b"1")
    proxy.clear()
    proxy.fault(Fault("status", times=2))
    spent = Spent()
    operations[name]()
    assert spent.retries == {"slow down": 2}
    assert proxy.requests() == spent.requests


def test_row_22_a_storm_longer_than_the_deadline(proxy: Proxy, uri: str, settle: Configure) -> None:
    settle(deadline_s=1.0)
    storage.list_names(uri)  # makes the client, which takes its time on a busy machine
    proxy.clear()
    proxy.fault(Fault("status", times=-1))
    spent = Spent()
    text = fails(lambda: storage.read_bytes(uri), within_s=10)
    assert spent.seconds >= 1.0
    attempts = proxy.requests()
    assert attempts > 2
    assert f"the store answers SlowDown: made by the proxy after {attempts} attempts in " in text
    assert "storage.deadline_s" in text


def test_row_22_a_page_of_another_proxy_in_place_of_an_answer(proxy: Proxy, uri: str, settle: Configure) -> None:
    """A load balancer's 503 has no code of S3's in it."""
    storage.write_bytes(uri, b"hello")
    proxy.fault(Fault("status", times=2, body=b"<html><body>Service Unavailable</body></html>"))
    assert storage.read_bytes(uri) == b"hello"


@pytest.mark.parametrize("after", [0, 1, 100_000])
def test_row_22_reset_mid_body(proxy: Proxy, uri: str, after: int) -> None:
    data = os.urandom(300_000)
    storage.write_bytes(uri, data)
    proxy.clear()
    proxy.fault(Fault("reset", times=2, after=after))
    spent = Spent()
    assert storage.read_bytes(uri) == data
    assert sum(spent.retries.values()) == 2
    assert set(spent.retries) <= {"connection", "short body"}
    assert proxy.requests() == 3


def test_row_22_what_came_before_a_reset_is_not_read_again(proxy: Proxy, uri: str) -> None:
    data = os.urandom(8 << 20)
    storage.write_bytes(uri, data)
    proxy.fault(Fault("cut", method="GET", after=6 << 20))
    before = storage.counters().bytes
    assert storage.read_range(uri, 0, len(data)) == data
    assert storage.counters().bytes - before < len(data) + (2 << 20)


def test_row_22_replaced_between_two_attempts_is_never_mixed(proxy: Proxy, uri: str) -> None:
    old, new = b"o" * 300_000, b"n" * 300_000
    storage.write_bytes(uri, old)
    proxy.fault(Fault("stall", method="GET", after=200_000, seconds=3))
    writer = threading.Timer(0.3, lambda: storage.write_bytes(uri, new))
    writer.start()
    read = storage.read_bytes(uri)
    writer.join()
    assert read == new


def test_row_22_stalled_socket(proxy: Proxy, uri: str, settle: Configure) -> None:
    storage.write_bytes(uri, b"x" * 100_000)
    settle(read_timeout_s=0.5)
    for after in (0, 50_000):
        proxy.fault(Fault("stall", method="GET", after=after))
    spent = Spent()
    assert storage.read_bytes(uri) == b"x" * 100_000
    assert spent.retries == {"timeout": 2}
    assert 1.0 <= spent.seconds < 5


def test_row_22_paused_server(proxy: Proxy, uri: str, s3: Seaweed, settle: Configure) -> None:
    storage.write_bytes(uri, b"hello")
    settle(read_timeout_s=0.5)
    storage.stat(uri)  # makes the client, which takes its time on a busy machine
    s3.pause()
    threading.Timer(2.0, s3.resume).start()
    spent = Spent()
    assert storage.read_bytes(uri) == b"hello"
    assert spent.retries.get("timeout", 0) >= 1, spent.retries
    assert spent.seconds < 6


def test_row_22_slow_read_within_the_deadline(proxy: Proxy, uri: str) -> None:
    data = os.urandom(60_000)
    storage.write_bytes(uri, data)
    proxy.fault(Fault("slow", method="GET", rate=40_000))
    spent = Spent()
    assert storage.read_bytes(uri) == data
    assert spent.retries == {}
    assert spent.seconds > 1.0


def test_row_22_slow_read_beyond_the_deadline(proxy: Proxy, uri: str, settle: Configure) -> None:
    storage.write_bytes(uri, os.urandom(100_000))
    settle(deadline_s=1.0)
    proxy.fault(Fault("slow", method="GET", rate=10_000))
    text = fails(lambda: storage.read_bytes(uri), within_s=4)
    assert "too slow" in text
    assert "of 100,000 bytes" in text


def test_row_22_no_server(uri: str, s3: Seaweed, settle: Configure) -> None:
    settle(deadline_s=0.5, endpoint="http://127.0.0.1:9")
    text = fails(lambda: storage.read_bytes(uri), within_s=3)
    assert "Could not connect" in text
    assert "storage.endpoint" in text


@pytest.mark.parametrize("name", ["create", "replace"])
def test_row_22_an_answer_that_got_lost_does_not_make_a_winner_a_loser(proxy: Proxy, uri: str, name: str) -> None:
    version = storage.write_bytes(uri, b"old") or ""
    proxy.fault(Fault("lost", method="PUT"))
    if name == "create":
        assert storage.create_bytes(f"{uri}-lock", b"mine")
    else:
        assert storage.replace_bytes(uri, b"mine", version=version) == storage.stat(uri).version
    assert proxy.requests(method="PUT") == 3  # the first write, the lost one and the one that meets its own work


def test_row_22_server_killed_for_4_s_in_the_middle_of_100_mb(proxy: Proxy, uri: str, s3: Seaweed) -> None:
    data = os.urandom(1 << 20) * 100
    version = storage.write_bytes(uri, data)
    proxy.fault(Fault("slow", method="GET", rate=100 << 20))  # so that the kill comes in the middle
    spent = Spent()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(storage.read_range, uri, 0, len(data), version=version)
        time.sleep(0.4)
        s3.kill()
        time.sleep(4.0)
        s3.start()
        assert reading.result() == data
    assert set(spent.retries) <= {"connection", "short body", "timeout", "server error"}
    assert sum(spent.retries.values()) >= 1
    assert spent.seconds > 4


# Row 23: a token that expires is renewed through the whole chain, once.


@pytest.fixture
def process_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle: Configure) -> Callable[..., Path]:
    """Credentials from a profile's process, as single sign-on and brokers give them; what it gives is a file's word."""
    told, calls = tmp_path / "told.json", tmp_path / "calls"
    script = f"open({str(calls)!r}, 'a').write('x'); print(open({str(told)!r}).read())"
    (tmp_path / "process.py").write_text(script)
    (tmp_path / "config").write_text(
        f"[profile broker]\ncredential_process = {sys.executable} -S {tmp_path / 'process.py'}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "broker")

    def tell(key: str, secret: str, *, lives_s: float) -> Path:
        expires = datetime.now(UTC) + timedelta(seconds=lives_s)
        told.write_text(
            json.dumps({"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret, "Expiration": expires.isoformat()})
        )
        return calls

    return tell


def test_row_23_token_expires_by_the_clock(
    proxy: Proxy, uri: str, settle: Configure, process_credentials: Callable[..., Path]
) -> None:
    """Credentials that end within botocore's margin are renewed before a request is signed: no request is refused."""
    calls = process_credentials(READER_ACCESS_KEY, READER_SECRET_KEY, lives_s=61)
    settle()
    assert storage.list_names("s3://train/none") == []
    first = len(calls.read_text())
    process_credentials(ACCESS_KEY, SECRET_KEY, lives_s=3600)
    storage.write_bytes(uri, b"the reader could not")
    assert len(calls.read_text()) == first + 1
    storage.read_bytes(uri)
    assert len(calls.read_text()) == first + 1


def test_row_23_token_refused_as_expired_is_renewed_once(
    proxy: Proxy, uri: str, settle: Configure, process_credentials: Callable[..., Path]
) -> None:
    """The store's clock decides: it refuses the first key, though it should live for an hour."""
    process_credentials(READER_ACCESS_KEY, READER_SECRET_KEY, lives_s=3600)
    settle()
    storage.list_names("s3://train/none")
    proxy.clear()
    proxy.fault(Fault("status", times=-1, status=400, code="ExpiredToken", authorization=READER_ACCESS_KEY))
    process_credentials(ACCESS_KEY, SECRET_KEY, lives_s=3600)
    spent = Spent()
    storage.write_bytes(uri, b"1")
    assert spent.retries == {"expired token": 1}
    assert proxy.requests() == 2


def test_row_23_refusal_that_persists_is_said(
    proxy: Proxy, uri: str, settle: Configure, process_credentials: Callable[..., Path]
) -> None:
    process_credentials(READER_ACCESS_KEY, READER_SECRET_KEY, lives_s=3600)
    settle()
    proxy.fault(Fault("status", times=-1, status=400, code="ExpiredToken"))
    text = fails(lambda: storage.read_bytes(uri))
    assert "the credentials expired and what the chain gives now is expired too (ExpiredToken)" in text
    assert "credentials from the profile's credential process" in text
    assert proxy.requests() == 2


def test_row_23_process_that_fails_is_said(
    proxy: Proxy, uri: str, settle: Configure, process_credentials: Callable[..., Path]
) -> None:
    process_credentials(READER_ACCESS_KEY, READER_SECRET_KEY, lives_s=3600).with_name("told.json").unlink()
    settle()
    assert "credentials cannot be renewed" in fails(lambda: storage.read_bytes(uri))
    assert proxy.requests() == 0


class Metadata(BaseHTTPRequestHandler):
    """The service that gives a machine's role its credentials; it refuses as many requests as it is told to."""

    refusals: ClassVar[int] = 0
    asked: ClassVar[int] = 0
    lives_s: ClassVar[float] = 3600.0

    def do_GET(self) -> None:
        Metadata.asked += 1
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        refused = Metadata.refusals > 0
        Metadata.refusals -= refused
        expires = datetime.now(UTC) + timedelta(seconds=self.lives_s)
        role = {
            "Code": "Success", "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY, "Token": "",
            "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }  # fmt: skip
        pages = {"token": "token", "security-credentials/": "role", "role": json.dumps(role)}
        body = b"" if refused else next(page for end, page in pages.items() if self.path.endswith(end)).encode()
        self.send_response(503 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch, uri: str, settle: Configure) -> Iterator[type[Metadata]]:
    """A machine whose role gives the credentials, and no other link of the chain does."""
    storage.write_bytes(uri, b"hello")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    Metadata.refusals, Metadata.asked = 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
        settle()
        yield Metadata
        server.shutdown()
        thread.join()


def test_row_23_a_busy_metadata_service_is_asked_again(metadata: type[Metadata], uri: str) -> None:
    metadata.refusals = 4
    spent = Spent()
    assert storage.read_bytes(uri) == b"hello"
    assert spent.retries == {}
    assert metadata.asked == 4 + 3
    assert "the machine's role" in storage.describe(uri)


def test_row_23_a_process_that_never_had_credentials_does_not_wait_for_them(metadata: type[Metadata], uri: str) -> None:
    metadata.refusals = 1000
    spent = Spent()
    assert "no credentials" in fails(lambda: storage.read_bytes(uri), within_s=5)
    assert spent.retries == {}
    assert metadata.asked == 10, "five for the token and five for the role, which are not asked for twice"


def test_row_23_credentials_that_were_there_before_are_waited_for(metadata: type[Metadata], uri: str) -> None:
    """The store refuses the token, and just then the service that would give another is out of reach."""
    storage.read_bytes(uri)
    renew(client(storage.current()))
    metadata.refusals = 25
    spent = Spent()
    assert storage.read_bytes(uri) == b"hello"
    assert spent.retries == {"credentials": 2}


def test_row_23_credentials_that_do_not_come_back_are_said(
    metadata: type[Metadata], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.read_bytes(uri)
    renew(client(storage.current()))
    metadata.refusals = 1000_000
    monkeypatch.setattr("simclr_ray.storage.s3.CREDENTIALS_S", 1.0)
    spent = Spent()
    text = fails(lambda: storage.read_bytes(uri))
    assert "no credentials" in text
    assert "attempts" in text
    assert spent.seconds >= 1.0


# Row 24: never a short or damaged sample.


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["cut", "length"])
def test_row_24_body_shorter_than_it_should_be(proxy: Proxy, uri: str, kind: str, whole: bool) -> None:
    data = os.urandom(200_000)
    storage.write_bytes(uri, data)
    proxy.clear()
    proxy.fault(Fault(kind, times=2, method="GET", after=70_000))  # type: ignore[arg-type]
    spent = Spent()
    read = storage.read_bytes(uri) if whole else storage.read_range(uri, 1000, 190_000)
    assert read == (data if whole else data[1000:190_000])
    assert sum(spent.retries.values()) == 2
    assert proxy.requests() == 3


def test_row_24_body_that_stays_short(proxy: Proxy, uri: str, settle: Configure) -> None:
    storage.write_bytes(uri, os.urandom(1000))
    settle(deadline_s=0.5)
    proxy.fault(Fault("cut", times=-1, method="GET", after=0))
    assert "attempts" in fails(lambda: storage.read_range(uri, 0, 1000))


def test_row_24_wrong_checksum(proxy: Proxy, uri: str) -> None:
    data = os.urandom(200_000)
    storage.write_bytes(uri, data)
    proxy.fault(Fault("flip", times=2, method="GET", after=123_456))
    spent = Spent()
    assert storage.read_bytes(uri) == data
    assert spent.retries == {"checksum": 2}


def test_row_24_checksum_that_stays_wrong(proxy: Proxy, uri: str, settle: Configure) -> None:
    storage.write_bytes(uri, os.urandom(1000))
    settle(deadline_s=0.5)
    proxy.fault(Fault("flip", times=-1, method="GET", after=10))
    assert "checksum" in fails(lambda: storage.read_bytes(uri)).lower()


def test_row_24_store_that_ignores_ranges(proxy: Proxy, uri: str) -> None:
    storage.write_bytes(uri, b"0123456789")
    proxy.fault(Fault("unrange", times=-1, method="GET"))
    assert "does not serve ranges" in fails(lambda: storage.read_range(uri, 2, 5))


def test_row_24_store_that_does_not_look_at_the_version_asked_for(proxy: Proxy, uri: str) -> None:
    version = storage.write_bytes(uri, b"0123456789")
    other = {"Content-Range": "bytes 2-4/10", "ETag": '"another"'}
    proxy.fault(Fault("status", method="GET", status=206, headers=other, body=b"xyz"))
    with pytest.raises(storage.ChangedError, match="replaced"):
        storage.read_range(uri, 2, 5, version=version)
    same = other | {"ETag": f'W/"{version}"'}
    proxy.fault(Fault("status", method="GET", status=206, headers=same, body=b"234"))
    assert storage.read_range(uri, 2, 5, version=version) == b"234"


def test_row_24_pieces_of_two_versions_are_never_joined(proxy: Proxy, uri: str) -> None:
    """The rest of a broken body comes from another version, though the first one was asked for: all is read again."""
    data = os.urandom(200_000)
    storage.write_bytes(uri, data)
    proxy.clear()
    proxy.fault(Fault("cut", method="GET", after=70_000))
    rest = {"Content-Range": "bytes 70000-199999/200000", "ETag": '"another"'}
    proxy.fault(Fault("status", method="GET", status=206, headers=rest, body=b"x" * 130_000))
    spent = Spent()
    assert storage.read_bytes(uri) == data
    assert spent.retries == {"short body": 1, "replaced": 1}
    assert proxy.requests() == 3
