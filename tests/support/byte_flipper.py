"""Changes one byte of a file and verifies the result, in a separate process.

The HDF5 library may loop for ever over a damaged file, or crash, and holds the interpreter meanwhile. In a separate
process, that is a failure of one test.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from processes import wait_for_line

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import layout
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.verify import verify


def content(path: Path) -> Any:
    """Return everything that a reader gets out of a file."""
    with DataFile(path) as file:
        tables = [file.table(name).tobytes() for name in ("configs", "run/info", *layout.TABLES)]
        header = [file.attribute("_header", name) for name in ("version", "created", "modified", "asic_version")]
        types = file.attribute("packets", "packet_types"), file.attribute("configs", "asic_version")
        return file.packets().tobytes(), tables, header, types


class Flipper:
    """Runs the process, which writes changed copies beside the file at `path`.

    A process that hangs for `limit` seconds or crashes fails the test, and the next flip() starts a new one.
    """

    def __init__(self, path: Path, limit: float = 20.0) -> None:
        self.whole = path.read_bytes()
        self.size = len(self.whole)
        self._path = path
        self.limit = limit
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Flipper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def flip(self, place: int, change: int) -> dict[str, Any]:
        """Change the byte at `place`. Returns `findings` of verify, and `same` if the content is the original."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, self._path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{place} {change}\n".encode())
            answer: dict[str, Any] = json.loads(wait_for_line(self._process, self.limit))
        except (AssertionError, ValueError, OSError) as error:
            status = self._end()
            raise AssertionError(f"byte {place} ^ {change}: no verdict, status {status}: {error}") from None
        return answer

    def _end(self) -> int | None:
        """Kill the process. Returns its exit status if it had ended by itself."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        status = process.poll()
        process.kill()
        with process:  # closes the pipes and reaps the process
            return status


def judge(path: Path, original: Any) -> dict[str, Any]:
    findings = verify(path).findings
    same = not findings and content(path) == original
    with contextlib.suppress(FileError):
        json.dumps(file_info(path))
    return {"findings": findings, "same": same}


def main(good: Path) -> None:
    whole, original = good.read_bytes(), content(good)
    flipped = good.with_name("flipped.h5")
    for line in sys.stdin:
        place, change = map(int, line.split())
        changed = bytearray(whole)
        changed[place] ^= change
        flipped.write_bytes(changed)
        print(json.dumps(judge(flipped, original)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
