"""A system on the hosts of faults/network.py, set up as docs/hosts.md says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from network import Network
from processes import LIMIT, Process
from system import System, system

#: Names of the components on the second host, by module.
NAMES = {"offline_storage": "Second storage", "run_data": "Second monitor"}


@contextmanager
def two_hosts(
    folder: Path, net: Network, *, insecure: bool = False, env: Mapping[str, str] = MappingProxyType({})
) -> Iterator[System]:
    """Give a system with core and log on host "one", where its producer and Operators start too, and storage and
    monitor on host "two", with `env` in their environment.

    The second host has a state directory of its own, and no common memory with the first. Meanwhile the thread of the
    caller is on host "one".
    """
    with net.inside("one"), system(folder, net.address("one")) as line:
        line.insecure = insecure
        line.launch_core()
        line.launch("log", "--core", line.core, "--state-dir", folder / "state")
        operator = line.operator()
        for module in NAMES:
            line.prefix[module] = net.prefix("two")
            line.env[module] = {"XDG_STATE_HOME": str(folder / "two"), **env}
        if not insecure:
            with ExitStack() as stack:
                tokens = [operator.invite(name, "component").result(LIMIT)["token"] for name in NAMES.values()]
                where = {"env": line.env["run_data"], "prefix": line.prefix["run_data"], "directory": folder / "out"}
                joins = [
                    stack.enter_context(Process("larpixdaq.cli", "keys", "join", token, **where)) for token in tokens
                ]
                assert [join.wait() for join in joins] == [0, 0], [join.stderr for join in joins]
        line.launch_storage("--name", NAMES["offline_storage"])
        line.launch_monitor("--name", NAMES["run_data"])
        yield line
