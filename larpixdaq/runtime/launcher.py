"""Processes of one machine: started, watched, ended again. `larpixdaq up`, `down` and `demo` stand on this.

Whether systemd-logind removes this user's files from /dev/shm when the last of the user's sessions ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from larpixdaq.errors import ComponentError, ConfigError, FileError
from larpixdaq.runtime.file_access import open_private, try_lock

#: A process that has been told to end gets so long (seconds), then it is killed.
END_LIMIT = 15.0
_PR_SET_PDEATHSIG = 1
#: Like `python -m`, but without the current folder on sys.path: a source folder there would hide the installed package.
_RUN_MODULE = (
    "import sys, runpy; sys.path[:] = [p for p in sys.path if p]; module = sys.argv.pop(1); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
_SHARED_MEMORY: Final = Path("/dev/shm")
_SETTING: Final = re.compile(r"[ \t]*(#?)[ \t]*RemoveIPC[ \t]*=[ \t]*(\w+)[ \t]*", re.IGNORECASE)
_NO: Final = frozenset({"no", "n", "false", "f", "off", "0"})
#: Where logind's configuration is, the least important directory first.
_DIRECTORIES: Final = ("usr/lib/systemd", "usr/local/lib/systemd", "run/systemd", "etc/systemd")
_SYSTEM_UID_MAX: Final = 999


class Entry(msgspec.Struct, frozen=True):
    """A running process in the list of `larpixdaq up`. `started` distinguishes it from a later process with the same
    id."""

    module: str
    pid: int
    started: int
    arguments: list[str] = []


class Running(msgspec.Struct, frozen=True):
    """The processes that `larpixdaq up` started, in the order of starting. `core` is the core's address, `directory`
    the working directory of `up`, to which relative paths in the arguments refer."""

    core: str
    processes: list[Entry]
    directory: str = ""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody has now.

    Not one of those that Linux gives to outgoing connections (32768 and above): one of them may be taken by the time it
    is wanted, or by a connection that looks for whoever listened there before.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since the machine's boot; None when there is no such process (or it is
    dead)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs `larpixdaq.<module>` in a process of its own, with this interpreter."""
    return [sys.executable, "-c", _RUN_MODULE, f"larpixdaq.{module}", *arguments]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Group:
    """Child processes, each a module of ours; `close()` ends and reaps them in the reverse order of starting.

    What they write goes to files in `log_dir`, one per process.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.children: list[tuple[str, list[str], subprocess.Popen[bytes]]] = []

    def start(self, module: str, *arguments: str, pipes: bool = False, detach: bool = False) -> subprocess.Popen[bytes]:
        """Start the module with these arguments. With `pipes` its stdin and stdout are ours; without `detach` it is
        told to end when this thread ends, however that comes."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with open(self.log_dir / f"{module}.out", "ab") as out:
            child = subprocess.Popen(
                command(module, *arguments),
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else out,
                stderr=out,
                start_new_session=detach,
                preexec_fn=None if detach else _end_with_parent,
            )
        self.children.append((module, list(arguments), child))
        return child

    def check(self) -> None:
        """ComponentError, with the last line that it wrote, when a child has ended with an error."""
        for module, _, child in self.children:
            if child.poll():
                raise ComponentError(f"{module} ended with status {child.returncode}: {self.last_line(module)}")

    def last_line(self, module: str) -> str:
        lines = (self.log_dir / f"{module}.out").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def entries(self) -> list[Entry]:
        return [
            Entry(module, child.pid, start_time(child.pid) or 0, arguments)
            for module, arguments, child in self.children
        ]

    def close(self) -> None:
        for *_, child in reversed(self.children):
            if child.poll() is None:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_LIMIT)
            if child.poll() is None:
                child.kill()
                child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self.children.clear()


