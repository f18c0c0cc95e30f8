"""Read files of larpix-daq with other programs, each in an environment of its own, and compare what they found.

    python bench/compatibility.py [--only NAME ...] [--larpix-control DIR] [--larpix-monitor DIR]
                                  [--h5flow DIR --ndlar-flow DIR] [--update]

The files have hits of two boards with syncs, triggers, INFO messages and chip configurations, in layouts 2.4, 1.0 and
3.0; a raw file; and a file that grows. The other programs are installed with pip; those that are no packages are taken
from checkouts, which the options name and which stay as they are. Old versions need old versions of Python, which are
found on PATH or at pyenv. What is not there is not run, and the table says so. `--update` writes the table into
docs/compatibility.md. The exit status is 1 if a program found something else than was written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from common import argument_parser, update, with_source
from file_builder import V1, V2, V3, Feed, random_rows, run_info
from numpy.typing import NDArray

from larpixdaq._native import decoders, word_codec
from larpixdaq.constants import COUNTS
from larpixdaq.hdf5.layout import TABLES
from larpixdaq.hdf5.raw_file import make_raw
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import REGISTERS, SENT, Configurations
from larpixdaq.schema import SPAN, Asic

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/compatibility.md"
READERS = Path(__file__).with_name("compatibility_readers.py")
#: Maximum seconds to install the packages of an environment, and of a reader.
LIMIT = 900.0
#: Seconds of data, events of a second, hits of an event and board, ticks of the first event and between two events.
SECONDS, EVENTS, HITS, FIRST, APART = 10, 60, 30, 200_000, 150_000
UNIX = 1_795_331_571
#: Ticks after a reset in which ndlar_flow takes no hits.
SYNC_CUT = 1_000_000
CHIPS = 4
#: Columns of received words that the conversion of a raw file restores.
WORD_COLUMNS = [
    "io_group",
    "io_channel",
    "chip_id",
    "channel_id",
    "timestamp",
    "dataword",
    "valid_parity",
    "receipt_timestamp",
]

Found = dict[str, Any]


class Case(NamedTuple):
    """The files, and what was written into them.

    `rows`: those of the layouts 2.4, 1.0 and 3.0, and of the growing file. `registers`: sum of the chips' registers.
    `messages`: number and bytes of the boards' messages.
    """

    folder: Path
    v2: Path
    v1: Path
    v3: Path
    raw: Path
    growing: Path
    writer: RunFile
    rows: dict[str, NDArray[Any]]
    registers: int
    messages: tuple[int, int]

    def described(self, **more: Any) -> str:
        paths = {name: str(value) for name, value in self._asdict().items() if isinstance(value, Path)}
        return json.dumps({**paths, "tables": list(TABLES), "word columns": WORD_COLUMNS, **more})


class Row(NamedTuple):
    """A line of the table. `command`: the call that shows it. `judge` returns what differs from what was written."""

    name: str
    command: str
    judge: Callable[[Found, Case], list[str]]
    reader: str = ""
    needs: tuple[str, ...] = ()
    python: str = ""
    checkout: tuple[str, ...] = ()
    workaround: str = ""


# -- the files --


def board_messages(io_group: int, rng: np.random.Generator) -> list[bytes]:
    """Return the PACMAN messages of a board whose clock is reset each second, by a sync word."""
    messages = []
    for second in range(SECONDS):
        words = [struct.pack("<2cBxL8x", b"S", b"S", 0, 10_000_000)]
        messages.append((second, words))
        for event in range(EVENTS):
            tick = FIRST + APART * event
            words = [struct.pack("<2cxxL8x", b"T", b"\x02", tick)]
            for hit in range(HITS):
                word = int(rng.integers(11, 111)) << 2 | int(rng.integers(0, 64)) << 10 | tick + hit << 16
                word |= int(rng.integers(20, 250)) << 48 | 1 << 62
                odd = int(word_codec.parity(np.array([word], np.uint64), asic=Asic.V2)[0])
                words.append(struct.pack("<cBLxxQ", b"D", int(rng.integers(1, 33)), tick + hit + 300, odd))
            messages.append((second, words))
    return [struct.pack("<cIxH", b"D", UNIX + second, len(words)) + b"".join(words) for second, words in messages]


def decoded(io_group: int, message: bytes) -> NDArray[Any]:
    decoder = decoders.PacmanDecoder(io_group, Asic.V2)
    decoder.start(np.zeros(len(COUNTS), np.uint64))
    decoder.feed(np.frombuffer(message, np.uint8), np.array([(0, len(message))], SPAN))
    rows = np.zeros(4 * HITS, V2.dtype)
    return rows[: decoder.decode(rows)]


def configurations() -> Configurations:
    """Return configurations of chips of which only the trims are not 0."""
    sent = np.zeros((CHIPS, REGISTERS), np.uint8)
    sent[:, :64] = np.arange(64) % 32
    chips = np.array([(1, 1, 11 + chip) for chip in range(CHIPS)], np.uint8)
    return Configurations("2", chips, sent, np.zeros_like(sent), np.full_like(sent, SENT))


def make_case(folder: Path) -> Case:
    rng = np.random.default_rng(7)
    boards = {io_group: board_messages(io_group, rng) for io_group in (1, 2)}
    feed = Feed()
    file = RunFile(folder, run_info())
    found = configurations()
    block, rows = feed.info(found.text())
    file.add(msgspec.structs.replace(block, configs=found.pack()), rows)
    pieces = [
        decoded(group, message) for pair in zip(*boards.values(), strict=True) for group, message in enumerate(pair, 1)
    ]
    for first in range(0, len(pieces), 100):
        file.add(*feed.block(np.concatenate(pieces[first : first + 100])))
    file.add(*feed.info("Ending run"))
    file.end(feed.end())
    v2 = file.close().path
    written = {"2.4": np.concatenate(feed.rows)}
    texts = written["2.4"]["packet_type"] == 5
    written["2.4"]["counter"][texts] = np.arange(np.count_nonzero(texts))  # set by the storage: rows of /messages
    paths = {}
    for label, layout, run in (("1.0", V1, 43), ("3.0", V3, 44)):
        other = Feed(run, layout=layout)
        small = RunFile(folder, run_info(layout, run))
        small.add(*other.block(random_rows(rng, 1000, layout)))
        small.end(other.end())
        paths[label] = small.close().path
        written[label] = np.concatenate(other.rows)
    grows = Feed(45)
    growing = RunFile(folder, run_info(run=45))
    for _ in range(5):
        growing.add(*grows.block(random_rows(rng, 16_384)))
    growing.work(pressed=True)
    written["growing"] = np.concatenate(grows.rows)
    sent = [message for messages in boards.values() for message in messages]
    raw = make_raw(v2).path
    totals = (len(sent), sum(map(len, sent)))
    registers = int(found.sent.sum(dtype=np.uint64))
    return Case(folder, v2, paths["1.0"], paths["3.0"], raw, growing.path, growing, written, registers, totals)


# -- what was found, and what was written --


def sums(rows: NDArray[Any]) -> dict[str, int]:
    return {name: int(rows[name].sum()) for name in rows.dtype.names or () if rows[name].dtype.kind in "uif"}


def differs(what: str, found: Any, written: Any) -> list[str]:
    return [] if found == written else [f"{what}: found {found}, written {written}"]


def all_rows(found: Found, case: Case, label: str) -> list[str]:
    rows = case.rows[label]
    problems = differs(f"rows of {label}", found["rows"], len(rows))
    return problems + [
        problem
        for name, value in sums(rows).items()
        for problem in differs(f"{label} {name}", found["sums"].get(name), value)
    ]


def judge_h5py(found: Found, case: Case) -> list[str]:
    return [problem for label in case.rows for problem in all_rows(found[label], case, label)]


def judge_h5dump(found: Found, case: Case) -> list[str]:
    written = [list(row) for row in case.rows["2.4"].tolist()]
    problems = [] if found.pop("rows") == written else ["rows of 2.4 differ"]
    return problems + differs("files that it cannot dump", found["failed"], [])


def judge_pandas(found: Found, case: Case) -> list[str]:
    refused = [name for name, _ in found["refused"]]
    return (
        all_rows(found["2.4"], case, "2.4")
        + differs("tables with 2-D columns that are refused", refused, ["run/configs"])
        + differs("configs as lists", found["configs as lists"], [CHIPS, case.registers])
    )


def judge_pytables(found: Found, case: Case) -> list[str]:
    rows = case.rows["2.4"]
    chosen = int(np.count_nonzero((rows["packet_type"] == 0) & (rows["chip_id"] == 11)))
    return (
        all_rows(found["2.4"], case, "2.4")
        + differs("hits of chip 11", found["chip 11"], chosen)
        + differs("configs", found["configs"], [CHIPS, case.registers])
    )


def judge_larpix_control(found: Found, case: Case) -> list[str]:
    rows = case.rows["2.4"]
    data = rows[rows["packet_type"] == 0]
    kinds = ("Packet_v2", "TimestampPacket", "MessagePacket", "SyncPacket", "TriggerPacket")
    codes = np.bincount(rows["packet_type"], minlength=8)
    numbers = (codes[:4].sum(), codes[4], codes[5], codes[6], codes[7])
    problems = differs("packets", found["kinds"], {k: int(n) for k, n in zip(kinds, numbers, strict=True) if n})
    problems += [
        p for name, value in found["sums"].items() for p in differs(name, value, int(data[name].sum(dtype=np.uint64)))
    ]
    problems += differs("valid parity", found["valid"], int(data["valid_parity"].sum()))
    problems += differs(
        "messages", found["messages"], [configurations().text()[:64], configurations().text()[64:], "Ending run"]
    )
    problems += differs("configs", found["configs"], [CHIPS, case.registers])
    problems += differs("versions", found["labels"], ["2.4", "1.0"])
    problems += differs("packets of 1.0", found["1.0"], len(case.rows["1.0"]))
    problems += differs("file of 3.0", found["3.0"], "Unknown version: 3.0")
    return problems + differs("raw messages and bytes", tuple(found["raw"]), case.messages)


def judge_converted(found: Found, case: Case) -> list[str]:
    rows = case.rows["2.4"]
    received = rows[rows["packet_type"] == 0]
    problems = differs("rows", found["rows"], len(rows) - int(np.count_nonzero(rows["packet_type"] == 5)))
    return problems + differs("words", found["sums"], sums(received[WORD_COLUMNS]))


def judge_larpixparser(found: Found, case: Case) -> list[str]:
    problems = differs("events", found["events"], EVENTS)
    if not (found["hits"] > 100 and found["positions"] and found["charge"] == found["hits"]):
        problems.append(f"hits: {found['hits']}, charges: {found['charge']}")
    return problems


def judge_larpix_monitor(found: Found, case: Case) -> list[str]:
    rows = case.rows["2.4"]
    without_info = len(rows) - int(np.count_nonzero(rows["packet_type"] == 5))
    # One plot has the path of a geometry file in its source.
    problems = [f"{name}: {why}" for name, why in found["failed"] if "/home/" not in why]
    return problems + differs("rows of the raw file", found["raw rows"], without_info)


def judge_ndlar_flow(found: Found, case: Case) -> list[str]:
    """Compare events, their hits, and the electric field, with those of plain rows and of the run list."""
    events, hits, field = found["module0_flow, plain rows"]
    planted = SECONDS * sum(FIRST + APART * event > SYNC_CUT for event in range(EVENTS))
    problems = [] if planted - 1 <= events <= planted else differs("events", events, planted)
    problems += differs("module0_flow", found["module0_flow"], [events, hits, field])
    problems += differs("proto_nd_flow with vertices", found["proto_nd_flow with vertices"][0], planted)
    problems += differs("field of the run list", found["run list"][2], field)
    # What makes a workaround necessary.
    problems += (
        [] if "'vertices'" in found["proto_nd_flow"] else differs("without vertices", found["proto_nd_flow"], "")
    )
    return problems + differs("field of a name with a dash", round(found["run list, name with a dash"][2], 4), 0.0999)


# -- the table --


def environment(folder: Path, version: str, needs: tuple[str, ...]) -> Path:
    """Return the interpreter of an environment in a folder; make it unless it is there. LookupError when it fails."""
    target = folder / re.sub(r"[^\w.]+", "-", "_".join((version or "this", *needs)))
    done = target / "installed"
    if not done.exists():
        call([interpreter_of(version), "-m", "venv", "--clear", target])
        pip = [target / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        call([*pip, "--only-binary", "h5py,tables", *needs])
        done.touch()
    return target / "bin/python"


def interpreter_of(version: str) -> str:
    """Return this interpreter, or one of a version. LookupError without one."""
    if not version:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        if found and subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(found)
    raise LookupError(f"no Python {version}")


def call(command: list[Any], **options: Any) -> str:
    """Run a command and return its output. LookupError with the last line of its errors when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, **options)
    if done.returncode:
        raise LookupError((done.stderr.strip().splitlines() or ["no output"])[-1][:300])
    return done.stdout


