"""docs/protocols.md is enough for a client in another language: wire_client.py, which shares no code with larpixdaq."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from processes import LIMIT, until, wait_for_line
from system import System, rows_of

from larpixdaq import constants, schema
from larpixdaq.control.client import Request
from larpixdaq.keys import credentials
from larpixdaq.protocol import control, reports, stream

CLIENT = Path(__file__).parents[1] / "support" / "wire_client.py"
PAGE = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text()


@pytest.fixture
def client(line: System):
    """Start the client as a storage beside the real one."""
    operator = line.start("--fake", "20000", "--io-groups", "2")
    file = credentials.connection_file(line.core)
    started = subprocess.Popen(
        [sys.executable, str(CLIENT), str(file), "Wire"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    try:
        assert json.loads(wait_for_line(started)) == {"registered": "Wire"}
        yield operator, started
    finally:
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=LIMIT)
        assert (started.returncode, errors) == (0, b"")


def done(request: Request):
    return request.result(timeout=LIMIT)


def test_a_storage_written_from_the_page_alone_takes_part_in_runs(line, client):
    operator, started = client
    for _ in range(2):
        run = done(operator.prepare_run(comment="wire"))["run"]
        done(operator.begin_run())
        until(lambda: line.status_of(operator, "producer").get("packets", 0) > 20_000, "packets of the run")
        ended = done(operator.end_run())
        report = json.loads(wait_for_line(started))
        assert (ended["condition"], ended["reasons"]) == ("COMPLETE", [])
        assert (report["run"], report["rows"]) == (run, ended["stored"])
        by_group = Counter(rows_of(ended["files"][0])["io_group"].tolist())
        assert {io_group: rows for _, _, io_group, rows in report["stored"]} == by_group


def fields(heading: str) -> list[str]:
    """Return the names in the first column of the table below a heading of the page."""
    _, found, rest = PAGE.partition(f"\n{heading}\n")
    assert found, f"protocols.md: no section {heading}"
    table = re.search(r"^\| .*?\n\n", rest, re.M | re.S)
    assert table is not None
    return re.findall(r"^\| `(\w+)`", table[0], re.M)


@pytest.mark.parametrize(
    ("heading", "struct"),
    [
        *((f"### {kind.__name__.upper()} ({kind.__struct_config__.tag})", kind) for kind in (
            stream.Hello, stream.Ack, stream.Credit, stream.Maps, stream.Welcome, stream.Block, stream.End,
            stream.Refused,
        )),
        ("### totals", stream.Totals),
        ("### gaps", stream.Gap),
        ("### unknown", stream.UnknownWord),
        ("### verdicts", stream.LossVerdict),
        *((f"### {kind.__struct_config__.tag}", kind) for kind in (
            control.Register, control.Open, control.Heartbeat, control.ActionRequest, control.Answer, control.Update,
        )),
        ("### prepare_run", reports.StorageReady),
        ("### end_run", reports.StorageEnd),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_the_page_has_every_field_in_its_order(heading, struct):
    common = set(control.Message.__struct_fields__) if issubclass(struct, control.Message) else set()
    assert fields(heading) == [name for name in struct.__struct_fields__ if name not in common]


def test_the_page_has_the_numbers_of_the_code():
    assert fields("### counts") == [count.name.lower() for count in constants.Count]
    for layout in schema.LAYOUTS:
        assert f"| {layout.code} | {layout.name} | {layout.dtype.itemsize} |" in PAGE
    for name, value in {
        "stream version": stream.STREAM_VERSION,
        "control version": control.PROTOCOL,
        "window": f"{16} MiB",
        "rows of a block": f"{constants.BLOCK_ROWS:,}",
        "request": f"{control.MAX_REQUEST >> 20} MiB",
        "registration or heartbeat": f"{control.MAX_KEPT >> 10} KiB",
        "answer": f"{control.MAX_ANSWER >> 20} MiB",
    }.items():
        assert f"| {name} | {value} |" in PAGE, name
