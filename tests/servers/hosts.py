"""Several hosts on one machine: network namespaces with addresses of their own on one switch. Linux, root and `ip`.

    with hosts("head", "train-1", "store") as found:
        found["head"].address                       # 198.18.N.1; this process is a host of the network, too
        found["head"].command(["ray", "start", ...])
        found["train-1"].cut()                      # its cable is drawn; `plug` puts it back

The switch is a bridge inside a namespace of its own, so of this machine's network only one interface is added, with the
last address of the network. Addresses are of 198.18.0.0/15, which is set aside for tests of networks (RFC 2544).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

INTERFACE = "eth0"
"""Of each host: what gloo is told, which would else take what the host's name resolves to."""
_OURS = 254


@dataclass(frozen=True)
class Host:
    """A host of the network."""

    name: str
    address: str
    namespace: str
    _switch: str
    _port: str

    def command(self, command: Sequence[str]) -> list[str]:
        """The command as this host runs it."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def cut(self) -> None:
        """Draw its cable: nothing that is sent arrives, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def power_off(self) -> None:
        """End everything that runs on it, at once."""
        gone = self.processes()
        for one in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(gone, timeout=10)


def why_not() -> str | None:
    """Why hosts cannot be had here; None where they can."""
    if shutil.which("ip") is None:
        return "no program ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"sr-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[dict[str, Host]]:
    """Hosts on one switch, by name; what still runs on them at the end is killed."""
    number = os.getpid() % 200 + 20
    switch, uplink = f"sr{number}-switch", f"sr{number}up"
    made: dict[str, Host] = {}
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        _cable(switch, uplink, f"{uplink}x")
        _ip("addr", "add", f"198.18.{number}.{_OURS}/24", "dev", f"{uplink}x")
        _ip("link", "set", f"{uplink}x", "up")
        for place, name in enumerate(names, 1):
            space, port = f"sr{number}-{name}", f"sr{number}p{place}"
            host = Host(name, f"198.18.{number}.{place}", space, switch, port)
            _ip("netns", "add", space)
            made[name] = host
            _cable(switch, port, f"{port}x")
            _ip("link", "set", f"{port}x", "netns", space, "name", INTERFACE)
            _ip("-n", space, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", space, "link", "set", interface, "up")
        yield made
    finally:
        for host in made.values():
            host.power_off()
        subprocess.run(["ip", "link", "del", f"{uplink}x"], capture_output=True, check=False)
        for space in (*(host.namespace for host in made.values()), switch):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _cable(switch: str, port: str, end: str) -> None:
    """A cable with one end in the switch; the other stays here for the moment."""
    _ip("link", "add", end, "type", "veth", "peer", "name", port)
    _ip("link", "set", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
