"""A proxy that misbehaves to order, between a client and an S3 server.

Faults are a list of rules; each takes the requests that it matches, so many of them, and then steps aside. Everything
else goes through untouched, `Host` included, so signatures stay valid. Every request is counted by method and path:
what a client really sent, hidden retries too. By itself:

    python -m tests.servers.proxy --upstream http://127.0.0.1:8333 --fault status:503:times=5
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args
from urllib.parse import urlsplit

HOST = "127.0.0.1"
PIECE = 64 << 10
Kind = Literal["status", "reset", "stall", "cut", "length", "slow", "flip", "lost", "unrange", "late"]


@dataclass
class Fault:
    """What to do to matching requests.

    status: answer `status` with S3's error `code` instead of asking the server.
    reset: pass `after` bytes of the body, then reset the connection.
    stall: pass `after` bytes of the body, then send nothing for `seconds`.
    cut: announce the full length, pass `after` bytes, close.
    length: announce and pass only `after` bytes, as if the object were that short.
    slow: pass the body at `rate` bytes a second.
    flip: change the body's byte at `after`.
    lost: let the server do its work, then reset the connection in place of its answer.
    late: wait `seconds` before asking the server, as a distant one takes to answer.
    unrange: answer without saying which range this is, as stores without ranges do.
    """

    kind: Kind
    times: int = 1
    """Requests to do it to; -1: all."""
    method: str = ".*"
    """Of the requests, a regular expression."""
    path: str = ".*"
    """Of the requests with their query, a regular expression found anywhere in it."""
    authorization: str = ""
    """Found in the header `Authorization`, such as an access key; empty: any."""
    status: int = 503
    code: str = "SlowDown"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """In place of S3's XML."""
    after: int = 0
    seconds: float = 60.0
    rate: int = 1000

    def matches(self, method: str, path: str, authorization: str) -> bool:
        """Whether this request is one of those."""
        return bool(
            self.times
            and re.fullmatch(self.method, method)
            and re.search(self.path, path)
            and self.authorization in authorization
        )


class Proxy:
    """A listening proxy; use as a context manager."""

    def __init__(self, upstream: str, port: int = 0) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or HOST, parts.port or 80)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._requests: Counter[tuple[str, str]] = Counter()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer((HOST, port), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.endpoint = f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, fault: Fault) -> None:
        """Add a rule; earlier ones come first."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forget rules and counts."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()

    def requests(self, path: str = "", method: str = ".*") -> int:
        """Requests so far whose path (without query) ends in `path`."""
        with self._lock:
            counted = self._requests.items()
            return sum(n for (verb, at), n in counted if at.endswith(path) and re.fullmatch(method, verb))

    def take(self, method: str, path: str, authorization: str) -> Fault | None:
        """Count a request and find its rule."""
        with self._lock:
            self._requests[method, urlsplit(path).path] += 1
            for fault in self._faults:
                if fault.matches(method, path, authorization):
                    fault.times -= fault.times > 0
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.take(self.command, self.path, self.headers.get("Authorization", ""))
        if fault is not None and fault.kind == "status":
            self._refuse(fault)
            return
        if fault is not None and fault.kind == "late":
            self.proxy.closing.wait(fault.seconds)
        upstream = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            self._answer(upstream.getresponse(), fault)
        except (OSError, http.client.HTTPException):  # the server is down, or one side went away
            self._reset()
        finally:
            upstream.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _refuse(self, fault: Fault) -> None:
        body = fault.body or f"<Error><Code>{fault.code}</Code><Message>made by the proxy</Message></Error>".encode()
        self.send_response(fault.status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "lost":
            response.read()
            self._reset()
            return
        unrange = fault is not None and fault.kind == "unrange"
        self.send_response_only(200 if unrange else response.status)
        for name, value in response.getheaders():
            if name.lower() == "content-length" and fault is not None and fault.kind == "length":
                value = str(fault.after)
            if name.lower() not in ("connection", "transfer-encoding", "content-range" if unrange else ""):
                self.send_header(name, value)
        if response.getheader("Content-Length") is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self._body(response, fault)

    def _body(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
        sent = 0
        while True:
            piece = response.read(min(PIECE, fault.rate // 10) if fault and fault.kind == "slow" else PIECE)
            if not piece:
                break
            if fault is not None:
                if fault.kind in ("reset", "stall", "cut", "length") and sent + len(piece) >= fault.after:
                    self.wfile.write(piece[: fault.after - sent])
                    self.wfile.flush()
                    self._break_off(fault)
                    return
                if fault.kind == "flip" and sent <= fault.after < sent + len(piece):
                    at = fault.after - sent
                    piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
                if fault.kind == "slow" and self.proxy.closing.wait(len(piece) / fault.rate):
                    break
            self.wfile.write(piece)
            sent += len(piece)

    def _break_off(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.kind == "reset":
            time.sleep(0.05)  # a reset overtakes what the client has not read yet
            self._reset()
        elif fault.kind == "stall":
            self.proxy.closing.wait(fault.seconds)

    def _reset(self) -> None:
        """Close so that the other side sees `connection reset by peer`."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # the connection was reset on purpose
            super().finish()

    def log_message(self, *_: object) -> None:
        pass


def parsed(text: str) -> Fault:
    """A fault from `kind:status:name=value:...`, such as `status:503:times=5` or `cut:after=1000:path=[.]parquet`."""
    kind, *rest = text.split(":")
    if kind not in get_args(Kind):
        raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(get_args(Kind))}")
    if rest and rest[0].isdigit():
        rest[0] = f"status={rest[0]}"
    types = {one.name: {"int": int, "float": float}.get(str(one.type), str) for one in fields(Fault)}
    values = dict(part.split("=", 1) for part in rest)
    return Fault(kind, **{name: types[name](value) for name, value in values.items()})  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description="A faulty proxy on this machine, until Ctrl-C.")
    parser.add_argument("--upstream", required=True, help="URL of the S3 server")
    parser.add_argument("--port", type=int, default=0, help="to listen on; a free one is found otherwise")
    parser.add_argument("--fault", type=parsed, action="append", default=[], help="such as status:503:times=5")
    options = parser.parse_args()
    with Proxy(options.upstream, options.port) as proxy:
        for fault in options.fault:
            proxy.fault(fault)
        print(f"export AWS_ENDPOINT_URL_S3={proxy.endpoint}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        print(f"# {proxy.requests()} requests", flush=True)


if __name__ == "__main__":
    main()
