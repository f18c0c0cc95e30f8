"""Check what is in the source distribution and the wheel in a folder, made from a clone without changes.

    python .ci/distributions.py FOLDER

The source distribution has each file of the repository. The wheel has each file of larpixdaq/, a compiled module for
each ext/NAME.pyx, and the licence. Neither has anything else. The recipe for conda requires the same versions as
pyproject.toml. Exit status 1, with what is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import tomllib

#: Files of the repository that no distribution needs, and files that the build adds to a source distribution.
LEFT_OUT = {".gitignore"}
MADE = {"PKG-INFO", "setup.cfg"}
#: Names in conda's channels that differ from those of Python packages, and packages that are not there.
CONDA_NAMES = {"isal": "python-isal"}
NOT_IN_CONDA = {"larpix-control"}


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one {pattern}, found {len(found)}")
    return found[0]


def source_files(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    return {name for name in names if ".egg-info/" not in name} - MADE


def wheel_files(path: Path) -> set[str]:
    """Return the names, each compiled module as larpixdaq/_native/NAME.so."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {f"{name.partition('.')[0]}.so" if name.endswith(".so") else name for name in names}


def requirements(project: str, recipe: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Return name and minimum version of each requirement to run, of pyproject.toml and of the recipe."""
    wanted = set()
    for line in tomllib.loads(project)["project"]["dependencies"]:
        name, version = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        if name not in NOT_IN_CONDA:
            wanted.add((CONDA_NAMES.get(name, name), version))
    run = recipe.partition("\n  run:\n")[2].partition("\n  run_constrained:")[0]
    return set(re.findall(r"^    - ([\w-]+) >=([\d.]+)", run, re.M)), wanted


def main() -> None:
    folder = Path(sys.argv[1])
    tracked = set(subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.splitlines())
    wheel = wheel_files(only(folder, "*.whl"))
    metadata = {name for name in wheel if name.partition("/")[0].endswith(".dist-info")}
    modules = {f"larpixdaq/_native/{Path(name).stem}.so" for name in tracked if name.endswith(".pyx")}
    modules.add("larpixdaq/_native/_shared.so")
    expected = {
        "source distribution": (source_files(only(folder, "*.tar.gz")), tracked - LEFT_OUT),
        "wheel": (wheel - metadata, {name for name in tracked if name.startswith("larpixdaq/")} | modules),
    }
    found, wanted = requirements(Path("pyproject.toml").read_text(), Path(".ci/conda/meta.yaml").read_text())
    expected["recipe for conda"] = {" ".join(each) for each in found}, {" ".join(each) for each in wanted}
    problems = [
        f"{what} {verb} {name}"
        for what, (found, wanted) in expected.items()
        for verb, names in (("lacks", wanted - found), ("has", found - wanted))
        for name in sorted(names)
    ]
    if not any(name.endswith("licenses/LICENSE") for name in metadata):
        problems.append("wheel lacks the licence")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