def read_h5dump(case: Case) -> Found:
    if not shutil.which("h5dump"):
        raise LookupError("no h5dump")
    out = case.folder / "packets.txt"
    version = call(["h5dump", "--version"]).split()[-1]
    call(["h5dump", "-y", "-w", "0", "-d", "/packets", "-o", out, case.v2])
    numbers = np.array(re.findall(rb"\d+", out.read_bytes()), np.uint64)
    done = [subprocess.run(["h5dump", path], capture_output=True) for path in (case.v2, case.v1, case.v3, case.raw)]
    return {
        "versions": {"h5dump": version},
        "rows": numbers.reshape(-1, len(V2.dtype.names or ())).tolist(),
        "failed": [str(run.args[-1]) for run in done if run.returncode or run.stderr],
    }


def reading(row: Row, case: Case, environments: Path, paths: dict[str, Path]) -> Found:
    """Let a program read the files. LookupError when it, or its reader, cannot be run."""
    missing = [name for name in row.checkout if name not in paths]
    if missing:
        raise LookupError(f"no checkout: {', '.join('--' + name for name in missing)}")
    if not row.reader:
        return read_h5dump(case)
    interpreter = environment(environments, row.python, row.needs)
    folder = Path(tempfile.mkdtemp(dir=case.folder))
    checkouts = [paths[name] for name in row.checkout]
    flows = ndlar_flows(case, folder) if row.reader == "ndlar_flow" else []
    described = folder / "case.json"
    described.write_text(
        case.described(folder=str(folder), checkout=str(checkouts[-1]) if checkouts else "", flows=flows)
    )
    search = os.pathsep.join(str(path / sub) for path in checkouts for sub in ("", "src"))
    env = os.environ | {"PYTHONPATH": search, "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1"}
    if row.reader == "larpix_monitor":
        env["PIXEL_GEOMETRY_PATH"] = str(pixel_geometry(folder))
    output = call([interpreter, READERS, row.reader, described], cwd=folder, env=env)
    return json.loads(output.splitlines()[-1])


