"""Search for inputs that break decoders, encoders, emulated boards, file readers and frames, guided by coverage.

    python bench/fuzz.py [--seconds S] [--jobs N] [--corpus DIR] [--grow] [--json] [TARGET|GROUP ...]

Each target of tests/support/fuzz_targets.py is searched for S seconds, with libFuzzer (atheris) in its own process:
mutations of the inputs in tests/corpus/TARGET, kept when they reach new branches of the kernels or of the Python code.
It needs a build with sanitizers and counters of branches, and a Python for which atheris has a wheel:

    apt-get install clang libclang-rt-14-dev
    python3.13 -m venv .venv-fuzz && . .venv-fuzz/bin/activate
    CC=clang LARPIXDAQ_BUILD=fuzzed pip install '.[test]' atheris

Prints a line for each target: executions, seconds, processor time, branches reached, inputs, findings. A finding is an
input with an exception that is not documented, a wrong result, a report of AddressSanitizer or UBSan, or more than
2 minutes or 4 GiB; it is kept in DIR/findings with the report beside it. The exit status is 1 with findings.

--corpus DIR is where the search keeps its inputs (default: fuzz in the current folder). A later search goes on with
them. --grow adds to tests/corpus those small inputs that reach branches which its inputs do not reach.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1] / "tests"
CORPUS = TESTS / "corpus"
sys.path.insert(0, str(TESTS / "support"))
#: Maximum bytes of an input, and of one that --grow adds.
MAX_BYTES = 4096
GROWN_BYTES = 700
#: Seconds of one execution, and MiB of the process, that are findings.
SLOWEST = 120
MEMORY = 4096
#: Findings of a target after which its search ends.
MAX_FINDINGS = 5


class Outcome(NamedTuple):
    """Result of the search of one target."""

    target: str
    executions: int
    seconds: float
    processor_seconds: float
    branches: int
    inputs: int
    findings: list[str]

    @property
    def line(self) -> str:
        numbers = (self.executions, round(self.seconds), round(self.processor_seconds), self.branches, self.inputs)
        return f"| {self.target} | {' | '.join(f'{n:,}' for n in (*numbers, len(self.findings)))} |"


def environment() -> dict[str, str]:
    """The environment of a search. SystemExit when atheris is missing."""
    found = importlib.util.find_spec("atheris")
    if found is None or found.origin is None:
        raise SystemExit("atheris is not installed: see the first lines of bench/fuzz.py")
    return os.environ | {
        "LD_PRELOAD": str(Path(found.origin).parents[1] / "asan_with_fuzzer.so"),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_sigbus=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that AddressSanitizer sees the bounds of Python's bytes
        "TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir(),
    }


class Run(NamedTuple):
    """A process of libFuzzer that has ended."""

    status: int
    log: str
    processor_seconds: float


def run(target: str, *options: str) -> Run:
    command = [sys.executable, __file__, "--child", target, *options]
    with (
        tempfile.TemporaryDirectory(prefix="larpixdaq-fuzz-") as files,  # libFuzzer ends without removing its own
        tempfile.TemporaryFile("w+", errors="replace") as log,
    ):
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": files})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return Run(process.returncode, log.read(), usage.ru_utime + usage.ru_stime)


def search(target: str, seconds: float, folder: Path) -> Outcome:
    """Search one target for some seconds. It goes on after a finding."""
    kept, findings = folder / target, folder / "findings"
    kept.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    executions = branches = 0
    processor = 0.0
    found: list[str] = []
    began = time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 1 and len(found) < MAX_FINDINGS:
        done = run(
            target, str(kept), str(CORPUS / target), f"-max_total_time={int(left)}", f"-max_len={MAX_BYTES}",
            f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={findings / target}-",
            "-print_final_stats=1", "-reload=0", "-use_value_profile=1",
        )  # fmt: skip
        processor += done.processor_seconds
        numbers = re.findall(r"^(?:#|stat::number_of_executed_units: )(\d+)", done.log, re.MULTILINE)
        executions += max(map(int, numbers), default=0)
        branches = max([branches, *map(int, re.findall(r" cov: (\d+) ", done.log))])
        if not done.status:
            break
        artifacts = re.findall(r"Test unit written to (\S+)", done.log)
        found += artifacts or [f"{target}: ended with status {done.status} and no input: {done.log[-500:]}"]
        for artifact in artifacts:
            Path(artifact + ".txt").write_text(done.log[-20_000:])
        if not artifacts:
            break
    seconds = time.monotonic() - began
    outcome = Outcome(target, executions, seconds, processor, branches, len(list(kept.iterdir())), found)
    print("\n".join([outcome.line, *(f"found: {finding}" for finding in found)]), file=sys.stderr, flush=True)
    return outcome


def grow(target: str, folder: Path) -> None:
    """Add the inputs of a search to the corpus that reach new branches, small ones only."""
    run(target, "-merge=1", "-use_counters=0", f"-max_len={GROWN_BYTES}", str(CORPUS / target), str(folder / target))


def child(target: str, options: list[str]) -> None:
    """The process of a search: never returns."""
    import atheris

    with atheris.instrument_imports(include=["larpixdaq"]):
        import fuzz_targets
    logging.disable()
    checks = {name: check for group in fuzz_targets.TARGETS.values() for name, check in group.items()}
    program = shlex.join([sys.executable, __file__, "--child", target])  # by which a merge starts it again, in a shell
    atheris.Setup([program, *options], checks[target])
    atheris.Fuzz()


def write_seeds(targets: list[str]) -> None:
    """Begin the corpus of targets that have none."""
    from fuzz_targets import SEEDS

    for target, seeds in ((target, seeds) for make in SEEDS.values() for target, seeds in make().items()):
        if target in targets and not (CORPUS / target).exists():
            (CORPUS / target).mkdir(parents=True)
            for number, seed in enumerate(seeds):
                (CORPUS / target / f"seed-{number:02d}").write_bytes(seed)


def main() -> int:
    if "fuzzer" not in os.environ.get("LD_PRELOAD", ""):  # compiled modules of this build load with it only
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    from common import argument_parser, machine

    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help="targets or groups of targets (default: all)")
    add("--seconds", type=float, default=60.0, metavar="S", help="for each target (default %(default)g)")
    add("--jobs", type=int, default=1, metavar="N", help="searches at the same time (default %(default)d)")
    add("--corpus", type=Path, default=Path("fuzz"), metavar="DIR", help="for inputs, findings (default %(default)s)")
    add("--grow", action="store_true", help="add small inputs to tests/corpus")
    options = parser.parse_args()
    from fuzz_targets import TARGETS

    every = {name: [name] for group in TARGETS.values() for name in group}
    chosen = every | {group: list(checks) for group, checks in TARGETS.items()}
    if unknown := set(options.targets) - chosen.keys():
        parser.error(f"unknown target {min(unknown)}; there are {', '.join(chosen)}")
    targets = [name for each in options.targets or TARGETS for name in chosen[each]]
    folder = options.corpus.resolve()
    write_seeds(targets)
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda target: search(target, options.seconds, folder), targets))
    if options.grow:
        for target in targets:
            grow(target, folder)
    if options.json:
        print(json.dumps([outcome._asdict() for outcome in outcomes]))
    else:
        print(f"{text(outcomes)}\n\n{machine()}")
    return 1 if any(outcome.findings for outcome in outcomes) else 0


def text(outcomes: list[Outcome]) -> str:
    head = ["| target | executions | seconds | processor time, s | branches | inputs | findings |"]
    head += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    found = [f"found: {finding}" for outcome in outcomes for finding in outcome.findings]
    return "\n".join([*head, *(outcome.line for outcome in outcomes), *found])


if __name__ == "__main__":
    sys.exit(main())