def components(
    core: str,
    log: str,
    output_dir: Path,
    state_dir: Path,
    source: Sequence[str],
    listens: str = "",
    storage: Sequence[str] = (),
) -> list[tuple[str, list[str]]]:
    """Module and arguments of every process of a complete system, in the order of starting.

    `core` is its address for the others; `listens`, unless it is the same, where it listens; `storage`: further options
    of the offline storage.
    """
    common = ["--core", core]
    return [
        ("core", ["--address", listens or core, "--log-address", log, "--state-dir", str(state_dir)]),
        ("log", [*common, "--address", log, "--state-dir", str(state_dir)]),
        ("offline_storage", [*common, "-o", str(output_dir), "--state-dir", str(state_dir), *storage]),
        ("run_data", common),
        ("producer", [*common, "--state-dir", str(state_dir), *source]),
    ]


def running_file(state_dir: Path) -> Path:
    return state_dir / "running.json"


def read_running(state_dir: Path) -> Running | None:
    """What `up` left in the state directory; None when there is nothing."""
    path = running_file(state_dir)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Running)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise FileError(f"{path}: not the list of processes that `larpixdaq up` writes: {error}") from None


@contextlib.contextmanager
def only_up(state_dir: Path) -> Iterator[None]:
    """ConfigError while another `larpixdaq up` is starting processes with this state directory."""
    with open(open_private(state_dir / "up.lock", os.O_RDWR | os.O_CREAT), "rb") as file:
        # A file system without locks: of two cores that start at once, only one gets the port.
        with contextlib.suppress(OSError):
            if not try_lock(file.fileno()):
                raise ConfigError(f"another `larpixdaq up` is starting a system with state directory {state_dir}")
        yield


def write_running(state_dir: Path, running: Running) -> None:
    path = running_file(state_dir)
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(running))
    new.replace(path)


def alive(entry: Entry) -> bool:
    """Whether the very process that was started still runs."""
    return start_time(entry.pid) == entry.started


def end_running(running: Running) -> list[str]:
    """End the processes in the reverse order of starting; return the modules of those that had to be killed."""
    killed = []
    for entry in reversed(running.processes):
        if not alive(entry):
            continue
        os.kill(entry.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_LIMIT
        while alive(entry) and time.monotonic() < deadline:
            _wait_for_exit(entry.pid, deadline - time.monotonic())
        if alive(entry):
            os.kill(entry.pid, signal.SIGKILL)
            killed.append(entry.module)
    return killed


def _wait_for_exit(pid: int, limit: float) -> None:
    """Wait until a process that is not our child has ended, at most `limit` seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        select.select([descriptor], [], [], max(0.0, limit))
    finally:
        os.close(descriptor)


def logind_removes_files(directory: Path, uid: int, root: Path = Path("/")) -> bool:
    """Whether logind will remove files of this user from the directory at the user's last log-out.

    It does with RemoveIPC (the default of most distributions), unless the user is a system user or lingers. `root`: the
    root of the file system whose configuration counts.
    """
    if not directory.absolute().is_relative_to(_SHARED_MEMORY) or uid <= _system_uid_max(root):
        return False
    if not (root / "run/systemd/users").is_dir():  # made by logind when it starts
        return False
    return not _lingers(uid, root) and _remove_ipc(root)


def _system_uid_max(root: Path) -> int:
    match = re.search(r"^[ \t]*SYS_UID_MAX[ \t]+(\d{1,9})\b", _text(root / "etc/login.defs"), re.MULTILINE)
    return int(match[1]) if match else _SYSTEM_UID_MAX


def _lingers(uid: int, root: Path) -> bool:
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return False
    return (root / "var/lib/systemd/linger" / name).exists()


def _remove_ipc(root: Path) -> bool:
    """The setting that counts: of the first logind.conf, then of all logind.conf.d/*.conf in the order of their names.

    Distributions write the default that they have built in as a comment.
    """
    files = [file for one in reversed(_DIRECTORIES) if (file := root / one / "logind.conf").is_file()][:1]
    more: dict[str, Path] = {}
    for one in _DIRECTORIES:
        more |= {file.name: file for file in (root / one / "logind.conf.d").glob("*.conf")}
    default = value = None
    for file in [*files, *(more[name] for name in sorted(more))]:
        for line in _text(file).splitlines():
            if match := _SETTING.fullmatch(line):
                if match[1]:
                    default = default or match[2]
                else:
                    value = match[2]
    return (value or default or "yes").lower() not in _NO


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
