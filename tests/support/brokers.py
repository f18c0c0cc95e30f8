"""Brokers for tests: real nats-server processes of one cluster, each with a directory of its own.

They are on loopback, or each on a host of a network.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from network import Network
from processes import LIMIT, free_port, until

from larpixdaq.broker import Settings, configuration, find_server
from larpixdaq.errors import BrokerError
from larpixdaq.stream import jetstream

__all__ = ["Brokers", "brokers"]


class Brokers:
    """`count` brokers of one cluster, numbered from 0; one broker is no cluster. close() ends and reaps them.

    They have the configuration that `larpixdaq up` writes, with `fsync`, `limit` (bytes) and `password`, and a port for
    questions about their health. With `network`, broker i is on its host `broker-i`; questions must then come from a
    host of it. The constructor returns when they take requests of JetStream.
    """

    def __init__(
        self, count: int = 3, folder: Path | None = None, *, fsync: bool = False, limit: int | None = None,
        password: str = "", network: Network | None = None,
    ) -> None:  # fmt: skip
        self._own = None if folder is not None else Path(tempfile.mkdtemp(prefix="larpixdaq-brokers-"))
        self.folder = folder or self._own
        assert self.folder is not None
        self.password = password
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count
        self._ports: list[int] = []
        while len(self._ports) < 3 * count:
            if (port := free_port()) not in self._ports:
                self._ports.append(port)
        self._prefixes = [network.prefix(f"broker-{i}", memory=True) if network else [] for i in range(count)]
        self._addresses = [network.address(f"broker-{i}") if network else "127.0.0.1" for i in range(count)]
        peers = tuple(f"{self._addresses[i]}:{self._ports[3 * i + 1]}" for i in range(count)) if count > 1 else ()
        for i in range(count):
            directory = self.directory(i)
            directory.mkdir(parents=True)
            address, (client, cluster, health) = self._addresses[i], self._ports[3 * i : 3 * i + 3]
            settings = Settings(
                f"broker-{i}", (address, client), directory, (address, cluster), peers, fsync, limit, password
            )
            content = json.loads(configuration(settings))
            content["http"] = f"{address}:{health}"
            (directory / "nats-server.conf").write_text(json.dumps(content))
        try:
            for i in range(count):
                self.start(i, wait=False)
            for i in range(count):
                self.await_ready(i)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._processes)

    def directory(self, i: int) -> Path:
        """Return the directory with the files of a broker."""
        assert self.folder is not None
        return self.folder / f"broker-{i}"

    def url(self, i: int) -> str:
        """Return `HOST:PORT` for clients of one broker."""
        return f"{self._addresses[i]}:{self._ports[3 * i]}"

    @property
    def urls(self) -> str:
        """The address of all brokers, as --stream takes it: nats://HOST:PORT,HOST:PORT,HOST:PORT."""
        return "nats://" + ",".join(self.url(i) for i in range(len(self)))

    def pid(self, i: int) -> int:
        process = self._processes[i]
        assert process is not None, f"broker {i} does not run"
        return process.pid

    def output(self, i: int) -> str:
        """Return what a broker has written, over all its starts."""
        path = self.directory(i) / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    # Starting and ending.

    def start(self, i: int, *, wait: bool = True) -> None:
        """Start a broker again, with its directory and ports, and wait until it takes requests."""
        assert self._processes[i] is None, f"broker {i} runs"
        with open(self.directory(i) / "output", "ab") as output:
            self._processes[i] = subprocess.Popen(
                [*self._prefixes[i], find_server(), "--config", str(self.directory(i) / "nats-server.conf")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        if wait:
            self.await_ready(i)

    def kill(self, i: int) -> None:
        """Kill a broker (SIGKILL)."""
        self._end(i, signal.SIGKILL)

    def terminate(self, i: int) -> None:
        """End a broker as `larpixdaq down` does."""
        self._end(i, signal.SIGTERM)

    def stop(self, i: int) -> None:
        """Let a broker stand still, with its connections open (SIGSTOP)."""
        os.kill(self.pid(i), signal.SIGSTOP)

    def resume(self, i: int) -> None:
        """Let a broker go on after stop()."""
        os.kill(self.pid(i), signal.SIGCONT)

    def kill_all(self) -> None:
        """Kill all brokers at once."""
        running = [process for process in self._processes if process is not None]
        for process in running:
            process.kill()
        for i, process in enumerate(self._processes):
            if process is not None:
                process.wait(LIMIT)
                self._processes[i] = None

    def close(self) -> None:
        self.kill_all()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def _end(self, i: int, number: signal.Signals) -> None:
        process = self._processes[i]
        assert process is not None, f"broker {i} does not run"
        process.send_signal(number)
        if number != signal.SIGKILL:
            process.send_signal(signal.SIGCONT)
        process.wait(LIMIT)
        self._processes[i] = None

    # Questions.

    def ask(self, i: int, path: str) -> dict[str, Any] | None:
        """Return what a broker answers to a question about its health, None if it does not answer."""
        try:
            url = f"http://{self._addresses[i]}:{self._ports[3 * i + 2]}/{path}"
            with urllib.request.urlopen(url, timeout=1) as answer:
                found: dict[str, Any] = json.load(answer)
        except (OSError, ValueError):  # HTTPError and URLError are OSErrors
            return None
        return found

    def await_ready(self, i: int, limit: float = LIMIT) -> None:
        """Wait until a broker takes requests of JetStream, and has all that it missed."""

        def ready() -> bool:
            process = self._processes[i]
            assert process is not None, f"broker {i} does not run"
            assert process.poll() is None, f"broker {i} has ended: {self.output(i)[-2000:]}"
            health = self.ask(i, "healthz")
            return health is not None and health.get("status") == "ok"

        until(ready, f"broker {i} to be ready", limit)

    def streams(self, i: int) -> list[dict[str, Any]]:
        """Return what a broker knows of the streams of which it has a copy: name, cluster, state, consumers."""
        answer = self.ask(i, "jsz?consumers=true&leader-only=false") or {}
        accounts = answer.get("account_details") or []
        return [stream for account in accounts for stream in account.get("stream_detail") or []]

    def leader_of(self, stream: str, limit: float = LIMIT) -> int:
        """Return the number of the broker that leads a stream, whose name is that in NATS. Waits until there is one."""

        def leader() -> int | None:
            for i, process in enumerate(self._processes):
                if process is None:
                    continue
                for each in self.streams(i):
                    named = (each.get("cluster") or {}).get("leader", "")
                    if each["name"] == stream and named == f"broker-{i}":
                        return i + 1
            return None

        found: int = until(leader, f"a leader of {stream}", limit)
        return found - 1

    def call(self, question: Callable[[Any], Awaitable[Any]], limit: float = LIMIT) -> Any:
        """Return what an asynchronous function of a NATS client that is connected to all brokers returns."""

        login = f"larpixdaq:{self.password}@" if self.password else ""
        servers = tuple(f"nats://{login}{self.url(i)}" for i in range(len(self)))

        async def ask() -> Any:
            while True:  # not by nats-py's own attempts, which leave sockets open
                try:
                    client = await jetstream.connect(jetstream.Brokers(servers), "test", lambda reason: None)
                    break
                except BrokerError:
                    await asyncio.sleep(jetstream.RETRY_INTERVAL)
            try:
                return await question(client)
            finally:
                await jetstream.close(client)

        return asyncio.run(asyncio.wait_for(ask(), limit))


@contextmanager
def brokers(count: int = 3, folder: Path | None = None, **how: Any) -> Iterator[Brokers]:
    made = Brokers(count, folder, **how)
    try:
        yield made
    finally:
        made.close()
