"""Hosts on one machine: network namespaces, connected by wires that can be cut, lossy or slow.

The wires are a process (packet_forwarder.py), because not every kernel has netem. Making namespaces needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import LIMIT, wait_for_line

PREFIX = "larpixdaq"
FOLDER = Path("/run/netns")
#: Larger than that of an Ethernet, so that there are fewer packets, because the wires are a Python program.
MTU = 9000

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def missing_rights() -> str:
    """Return why this user cannot make network namespaces; empty for root."""
    return "" if os.geteuid() == 0 else "making network namespaces needs root"


class Network:
    """Hosts by name, all connected. The wires between two hosts have no faults until fault().

    `capture`: a file for all packets that pass between the hosts; it is complete after close().
    """

    _made = 0

    def __init__(self, *hosts: str, seed: int = 0, capture: Path | None = None) -> None:
        remove_stale()
        Network._made += 1
        self.hosts = hosts
        self._names = [f"{PREFIX}-{os.getpid()}-{Network._made}-{host}" for host in hosts]
        devices: list[int] = []
        try:
            for host, name in zip(hosts, self._names, strict=True):
                _ip("netns", "add", name)
                with self.inside(host):
                    devices.append(_tun())
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "tun0")
                _ip("-n", name, "link", "set", "tun0", "mtu", str(MTU), "up")
            ends = [f"{name}={device}" for name, device in zip(self._names, devices, strict=True)]
            script = Path(__file__).with_name("packet_forwarder.py")
            self._wires = subprocess.Popen(
                [sys.executable, str(script), str(seed), str(capture or ""), *ends],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=devices,
                start_new_session=True,  # it outlives this process, to remove the namespaces
            )
        except BaseException:
            for name in self._names:
                subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            raise
        finally:
            for device in devices:
                os.close(device)

    def address(self, host: str) -> str:
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def prefix(self, host: str, *, memory: bool = False) -> list[str]:
        """Return what to put before a command to run it on this host. `memory`: with this machine's /dev/shm; otherwise
        it gets an empty one."""
        enter = ["nsenter", f"--net={FOLDER / self._names[self.hosts.index(host)]}"]
        if memory:
            return enter
        return [*enter, "unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Put the sockets that this thread makes, and the threads that it starts, on this host."""
        with open("/proc/thread-self/ns/net") as home, open(FOLDER / self._names[self.hosts.index(host)]) as other:
            _setns(other.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def fault(
        self, one: str, other: str, *, drop: float = 0.0, delay: float = 0.0, cut: bool = False
    ) -> dict[str, int]:
        """Lose a fraction (`drop`) or all (`cut`) of the packets between two hosts, or delay them (s).

        Returns the numbers of packets passed and lost so far.
        """
        between = [self.hosts.index(one), self.hosts.index(other)]
        order = {"between": between, "drop": drop, "delay": delay, "cut": cut}
        assert self._wires.stdin is not None
        self._wires.stdin.write(json.dumps(order).encode() + b"\n")
        answer: dict[str, int] = json.loads(wait_for_line(self._wires))
        return answer

    def heal(self, one: str, other: str) -> dict[str, int]:
        return self.fault(one, other)

    def close(self) -> None:
        """End the wires, which remove the namespaces."""
        self._wires.communicate(timeout=LIMIT)


def remove_stale() -> None:
    """Remove namespaces of dead processes whose wires were killed, too."""
    for path in FOLDER.glob(f"{PREFIX}-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", path.name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _setns(descriptor: int) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot change the network namespace")


def _tun() -> int:
    """Make a TUN device `tun0` in the namespace of this thread. It exists until the returned descriptor is closed."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return descriptor
