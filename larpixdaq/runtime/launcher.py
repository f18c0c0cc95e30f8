"""Starts and ends the processes of a system on one machine, for `larpixdaq up`, `down`, `demo` and the supervisor.

Finds out whether systemd-logind removes this user's files from /dev/shm at the user's last log-out.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from larpixdaq.errors import ComponentError, ConfigError, FileError
from larpixdaq.runtime.child_process import end_with_parent
from larpixdaq.runtime.file_access import open_private, try_lock

#: Maximum seconds from SIGTERM to the end of a process; then it is killed.
END_LIMIT = 15.0
#: Like `python -m`, but without the current folder in sys.path, because a source folder there would hide the installed
#: package.
_RUN_MODULE = (
    "import sys, runpy; sys.path[:] = [p for p in sys.path if p]; module = sys.argv.pop(1); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
_SHARED_MEMORY: Final = Path("/dev/shm")
_SETTING: Final = re.compile(r"[ \t]*(#?)[ \t]*RemoveIPC[ \t]*=[ \t]*(\w+)[ \t]*", re.IGNORECASE)
_FALSE: Final = frozenset({"no", "n", "false", "f", "off", "0"})
#: Directories of logind's configuration, the least important first.
_DIRECTORIES: Final = ("usr/lib/systemd", "usr/local/lib/systemd", "run/systemd", "etc/systemd")
_SYSTEM_UID_MAX: Final = 999
_T = TypeVar("_T")


class Wanted(msgspec.Struct, frozen=True):
    """A process of a plan. `name`: of its component; "core" for the core."""

    module: str
    name: str
    arguments: list[str]


class Plan(msgspec.Struct, frozen=True):
    """The processes that `larpixdaq up` wants, for the supervisor.

    `id` is another one at each `up`. `core`: address of the core. `directory`: working directory of the processes.
    `supervisor`: name of the supervisor as a component, `module`: its module. `force`: change processes also in a run.
    """

    id: str
    core: str
    directory: str
    processes: list[Wanted]
    supervisor: str = "Supervisor"
    insecure: bool = False
    force: bool = False
    module: str = ""


class Entry(msgspec.Struct, frozen=True):
    """A process under supervision, as its supervisor has written it. `started` (see start_time) tells it from a later
    process with its id; both are 0 while it does not run.

    `directory`: its working directory. `registered`: whether this process has registered with the core; of the core
    itself: whether it has answered; of an emulator: whether it has said that it is ready. `failures`: number of starts
    in a row that ended before. Other fields as in reports.SupervisedProcess.
    """

    module: str
    pid: int
    started: int
    arguments: list[str] = []
    name: str = ""
    state: str = "running"
    registered: bool = False
    since: float = 0.0
    restarts: int = 0
    failures: int = 0
    last_exit: str = ""
    last_line: str = ""
    directory: str = ""


class RunningSystem(msgspec.Struct, frozen=True):
    """The processes of `larpixdaq up`, in the order of starting, as their supervisor has written them.

    `core`: address of the core. `directory`: working directory of `up`, for relative paths in the arguments. `plan`: id
    of the plan that is in effect. `waiting`: names of processes that could not be changed, and why. `supervisor`: the
    supervisor itself; `problem`: why it is not registered.
    """

    core: str
    processes: list[Entry]
    directory: str = ""
    plan: str = ""
    waiting: str = ""
    supervisor: Entry | None = None
    insecure: bool = False
    problem: str = ""


def free_port() -> int:
    """Return a free TCP port of the loopback interface, below 32768.

    Linux gives the ports from 32768 on to outgoing connections, so that they may be in use when a process binds them.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot, None if there is no such living process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `larpixdaq.<module>` with this interpreter."""
    return [sys.executable, "-c", _RUN_MODULE, f"larpixdaq.{module}", *arguments]


class Group:
    """Child processes, each with one module of larpixdaq. close() ends them in the reverse order of starting.

    Their output goes to files in `log_dir`, one per module.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.children: list[tuple[str, list[str], subprocess.Popen[bytes]]] = []

    def start(self, module: str, *arguments: str, pipes: bool = False, detach: bool = False) -> subprocess.Popen[bytes]:
        """Start the module. With `pipes` its stdin and stdout are pipes to this process.

        Without `detach` the kernel sends it SIGTERM when this thread ends, for whatever reason.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with open(self.log_dir / f"{module}.out", "ab") as out:
            child = subprocess.Popen(
                command(module, *arguments),
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else out,
                stderr=out,
                start_new_session=detach,
                preexec_fn=None if detach else lambda: end_with_parent(signal.SIGTERM),
            )
        self.children.append((module, list(arguments), child))
        return child

    def check(self) -> None:
        """Raise ComponentError, with the last line of its output, if a child has ended with an error."""
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
    listen_address: str = "",
    storage: Sequence[str] = (),
) -> list[tuple[str, list[str]]]:
    """Return module and arguments of every process of a complete system, in the order of starting.

    `core`: address at which the other processes connect to the core. `listen_address`: address at which it listens, if
    different. `storage`: further options of the offline storage.
    """
    common = ["--core", core]
    return [
        ("core", ["--address", listen_address or core, "--log-address", log, "--state-dir", str(state_dir)]),
        ("log", [*common, "--address", log, "--state-dir", str(state_dir)]),
        ("offline_storage", [*common, "-o", str(output_dir), "--state-dir", str(state_dir), *storage]),
        ("run_data", common),
        ("producer", [*common, "--state-dir", str(state_dir), *source]),
    ]


def running_file(state_dir: Path) -> Path:
    return state_dir / "running.json"


def read_running(state_dir: Path) -> RunningSystem | None:
    """Return the list that a supervisor left in the state directory, None if there is none. Raises FileError."""
    return _read(running_file(state_dir), RunningSystem, "the list of processes that `larpixdaq up` writes")


@contextlib.contextmanager
def up_lock(state_dir: Path) -> Iterator[None]:
    """Keep other `larpixdaq up` with this state directory from starting processes. Raises ConfigError if one does."""
    with open(open_private(state_dir / "up.lock", os.O_RDWR | os.O_CREAT), "rb") as file:
        # on a file system without locks two cores may start at once, and only one gets the port
        with contextlib.suppress(OSError):
            if not try_lock(file.fileno()):
                raise ConfigError(f"another `larpixdaq up` is starting a system with state directory {state_dir}")
        yield


def write_running(state_dir: Path, running: RunningSystem) -> None:
    _write(running_file(state_dir), running)


def plan_file(state_dir: Path) -> Path:
    return state_dir / "plan.json"


def write_plan(state_dir: Path, plan: Plan) -> None:
    _write(plan_file(state_dir), plan)


def read_plan(state_dir: Path) -> Plan | None:
    """Return the plan of the last `up` in this state directory, None if there is none. Raises FileError."""
    return _read(plan_file(state_dir), Plan, "the plan that `larpixdaq up` writes")


def _read(path: Path, kind: type[_T], what: str) -> _T | None:
    """Read a file that only this user can have written, because it says which programs are started."""
    try:
        with open(open_private(path, os.O_RDONLY), "rb") as file:
            return msgspec.json.decode(file.read(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise error if isinstance(error, FileError) else FileError(f"{path}: not {what}: {error}") from None


def _write(path: Path, content: msgspec.Struct) -> None:
    write_private(path, msgspec.json.format(msgspec.json.encode(content), indent=1))


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read, whole or not at all, also in a power cut. Raises FileError."""
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        with open(open_private(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"{path}: {error.strerror}") from None


def is_running(entry: Entry) -> bool:
    """Return whether the process still runs, not another process with the same id."""
    return start_time(entry.pid) == entry.started


def send_signal(entry: Entry, number: signal.Signals) -> bool:
    """Send a signal to the process. Returns False if it does not run any more."""
    try:
        process = os.pidfd_open(entry.pid)
    except OSError:
        return False
    try:
        if not is_running(entry):  # looked at after pidfd_open(), so that another process with its id gets no signal
            return False
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True


def end_process(entry: Entry, limit: float = END_LIMIT) -> bool:
    """End a process, and wait until it has ended. Returns False if it had to be killed."""
    try:
        process = os.pidfd_open(entry.pid)
    except OSError:
        return True
    try:
        if send_signal(entry, signal.SIGTERM) and not select.select([process], [], [], limit)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], limit)
            return False
    except ProcessLookupError:  # it has just ended
        pass
    finally:
        os.close(process)
    return True


def logind_removes_files(directory: Path, uid: int, root: Path = Path("/")) -> bool:
    """Return whether logind will remove this user's files from the directory at the user's last log-out.

    It does with RemoveIPC (the default of most distributions), unless the user is a system user or lingers. `root`:
    directory with the configuration.
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
    """Return the value of RemoveIPC: of the most important logind.conf, then of logind.conf.d/*.conf by name.

    A comment in these files has the default that the distribution has built in.
    """
    main = [file for name in reversed(_DIRECTORIES) if (file := root / name / "logind.conf").is_file()][:1]
    drop_ins: dict[str, Path] = {}
    for directory in _DIRECTORIES:
        drop_ins |= {file.name: file for file in (root / directory / "logind.conf.d").glob("*.conf")}
    default = value = None
    for file in [*main, *(drop_ins[name] for name in sorted(drop_ins))]:
        for line in _text(file).splitlines():
            if match := _SETTING.fullmatch(line):
                if match[1]:
                    default = default or match[2]
                else:
                    value = match[2]
    return (value or default or "yes").lower() not in _FALSE


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