def pixel_geometry(folder: Path) -> Path:
    """Write a layout with a pixel for each channel of a tile, in the form that larpix-monitor reads; JSON is YAML."""
    chips = [[chip, [64 * (chip - 11) + channel + 1 for channel in range(64)]] for chip in range(11, 111)]
    pixels = [[pixel, pixel % 80, pixel // 80] for pixel in range(6401)]
    path = folder / "layout.yaml"
    path.write_text(json.dumps({"chips": chips, "pixels": pixels}))
    return path


def ndlar_flows(case: Case, folder: Path) -> list[list[str]]:
    """Return name, workflow and file of each event building.

    Also of a file that has the rows and nothing else, of a copy with what proto_nd_flow expects, and of a name with a
    dash: a run list has `-` for a run without light data, and ndlar_flow takes the first run whose charge or light file
    is a part of the path.
    """
    import h5py

    truth = folder / "with_truth.h5"
    shutil.copy(case.v2, truth)
    with h5py.File(truth, "r+") as file:
        file.create_dataset("vertices", (0,), [("vertex_id", "u8")])
        file.create_dataset("trajectories", (0,), [("traj_id", "u8")])
    plain = folder / "plain.h5"
    with h5py.File(plain, "w") as file:
        file.create_dataset("packets", data=case.rows["2.4"])
    dashed = folder / "packet-physics.h5"
    shutil.copy(case.v2, dashed)
    runs = folder / "runs.txt"
    runs.write_text("e_field charge_filename light_filename\n999 another_run -\n")
    listed = folder / "listed.yaml"
    listed.write_text(RUN_LIST.format(runs))
    workflow = "yamls/{}/workflows/charge/charge_event_building.yaml"
    return [
        ["module0_flow", workflow.format("module0_flow"), str(case.v2)],
        ["proto_nd_flow", workflow.format("proto_nd_flow"), str(case.v2)],
        ["proto_nd_flow with vertices", workflow.format("proto_nd_flow"), str(truth)],
        ["module0_flow, plain rows", workflow.format("module0_flow"), str(plain)],
        ["run list", str(listed), str(case.v2)],
        ["run list, name with a dash", str(listed), str(dashed)],
    ]


#: Workflow of h5flow that builds events with a run list.
RUN_LIST = """flow:
  source: raw_event_generator
  stages: []
resources:
  - classname: RunData
    path: module0_flow.resources.run_data
    params:
      path: run_info
      runlist_file: {}
      defaults: {{charge_filename: none, light_filename: none, e_field: 0.05, light_samples: 256,
                 charge_thresholds: medm, is_mc: false, crs_ticks: 0.1, lrs_ticks: 0.01}}
raw_event_generator:
  !include yamls/module0_flow/reco/charge/RawEventGenerator.yaml
"""

FROM_FILE = "hdf5format.from_file(FILE, load_configs=True)"
HDF5 = "h5py.File(FILE)['packets'][:]"
OLD = "refuses layout 3.0 (v3 chips), which it does not know: take h5py"
COLUMNS = (
    "columns with several values (`registers`; `sent`, `read`, `known`; `raw`): "
    "`DataFrame({name: list(rows[name]) for name in rows.dtype.names})`"
)
PARSER = (
    "give it the packets between two resets of the boards' clocks; "
    "install scikit-learn, pyyaml and setuptools<81, which it does not name"
)
MONITOR = (
    "`run_monitor.py` takes raw files only; `PIXEL_GEOMETRY_PATH` names the layout; "
    "AnodeSimpleMean, -Rate and -Std have the path of a geometry file in their source"
)
FLOW = (
    "proto_nd_flow: add empty datasets `vertices` (`vertex_id`) and `trajectories` (`traj_id`) to a copy, "
    "because it opens them also in real data; "
    "with a run list that has `-` for a run without light data, no path with a dash, "
    "because it would take the data of that run"
)


def table_rows() -> list[Row]:
    def hdf5(version: str, python: str = "") -> Row:
        needs = (f"h5py=={version}", *(("numpy<2",) if python else ()))
        note = "a file that grows: `swmr=True`"
        return Row(f"h5py {version}", HDF5, judge_h5py, "h5py", needs, python, workaround=note)

    def control(version: str, python: str = "") -> Row:
        needs = (f"larpix-control=={version}",)
        call = FROM_FILE
        return Row(
            f"larpix-control {version}", call, judge_larpix_control, "larpix_control", needs, python, workaround=OLD
        )

    frame = "pandas.DataFrame(h5py.File(FILE)['packets'][:])"
    return [
        Row("h5dump", "h5dump -d /packets FILE", judge_h5dump),
        hdf5("3.1.0", "3.9"),
        hdf5("3.8.0", "3.11"),
        hdf5("3.11.0", "3.12"),
        hdf5("3.14.0"),
        hdf5("3.16.0"),
        Row("pandas", frame, judge_pandas, "pandas", ("pandas", "h5py", "tables"), workaround=COLUMNS),
        Row("PyTables", "tables.open_file(FILE).root.packets.read()", judge_pytables, "pytables", ("tables",)),
        control("3.5.1", "3.8"),
        control("3.6.0"),
        control("3.7.0"),
        Row(
            "larpix-control HEAD",
            FROM_FILE,
            judge_larpix_control,
            "larpix_control",
            ("larpix-control==3.7.0", "numba"),
            checkout=("larpix-control",),
            workaround=OLD,
        ),
        Row(
            "larpix-control HEAD, raw file",
            "convert_rawhdf5_to_hdf5.py -i FILE.raw.h5 -o OUT",
            judge_converted,
            "larpix_control_raw",
            ("larpix-control==3.7.0", "numba"),
            checkout=("larpix-control",),
        ),
        Row(
            "LarpixParser 0.0.8",
            "LarpixParser.hit_parser.hit_parser_charge(t0, packets, …)",
            judge_larpixparser,
            "larpixparser",
            ("LarpixParser==0.0.8", "h5py", "pyyaml", "scikit-learn", "setuptools<81"),
            workaround=PARSER,
        ),
        Row(
            "larpix-monitor HEAD",
            "monitor.plotter.Plotter(…)([(FILE, h5py.File(FILE))]); run_monitor.py --once FILE.raw.h5",
            judge_larpix_monitor,
            "larpix_monitor",
            ("larpix-control==3.7.0", "matplotlib", "tqdm", "plotly", "pyyaml", "pytz"),
            checkout=("larpix-monitor",),
            workaround=MONITOR,
        ),
        Row(
            "ndlar_flow HEAD, h5flow HEAD",
            "h5flow --nompi -c yamls/module0_flow/workflows/charge/charge_event_building.yaml -i FILE -o OUT",
            judge_ndlar_flow,
            "ndlar_flow",
            ("h5py", "pyyaml", "pyyaml-include<2", "tqdm", "scipy", "scikit-image", "scikit-learn"),
            checkout=("h5flow", "ndlar-flow"),
            workaround=FLOW,
        ),
    ]


CHECKOUTS = ("larpix-control", "larpix-monitor", "h5flow", "ndlar-flow")


def revision(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown revision"


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="only rows whose name begins with NAME")
    for name in CHECKOUTS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"checkout of {name}")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="keep the environments there, and use them")
    parser.add_argument("--update", action="store_true", help=f"write the table into docs/{DOCUMENT.name}")
    options = parser.parse_args()
    paths = {name: vars(options)[name.replace("-", "_")] for name in CHECKOUTS}
    paths = {name: path.resolve() for name, path in paths.items() if path}
    rows = [row for row in table_rows() if not options.only or row.name.startswith(tuple(options.only))]
    results = []
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as name:
        (Path(name) / "files").mkdir()
        case = make_case(Path(name) / "files")
        environments = (options.environments or Path(name)).resolve()
        for row in rows:
            results.append(tried(row, case, environments, paths))
            if not options.json:
                print(f"{row.name}: {results[-1]['outcome']}", *results[-1]["problems"], sep="\n    ", flush=True)
        case.writer.abandon()
    if options.json:
        print(json.dumps(results))
    if options.update:
        update(DOCUMENT, "compatibility", with_source(table(results), "python bench/compatibility.py"))
    return 1 if any(result["problems"] for result in results) else 0


def tried(row: Row, case: Case, environments: Path, paths: dict[str, Path]) -> Found:
    """Return name, version and outcome of a row, and in `problems` what differs."""
    found: Found = {}
    problems: list[str] = []
    try:
        found = reading(row, case, environments, paths)
        problems = row.judge(found, case)
        outcome = "differs" if problems else "all as written"
    except LookupError as error:
        outcome = f"not run: {error}"
    versions = [f"{program} {version}" for program, version in found.get("versions", {}).items() if not row.checkout]
    versions += [f"{checkout} {revision(paths[checkout])}" for checkout in row.checkout if checkout in paths]
    return {"name": row.name, "versions": versions, "outcome": outcome, "problems": problems, "found": found}


def table(results: list[Found]) -> str:
    rows = {row.name: row for row in table_rows()}
    lines = ["| program | here | result | call | workaround |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        row = rows[result["name"]]
        cells = [row.name, ", ".join(result["versions"]), result["outcome"], f"`{row.command}`", row.workaround]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
