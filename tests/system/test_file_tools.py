"""The tools for files: cat, and bad input for each of them: one clear line, exit status 1, and nothing left behind."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
from datetime import datetime, timezone

import h5py
import numpy as np
import pytest
from disk import Disk
from file_builder import NS, V1, V2, V3, Feed, random_rows, run_info, timed, write
from larpix_control import hdf5format, packets_v2
from processes import LIMIT

from larpixdaq import cli, open_run
from larpixdaq.hdf5.new_file import KEEP_FREE
from larpixdaq.hdf5.raw_file import make_raw
from larpixdaq.hdf5.writer import RunFile

NAME = "run0000042_20261122T071251Z_000.h5"
#: Each tool with arguments; {} is the bad file, {good} a good one, {out} a directory for its output.
TOOLS = {
    "cat": ("cat", "{}"),
    "info": ("info", "{}"),
    "verify": ("verify", "{}"),
    "diff": ("diff", "{good}", "{}"),
    "split": ("split", "--rows", "100", "-o", "{out}", "{}"),
    "split by board": ("split", "--by-io-group", "-o", "{out}", "{}"),
    "merge": ("merge", "-o", "{out}", "{}"),
    "export": ("export", "--format", "csv", "-o", "{out}", "{}"),
    "check-raw": ("check-raw", "{}"),
    "recover": ("recover", "-o", "{out}", "{}"),
}


def run(tool, path, good, out, capsys):
    """Run a tool in this process. Returns its exit status, and what it printed."""
    status = cli.main([part.format(str(path), good=good, out=out) for part in TOOLS[tool]])
    found = capsys.readouterr()
    return status, found.out + found.err


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good"), Feed(), [1000, 300])[0].path


def empty(path, good):
    path.write_bytes(b"")


def other_format(path, good):
    path.write_bytes(b"PAR1" + bytes(range(256)) * 20)


def other_hdf5(path, good):
    with h5py.File(path, "w") as file:
        file["image"] = np.ones((3, 4))


def no_version(path, good):
    with h5py.File(path, "w") as file:
        file["packets"] = np.zeros(5, V2.dtype)


def future(path, good):
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs.update({"version": "9.1", "created": 0.0, "modified": 0.0})
        file["packets"] = np.zeros(5, [("kind", "u1"), ("chip", "u8")])


def group_for_table(path, good):
    path.write_bytes(good.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["packets"]
        file.create_group("packets")


def absurd(path, good):
    path.write_bytes(good.read_bytes())
    with h5py.File(path, "r+") as file:
        file["packets"].resize((1 << 45,))


def absurd_messages(path, good):
    with h5py.File(path, "w") as file:
        file.create_group("meta").attrs["version"] = "0.0"
        file.create_dataset("msgs", shape=(1 << 45,), maxshape=(None,), dtype=h5py.vlen_dtype("u1"), chunks=(1024,))
        file.create_dataset("msg_headers", shape=(1 << 45,), maxshape=(None,), dtype=[("io_groups", "u1")])


def link_out(path, good):
    path.symlink_to(good)


def link_inside(path, good):
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs.update({"version": "2.4", "created": 0.0, "modified": 0.0})
        file["packets"] = h5py.ExternalLink(str(good), "/packets")


def pipe(path, good):
    os.mkfifo(path)


def cut(path, good):
    path.write_bytes(good.read_bytes()[:9000])


def folder(path, good):
    path.mkdir()


BAD = (
    empty, other_format, other_hdf5, no_version, future, group_for_table, absurd, absurd_messages, link_out,
    link_inside, pipe, cut, folder,
)  # fmt: skip
#: Tools that can make something of a bad file, or find nothing wrong in it.
MAY_SUCCEED = {
    ("cat", future), ("verify", future), ("export", future), ("split", future), ("merge", future), ("info", future),
    ("recover", future), ("recover", no_version), ("recover", absurd), ("recover", folder), ("recover", cut),
    ("check-raw", absurd_messages), ("cat", absurd_messages),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_files(tmp_path, good, capsys, tool, make):
    path, out = tmp_path / NAME, tmp_path / "out"
    out.mkdir()
    make(path, good)
    status, text = run(tool, path, good, out, capsys)
    lines = [line for line in text.splitlines() if line.strip()]
    assert all(line.isprintable() for line in lines)
    assert "Traceback" not in text
    if (tool, make) in MAY_SUCCEED and status == 0:
        return
    assert status == 1, (status, text)
    assert any(NAME in line or "out" in line for line in lines), text
    if tool != "recover":
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_names(tmp_path, good, capsys, tool):
    """Files that do not exist, names that look like options, empty names, names with control characters."""
    for name in ("-absent.h5", "--help.h5", "absent\x1b[31m\n.h5", "a" * 300, f"{'a' * 300}.h5.part"):
        status, text = run(tool, f"./{name}", good, tmp_path, capsys)
        assert status == 1, text
        assert all(line.isprintable() for line in text.splitlines())
    with pytest.raises(SystemExit) as error:
        run(tool, "", good, tmp_path, capsys)
    assert error.value.code == 2
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "-o"
    path.write_bytes(good.read_bytes())
    arguments = [part.format("./-o", good=good, out=tmp_path) for part in TOOLS[tool]]
    result = subprocess.run(
        [sys.executable, "-m", "larpixdaq", *arguments],
        cwd=tmp_path / "in",
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == (1 if tool == "check-raw" else 0), result


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path, good, capsys):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    for tool in ("split", "split by board", "merge", "export"):
        status, text = run(tool, good, good, out, capsys)
        assert status == 1
        assert "Permission denied" in text


@pytest.mark.parametrize("tool", ["split", "split by board", "merge", "export"])
def test_output_directories(tmp_path, good, capsys, tool):
    (tmp_path / "file").write_bytes(b"x")
    for out in (tmp_path / "absent", tmp_path / "file"):
        status, text = run(tool, good, good, out, capsys)
        assert status == 1
        assert "no such directory" in text or "there is no directory" in text, text
    status, text = run(tool, good, good, good.parent, capsys)
    names = {path.name for path in good.parent.iterdir()}
    if tool in ("split", "merge"):
        assert status == 1
        assert "exists" in text
        assert names == {good.name}
    for path in good.parent.iterdir():
        if path != good:
            path.unlink() if path.is_file() else [each.unlink() for each in path.iterdir()] + [path.rmdir()]


def test_a_full_disk(tmp_path, good):
    """A disk that has little room left is not filled by a tool, and one that fails leaves nothing half-written."""
    out = tmp_path / "out"
    out.mkdir()
    disk = Disk(tmp_path, out)
    for tool in ("split", "merge", "export"):
        for room, text in (
            (KEEP_FREE - 1, "255 MiB left"),
            (KEEP_FREE + 5000, "255 MiB left"),
            (None, "No space left"),
        ):
            disk.heal()
            if room is None:
                disk.fail(errno.ENOSPC)
            else:
                disk.full(room)
            arguments = [part.format(str(good), good=good, out=out) for part in TOOLS[tool]]
            result = subprocess.run(
                [sys.executable, "-m", "larpixdaq", *arguments],
                env={**os.environ, **disk.env},
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
            disk.heal()
            if result.returncode == 0:
                assert room == KEEP_FREE + 5000
                for path in sorted(out.rglob("*"), reverse=True):
                    path.unlink() if path.is_file() else path.rmdir()
                continue
            assert result.returncode == 1, result
            assert text in result.stdout + result.stderr, (tool, room, result)
            assert list(out.iterdir()) == [], (tool, room)


# cat


@pytest.mark.parametrize("layout", [V1, V2, V3], ids=lambda layout: layout.name)
def test_cat_shows_every_row(tmp_path, capsys, layout):
    report, rows = write(tmp_path, Feed(layout=layout), [400, 300])
    assert cli.main(["cat", str(report.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{report.path}: {len(rows)} rows"
    assert len(lines) == len(rows) + 2
    assert lines[2].endswith("number 0: Beginning run")
    assert [int(line.split()[0]) for line in lines[2:]] == list(range(len(rows)))
    assert cli.main(["cat", "--json", str(report.path)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(rows)
    for place, row in enumerate(found):
        for name in rows.dtype.names:
            expected = rows[name][place]
            if name != "counter":
                assert row[name] == (expected.decode() if isinstance(expected, bytes) else expected)
    assert (found[0]["message"], found[-1]["message"]) == ("Beginning run", "Ending run")


def test_cat_of_some_rows(tmp_path, capsys):
    report, rows = write(tmp_path, Feed(), [400, 300])
    for arguments, expected in (
        (["--types", "sync,trigger"], np.isin(rows["packet_type"], (6, 7))),
        (["--types", "config-write", "--io-groups", "2"], (rows["packet_type"] == 2) & (rows["io_group"] == 2)),
        (["--channels", "0-5,9"], (rows["packet_type"] < 4) & np.isin(rows["channel_id"], (0, 1, 2, 3, 4, 5, 9))),
        (["--rows=-10:"], np.arange(len(rows)) >= len(rows) - 10),
        (["--rows", "5:8"], (np.arange(len(rows)) >= 5) & (np.arange(len(rows)) < 8)),
    ):
        assert cli.main(["cat", "--json", *arguments, str(report.path)]) == 0
        found = [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()]
        assert found == np.flatnonzero(expected).tolist(), arguments


def test_rows_of_some_time(tmp_path, capsys):
    """Whole blocks, as open_run selects them, by cat, cat --follow and export."""
    file, feed, rng = RunFile(tmp_path, run_info()), Feed(), np.random.default_rng(1)
    for second in range(6):
        file.add(*timed(*feed.block(random_rows(rng, 300)), second, second + 0.5))
    file.end(feed.end())
    path = file.close().path
    with open_run(path) as run:
        wanted = run.read("row", begin=NS / 1e9 + 2, end=NS / 1e9 + 4).tolist()
        later = run.read("row", begin=NS / 1e9 + 4).tolist()
    assert (len(wanted), len(later)) == (600, 600)
    since, until = (datetime.fromtimestamp(NS / 1e9 + after, timezone.utc).isoformat()[:19] for after in (2, 4))
    times = ["--since", since, "--until", until]
    assert cli.main(["cat", "--json", *times, str(path)]) == 0
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == wanted
    assert cli.main(["cat", "--json", "--follow", "--since", until, str(path)]) == 0
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == later
    assert cli.main(["export", "--format", "npy", *times, str(path)]) == 0
    assert "600 rows" in capsys.readouterr().out
    assert cli.main(["cat", "--since", until, "--until", since, str(path)]) == 2
    assert "--until is before --since" in capsys.readouterr().err
    hdf5format.to_file(str(tmp_path / "x.h5"), packets_v2(np.zeros(3, np.uint64)), version="2.4", workers=1)
    assert cli.main(["cat", "--since", since, str(tmp_path / "x.h5")]) == 1
    assert "cannot be selected by their time" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["1.0", "2.0", "2.1", "2.2", "2.3", "2.4"])
def test_cat_of_larpix_control_files(tmp_path, capsys, version):
    from larpix import Packet_v1

    words = np.random.default_rng(3).integers(0, 1 << 62, 50, dtype=np.uint64) & ~np.uint64(3)
    packets = packets_v2(words)
    if version == "1.0":
        packets = [Packet_v1() for _ in range(50)]
    hdf5format.to_file(str(tmp_path / "x.h5"), packets, version=version, workers=1)
    assert cli.main(["cat", str(tmp_path / "x.h5")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 52
    assert " in " in lines[10]


def test_a_part_that_is_being_written(tmp_path, capsys):
    """cat and export take what is there; split and merge want finished files."""
    file, feed = RunFile(tmp_path, run_info()), Feed()
    for _ in range(13):
        file.add(*feed.block(random_rows(np.random.default_rng(1), 16_384)))
    try:
        assert cli.main(["cat", "--rows", ":3", str(file.path)]) == 0
        out = capsys.readouterr().out
        assert int(out.split(": ")[1].split()[0]) >= 4 * 16_384
        assert cli.main(["export", "--format", "npy", str(file.path)]) == 0
        capsys.readouterr()
        (tmp_path / "out").mkdir()
        for tool in ("split", "merge"):
            status, text = run(tool, file.path, file.path, tmp_path / "out", capsys)
            assert status == 1
            assert "is not finished" in text
        status, text = run("recover", file.path, file.path, tmp_path / "out", capsys)
        assert status == 1
        assert "another process writes or recovers this part" in text
    finally:
        file.abandon()


def test_progress_of_split_and_merge(tmp_path, good, capsys, monkeypatch):
    monkeypatch.setattr("larpixdaq.cli.progress._ELSEWHERE", 0.0)
    foreign, packets = tmp_path / "x.h5", packets_v2(np.zeros(3, np.uint64))
    for packet in packets:
        packet.io_group = 1
    hdf5format.to_file(str(foreign), packets, version="2.4", workers=1)
    for tool in ("split", "split by board", "merge"):
        for path in (good, foreign):
            out = tmp_path / f"{tool} {path.name}"
            out.mkdir()
            assert cli.main([part.format(str(path), good=good, out=out) for part in TOOLS[tool]]) == 0
            line = capsys.readouterr().err.splitlines()[-1]
            assert re.fullmatch(rf"{path.name}: 100 % of 0\.0 M rows copied, .* M rows/s, then verified", line)


def test_several_files(tmp_path, capsys):
    for n in range(3):
        write(tmp_path, Feed(run=40 + n), [200])
    paths = sorted(map(str, tmp_path.glob("*.h5")))
    (tmp_path / "out").mkdir()
    assert cli.main(["info", "--json", *paths]) == 0
    assert [facts["run"] for facts in json.loads(capsys.readouterr().out)["files"]] == [40, 41, 42]
    assert cli.main(["info", *paths, str(tmp_path / "absent.h5")]) == 1
    assert capsys.readouterr().out.count("layout") == 3
    assert cli.main(["split", "--rows", "100", "-o", str(tmp_path / "out"), "--json", *paths]) == 0
    made = json.loads(capsys.readouterr().out)["files"]
    assert sum(part["rows"] for facts in made.values() for part in facts["made"]) == 3 * 202
    raws = [str(make_raw(path).path) for path in map(type(tmp_path), paths)]
    assert cli.main(["check-raw", *raws]) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
