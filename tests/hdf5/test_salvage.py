"""Files of other writers that died, were cut, or are damaged: all that can be read comes into a new file."""

import json
import os
import random
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from decoder_harness import data_word, legacy
from example_counts import examples
from file_builder import Feed, random_rows, write
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix.format import rawhdf5format
from larpix_control import hdf5format, packets_v2
from processes import LIMIT

from larpixdaq import cli
from larpixdaq.errors import FileError
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recordings import open_recording
from larpixdaq.hdf5.salvage import salvage
from larpixdaq.hdf5.verify import verify
from larpixdaq.schema import PACKETS_2_4


def board_messages(count, seed=1):
    rng = random.Random(seed)
    return [
        legacy([data_word(rng.randrange(1 << 40)) for _ in range(rng.choice((0, 1, 3, 40)))], 1_700_000_000 + n)
        for n in range(count)
    ]


def raw_file(path, messages, groups=(1, 2)):
    """Write a raw file by larpix-control, as while messages arrive."""
    given = [groups[n % len(groups)] for n in range(len(messages))]
    for at in range(0, len(messages), 300):
        piece = {"msgs": messages[at : at + 300], "msg_headers": {"io_groups": given[at : at + 300]}}
        rawhdf5format.to_rawfile(str(path), version="0.0", io_version="0.0", **piece)
    return list(zip(given, messages, strict=True))


def read_raw(path):
    recording = open_recording(path)
    found = []
    for data, spans, groups in recording.pieces(1):
        for (start, length), group in zip(spans.tolist(), groups.tolist(), strict=True):
            found.append((group, data[start : start + length].tobytes()))
    recording.close()
    return found


def packet_file(path, rows, chunk=1000, compressed=True):
    """Write a packet file in the style of larpix-control 2.4, with the oldest and the newest superblock in turn."""
    options = {"chunks": (chunk,), "compression": "gzip" if compressed else None, "shuffle": compressed}
    with h5py.File(path, "w", libver="earliest" if compressed else "latest") as file:
        file.create_group("_header").attrs.update({"version": "2.4", "created": 1.0, "modified": 2.0})
        file.create_dataset("packets", data=rows, maxshape=(None,), **options)
        messages = np.zeros(3, [("message", "S64"), ("timestamp", "u8"), ("index", "u4")])
        file.create_dataset("messages", data=messages)


def is_subsequence(found, whole):
    rest = iter(whole)
    return all(any(each == other for other in rest) for each in found)


def test_a_whole_file_needs_no_recovery(tmp_path):
    raw_file(tmp_path / "raw.h5", board_messages(50))
    rows = random_rows(np.random.default_rng(1), 5000)
    packet_file(tmp_path / "packets.h5", rows)
    for name, count, unit in (("raw.h5", 50, "messages"), ("packets.h5", 5000, "rows")):
        report = salvage(tmp_path / name)
        assert (report.new, report.rows, report.unit, report.left_out) == (None, count, unit, [])
    assert sorted(os.listdir(tmp_path)) == ["packets.h5", "raw.h5"]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("fraction", [0.35, 0.8, 0.999])
def test_a_packet_file_that_was_cut(tmp_path, compressed, fraction):
    """It keeps its superblock of the full size, so that HDF5 opens it no more."""
    rows = random_rows(np.random.default_rng(2), 20_000)
    path = tmp_path / "packets.h5"
    packet_file(path, rows, compressed=compressed)
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(OSError, match="truncated"):
        h5py.File(path).close()
    before = path.read_bytes()
    try:
        report = salvage(path)
    except FileError as error:
        assert "\n" not in str(error)  # noqa: PT017  the index of the chunks was cut off
        assert fraction < 0.9
        assert os.listdir(tmp_path) == ["packets.h5"]
        return
    assert path.read_bytes() == before
    with h5py.File(report.new) as file:
        found = file["packets"][:]
        assert "was cut" in file["_header"].attrs["made_from"]
        assert file["_header"].attrs["version"] == "2.4"
    assert report.rows == len(found) > fraction * 10_000
    assert is_subsequence([row.tobytes() for row in found[::50]], [row.tobytes() for row in rows])
    assert report.left_out
    checked = verify(report.new)
    assert checked.ok, checked.findings
    assert any("packets.h5" in note for note in checked.notes)


