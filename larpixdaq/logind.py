"""Whether systemd-logind removes this user's files from /dev/shm when the last of the user's sessions ends."""

from __future__ import annotations

import pwd
import re
from pathlib import Path
from typing import Final

_SHARED_MEMORY: Final = Path("/dev/shm")
_SETTING: Final = re.compile(r"[ \t]*(#?)[ \t]*RemoveIPC[ \t]*=[ \t]*(\w+)[ \t]*", re.IGNORECASE)
_NO: Final = frozenset({"no", "n", "false", "f", "off", "0"})
#: Where logind's configuration is, the least important directory first.
_DIRECTORIES: Final = ("usr/lib/systemd", "usr/local/lib/systemd", "run/systemd", "etc/systemd")
_SYSTEM_UID_MAX: Final = 999


def removes_files(directory: Path, uid: int, root: Path = Path("/")) -> bool:
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
