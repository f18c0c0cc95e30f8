"""docs/quickstart.md, followed literally: each command in one shell, in order, and its output compared with the page.

Only the installation is left out, which .ci/run does with the README's command. The shell is in a network of its own,
with the ports of the page, where this user may make one (root, or user namespaces); otherwise on this machine.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import until, wait_for_line

SOURCES = Path(__file__).parents[2]
PAGE = (SOURCES / "docs" / "quickstart.md").read_text()
#: Seconds for one command of the page.
LIMIT = 60.0
#: Beginning of the commands of a shell in a network, process tree and /dev/shm of its own.
_OWN = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--net", "--pid", "--fork", "--kill-child"]
_OWN += ["--mount-proc", "sh", "-c", 'mount -t tmpfs none /dev/shm && ip link set lo up && exec "$@"', "sh"]


class Shell:
    """A bash that runs one command after the other. Their output goes to files, like that of jobs in the background."""

    def __init__(self, folder: Path, prefix: list[str]) -> None:
        self._out = folder / "output.txt"
        programs = folder / "programs"
        _install(programs)
        self._bash = subprocess.Popen(
            [*prefix, "bash", "--norc", "--noprofile"],
            cwd=folder,
            env={"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._write(f"set -m; exec 3>&1 >{self._out} 2>&1")

    def _write(self, text: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{text}\n".encode())

    def run(self, command: str) -> int:
        """Run a command, which must succeed. Returns where its output begins, for printed()."""
        since = self._out.stat().st_size if self._out.exists() else 0
        self._write(f"{command}\necho $? >&3")
        status = wait_for_line(self._bash, LIMIT)
        assert status == "0", f"{command}: exit status {status}: {self.printed(since)}"
        return since

    def printed(self, since: int) -> str:
        return self._out.read_bytes()[since:].decode()

    def await_lines(self, promised: str, since: int) -> None:
        until(lambda: not missing_line(promised, self.printed(since)), f"the output {promised!r}")

    def close(self) -> None:
        """End the shell, and with it all processes in its namespaces."""
        self._bash.communicate(b"larpixdaq down; kill $(jobs -p)\n", timeout=LIMIT)


def _install(folder: Path) -> None:
    """Make the programs of larpix-daq, which run the tested package, also where it is used without an installation."""
    folder.mkdir()
    for name, module in re.findall(
        r'^(larpixdaq[\w-]*) = "([\w.]+):main"$', (SOURCES / "pyproject.toml").read_text(), re.M
    ):
        script = folder / name
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    own = subprocess.run([*_OWN, "true"], capture_output=True, check=False).returncode == 0
    started = Shell(tmp_path, _OWN if own else [])
    try:
        yield started
    finally:
        started.close()


def steps() -> Iterator[tuple[str, str, str]]:
    """Yield the language, the text and the promised output of each example, without those of the installation."""
    rest = PAGE[PAGE.index("\n## Prove") :]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", rest, re.M | re.S)
    for index, (language, text) in enumerate(blocks):
        if language != "text":
            following = blocks[index + 1] if index + 1 < len(blocks) else ("", "")
            yield language, text, following[1] if following[0] == "text" else ""


def missing_line(promised: str, printed: str) -> str:
    """Return the first promised line that was not printed; "" if all were, in any order: that of components differs."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in filter(lambda line: line != "…", promised.splitlines()):
        words = [re.escape(" ".join(part.split())) for part in line.split("…")]
        pattern = re.compile(r"\s*.*?\s*".join(words) + r"\s*")
        if not any(pattern.fullmatch(other) for other in lines):
            return line
    return ""


@pytest.mark.timeout(300)
def test_a_reader_who_follows_the_page_gets_what_it_says(shell: Shell, tmp_path: Path) -> None:
    done, broken = 0, []
    for language, text, promised in steps():
        if language == "python":
            (tmp_path / "example.py").write_text(text)
            text = "python example.py\n"
        for command in text.splitlines():
            since = shell.run(command)
            done += 1
        if command.endswith("&"):  # its output comes when it is ready
            shell.await_lines(promised, since)
        if missing := missing_line(promised, shell.printed(since)):
            broken.append(f"{text}expected {missing!r} in:\n{shell.printed(since)}")
    assert not broken, "\n".join(broken)
    assert done > 12