KILLED = """
import os, sys, h5py, numpy as np
rows = np.load(sys.argv[2])
with h5py.File(sys.argv[1], "w", libver="latest") as file:
    file.create_group("_header").attrs.update({"version": "2.4", "created": 1.0, "modified": 2.0})
    how = {"maxshape": (None,), "chunks": (500,), "compression": "gzip"}
    packets = file.create_dataset("packets", shape=(0,), dtype=rows.dtype, **how)
    file.swmr_mode = True
    for start in range(0, len(rows), 700):
        piece = rows[start : start + 700]
        packets.resize((start + len(piece),))
        packets[start:] = piece
        packets.flush()
    print("written", flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_writer_that_was_killed(tmp_path):
    rows = random_rows(np.random.default_rng(3), 7000)
    np.save(tmp_path / "rows.npy", rows)
    path = tmp_path / "killed.h5"
    result = subprocess.run(
        [sys.executable, "-c", KILLED, path, tmp_path / "rows.npy"], capture_output=True, timeout=LIMIT, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert cli.main(["recover", str(path)]) == 0
    with h5py.File(tmp_path / "killed.recovered.h5") as file:
        assert np.array_equal(file["packets"][:], rows)
        assert "not closed" in file["_header"].attrs["made_from"]
    assert cli.main(["recover", str(path)]) == 1  # nothing is overwritten


def test_a_raw_file_that_was_cut(tmp_path):
    path = tmp_path / "raw.h5"
    sent = raw_file(path, board_messages(6000))
    size = path.stat().st_size
    whole = path.read_bytes()
    kept = []
    for fraction in (0.2, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(size * fraction)])
        try:
            report = salvage(path)
        except FileError as error:
            assert "\n" not in str(error)  # noqa: PT017
            continue
        found = read_raw(report.new)
        assert len(found) == report.rows
        assert is_subsequence(found, sent)
        assert report.left_out
        kept.append(len(found))
        report.new.unlink()
    assert kept == sorted(kept)
    assert kept[-1] > 3000


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_any_damage(tmp_path_factory, data):
    """Bytes are changed, zeroed or cut anywhere: one line, or a new file that can be read, and no endless loop."""
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "raw.h5"
    sent = raw_file(path, board_messages(300, seed=4))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.sampled_from([1, 8, 500, 4096]))
        how = data.draw(st.sampled_from(["flip", "zero", "cut"]))
        if how == "cut":
            del content[place:]
        else:
            piece = content[place : place + size]
            content[place : place + size] = bytes(len(piece)) if how == "zero" else bytes(b ^ 0x55 for b in piece)
        if not content:
            break
    path.write_bytes(content)
    before = set(os.listdir(folder))
    try:
        report = salvage(path)
    except FileError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert set(os.listdir(folder)) == before
        return
    if report.new is not None:
        found = read_raw(report.new)
        assert len(found) == report.rows
        # a changed byte within a message cannot be seen, because raw files have no checksum
        lengths = sorted(len(message) for _, message in sent)
        assert len(found) <= len(lengths)


def test_damaged_chunks_cost_only_themselves(tmp_path):
    rows = random_rows(np.random.default_rng(5), 16_000)
    path = tmp_path / "packets.h5"
    packet_file(path, rows)
    with h5py.File(path) as file:
        infos = [file["packets"].id.get_chunk_info(n) for n in (3, 9)]
    content = bytearray(path.read_bytes())
    for info in infos:
        content[info.byte_offset + 100] ^= 0xFF
    path.write_bytes(content)
    report = salvage(path)
    firsts = [int(info.chunk_offset[0]) for info in infos]
    kept = np.ones(len(rows), bool)
    for first in firsts:
        kept[first : first + 1000] = False
    with h5py.File(report.new) as file:
        assert np.array_equal(file["packets"][:], rows[kept])
        assert [line.split(" are")[0] for line in file["_header"].attrs["left_out"]] == [
            f"rows {first} to {first + 1000}" for first in sorted(firsts)
        ]


def test_zeros_at_the_end_are_no_rows(tmp_path):
    rows = random_rows(np.random.default_rng(5), 3000)
    padded = np.concatenate([rows, np.zeros(5000, PACKETS_2_4)])
    path = tmp_path / "packets.h5"
    packet_file(path, padded, compressed=False)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    report = salvage(path)
    with h5py.File(report.new) as file:
        assert np.array_equal(file["packets"][:], rows)
    assert any("have only zeros" in line for line in report.left_out)


def test_a_finished_file_of_ours_that_was_cut(tmp_path, capsys):
    report, rows = write(tmp_path, Feed(), [16_384] * 3)
    os.truncate(report.path, report.path.stat().st_size - 5000)
    assert not verify(report.path).ok
    status = cli.main(["recover", "--json", str(report.path)])
    outcome = json.loads(capsys.readouterr().out)["parts"][str(report.path)]
    if outcome["file"] is None:
        assert status == 1
        return
    with DataFile(outcome["file"]) as file:
        assert not file.own
        found = np.concatenate([*file.pieces()])
    assert is_subsequence([row.tobytes() for row in found[::100]], [row.tobytes() for row in rows])


def test_a_file_that_is_being_written(tmp_path):
    path = tmp_path / "packets.h5"
    packet_file(path, random_rows(np.random.default_rng(1), 100))
    with h5py.File(path, "r+"), pytest.raises(FileError, match="is locked: another program is writing it"):
        salvage(path)


def test_larpix_control_reads_a_recovered_packet_file(tmp_path):
    words = np.random.default_rng(3).integers(0, 1 << 62, 3000, dtype=np.uint64) & ~np.uint64(3)
    path = tmp_path / "packets.h5"
    hdf5format.to_file(str(path), packets_v2(words), version="2.4", workers=1)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    report = salvage(path)
    assert report.new is not None
    found = hdf5format.from_file(str(report.new))["packets"]
    assert found[: len(found)] == packets_v2(words)[: len(found)]
    assert len(found) > 0
