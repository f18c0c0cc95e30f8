"""`larpixdaq convert`: recordings of all kinds become files that verify, with all words, or nothing is left."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess

import h5py
import numpy as np
import pytest
from decoder_harness import message_1_0, word_1_0
from example_counts import examples
from file_builder import Feed, write
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix.format import rawhdf5format
from larpix_control import hdf5format, packets_v2, pacman_msg_format, rows_2_4
from processes import until
from recorded_data import shared_data

from larpixdaq import schema
from larpixdaq._native import decoders, word_codec
from larpixdaq._native.global_heap import HeapReader
from larpixdaq.constants import RunCondition
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.hdf5 import layout, verify
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recordings import REFERENCE, RawFile, open_recording
from larpixdaq.runtime.launcher import command
from larpixdaq.storage.conversion import Options, convert, target_of
from larpixdaq.storage.convert import Job, convert_all


def message(seconds, words):
    body = b"".join(
        b"\x44\x01" + (1000 + i).to_bytes(4, "little") + bytes(2) + int(word).to_bytes(8, "little")
        for i, word in enumerate(words)
    )
    return b"D" + seconds.to_bytes(4, "little") + b"\0" + len(words).to_bytes(2, "little") + body


def data_words(count, seed=1):
    random = np.random.default_rng(seed)
    words = random.integers(0, 2**62, count, np.uint64) & ~np.uint64(0b11 | 0xF << 58)
    return word_codec.parity(words, asic=schema.Asic.V2)


def messages(count, each=10, seed=1):
    words = data_words(count * each, seed)
    return [message(1_700_000_000 + i, words[i * each : (i + 1) * each]) for i in range(count)]


def raw_file(path, given, groups=1):
    groups = [groups] * len(given) if isinstance(groups, int) else groups
    rawhdf5format.to_rawfile(str(path), msgs=given, msg_headers={"io_groups": groups})
    return path


def log(path, given):
    path.write_bytes(b"".join(len(each).to_bytes(4, "little") + each for each in given))
    return path


def logged(data):
    spans, _ = decoders.split_log(data)
    return [data[start : start + length] for start, length in spans.tolist()]


def made(path, **options):
    """Convert a recording, check the new file as `larpixdaq verify` does, and return its rows."""
    report = convert(path, None, Options(**options))
    assert report.ok, report.text
    assert report.file == str(target_of(path))
    outcome = verify.verify_all([target_of(path)])
    assert outcome.ok, outcome.files
    assert sorted(file.name for file in path.parent.iterdir() if file.name.startswith(path.stem)) == sorted(
        {path.name, target_of(path).name}
    )
    with DataFile(report.file, own=True) as file:
        rows = file.packets()
    assert report.rows == len(rows)
    return rows


def texts_of(path):
    with DataFile(target_of(path)) as file:
        return {name: values[-1] for name, values in file.texts().items()}


def larpixdaq(*arguments, **options):
    return subprocess.run(command("cli", *map(str, arguments)), capture_output=True, text=True, timeout=100, **options)


# What comes in comes out


def test_recorded_messages_have_the_rows_of_larpix_control(tmp_path):
    """From a log and from a raw file, as from_rawfile, parse() and to_file() of larpix-control convert them."""
    data = shared_data("pacman_2020_messages.bin").read_bytes()
    log_path, raw_path = tmp_path / "log.bin", tmp_path / "raw.h5"
    log_path.write_bytes(data)
    raw_file(raw_path, logged(data), 3)
    read = rawhdf5format.from_rawfile(str(raw_path))
    packets = [
        packet
        for each, group in zip(read["msgs"], read["msg_headers"]["io_groups"], strict=True)
        for packet in pacman_msg_format.parse(bytes(each), io_group=int(group))
    ]
    theirs = rows_2_4(tmp_path / "theirs.h5", packets)
    for rows in (made(log_path, io_group=3), made(raw_path, verify=True)):
        assert (rows["direction"] == (rows["packet_type"] != 4)).all()  # larpix-control leaves it 0
        theirs["direction"] = rows["direction"]
        assert (rows == theirs).all()
    assert "1200 messages" in texts_of(raw_path)["counted"]


def test_provenance(tmp_path):
    path = raw_file(tmp_path / "cosmics.h5", messages(20))
    made(path)
    texts = texts_of(path)
    status = path.stat()
    assert texts[layout.CONVERTED] == str(path)
    assert texts["source sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (texts["source bytes"], texts["source modified ns"]) == (str(status.st_size), str(status.st_mtime_ns))
    assert texts["source format"] == "raw file (rawhdf5format 0.0)"
    assert texts["converter"].startswith("larpix-daq ")
    assert texts["counted"] == "200 words of 20 messages, 200 in the new file, 220 rows"
    with DataFile(target_of(path)) as file:
        assert [(board.io_group, board.kind, board.address) for board in file.connected()] == [
            (1, "recording", str(path))
        ]
        assert file.run_info()["condition"] == RunCondition.COMPLETE
        blocks = file.table("run/blocks")
        assert blocks["first_ns"][0] == 1_700_000_000 * 10**9
        assert blocks["last_ns"][-1] == 1_700_000_019 * 10**9
    shown = larpixdaq("info", target_of(path)).stdout
    assert f"converted from   {path}\n" in shown


def test_words_that_cannot_be_decoded_are_counted_and_kept(tmp_path):
    given = messages(50)
    given[3] = message(5, data_words(1))[:8] + b"X" * 16
    given[7] = given[7][:-3]
    given[9] = b"?" + given[9][1:]
    path = raw_file(tmp_path / "odd.h5", given)
    report = convert(path, None, Options())
    assert report.ok
    assert report.condition == RunCondition.SUSPECT
    assert "1 words could not be decoded; 1 messages could not be decoded" in report.text
    assert verify.verify(target_of(path)).ok
    with DataFile(target_of(path)) as file:
        assert file.table("ledger/unknown")["raw"][0][:16].tobytes() == b"X" * 16


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2", "2.3", "2.4"])
def test_packet_files_of_larpix_control(tmp_path, version):
    packets = packets_v2(data_words(500))
    for i, packet in enumerate(packets):
        packet.io_group, packet.io_channel, packet.receipt_timestamp = 1 + i % 3, 1 + i % 30, i
        packet.direction = 1
    path = tmp_path / "packets.h5"
    hdf5format.to_file(str(path), packets, version=version, workers=1)
    rows = made(path)
    assert word_codec.encode(rows, asic=schema.Asic.V2).tobytes() == b"".join(packet.bytes() for packet in packets)
    with h5py.File(path) as file:
        theirs = file["packets"][:]
    for name in theirs.dtype.names:
        if version >= "2.3" or not name.startswith("register"):
            assert (rows[name] == theirs[name]).all(), name
    assert texts_of(path)["source format"] == f"LArPix+HDF5 {version}"


def test_forks_and_other_chips_by_their_columns(tmp_path):
    wide = np.zeros(300, schema.PACKETS_2_4_CLOCK64)
    word_codec.decode(data_words(300), wide, asic=schema.Asic.V2, io_group=2, io_channel=3, receipt=2**40, direction=1)
    v3 = np.zeros(300, schema.PACKETS_3_0)
    v3_words = word_codec.parity(data_words(300) & ~np.uint64(3) | np.uint64(1), asic=schema.Asic.V3)
    word_codec.decode(v3_words, v3, asic=schema.Asic.V3, io_group=2, io_channel=3, receipt=5, direction=1)
    v1 = np.zeros(300, schema.PACKETS_1_0)
    v1_words = word_codec.parity(data_words(300) & np.uint64(2**53 - 1), asic=schema.Asic.V1)
    word_codec.decode(v1_words, v1, asic=schema.Asic.V1, io_group=2, io_channel=3, direction=1)
    floats = v3.astype([(name, "<f8" if name == "dataword" else v3.dtype[name]) for name in v3.dtype.names])
    for name, rows, stored, version in (
        ("wide.h5", wide, wide, "2.3"),
        ("v3.h5", v3, v3, "3.0"),
        ("v1.hdf5", v1, v1, "1.0"),
        ("f.h5", v3, floats, "3.0"),
    ):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            file.create_group("_header").attrs["version"] = version
            file.create_dataset("packets", data=stored, chunks=(100,))
        assert (made(path) == rows).all()


def test_info_messages_and_configurations_are_kept(tmp_path):
    rows = np.zeros(6, schema.PACKETS_2_4)
    word_codec.decode(data_words(6), rows, asic=schema.Asic.V2, io_group=1, io_channel=1, receipt=5, direction=1)
    rows[[0, 3]] = np.zeros(2, rows.dtype)
    rows["packet_type"][[0, 3]], rows["timestamp"][[0, 3]] = 5, 77
    path = tmp_path / "packets.h5"
    configs = np.zeros(2, layout.configs_dtype("2"))
    configs["timestamp"], configs["chip_id"] = 1_700_000_000, (11, 12)
    configs["registers"] = np.arange(239) % 200
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs["version"] = "2.4"
        file["packets"] = rows
        file["messages"] = np.array([(b"begin", 77, 0), (b"end", 77, 1)], layout.MESSAGES)
        file["configs"] = configs
        file["configs"].attrs["asic_version"] = "2"
    found = made(path)
    assert found["packet_type"].tolist() == rows["packet_type"].tolist()
    with DataFile(target_of(path)) as file:
        assert file.table("messages")["message"].tolist() == [b"begin", b"end"]
        assert (file.table("configs") == configs).all()
        assert file.table("run/configs")["chip_id"].tolist() == [11, 12]


def test_options_that_messages_do_not_tell(tmp_path):
    v3_words = word_codec.parity(data_words(500) & ~np.uint64(3) | np.uint64(1), asic=schema.Asic.V3)
    path = log(tmp_path / "v3.bin", [message(5, v3_words)])
    shown = larpixdaq("convert", path)
    assert shown.returncode == 1
    assert "give --asic 3" in shown.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["v3.bin"]
    assert larpixdaq("convert", path, "--asic", "3").returncode == 0
    with DataFile(target_of(path)) as file:
        assert file.layout is schema.LAYOUTS[3]
        assert (word_codec.encode(file.packets()[1:], asic=schema.Asic.V3) == v3_words).all()


def test_v1_chips_are_noticed(tmp_path):
    words = word_codec.parity(data_words(200) & np.uint64(2**53 - 1), asic=schema.Asic.V1)
    path = log(tmp_path / "v1.bin", [message(5, words)])
    with pytest.raises(ConfigError, match="give --asic 1"):
        convert(path, None, Options())
    rows = made(path, asic="1")
    assert (word_codec.encode(rows[1:], asic=schema.Asic.V1) == words).all()


def test_messages_of_format_1_0_get_the_layout_with_their_clock(tmp_path):
    path = log(
        tmp_path / "new.bin",
        [message_1_0([word_1_0(word, 3, 2**40 + i)]) for i, word in enumerate(data_words(10).tolist())],
    )
    rows = made(path)
    assert rows.dtype == schema.PACKETS_2_4_CLOCK64
    assert rows["receipt_timestamp"].max() == 2**40 + 9


# Several files, interruptions, existing files


def test_many_recordings_at_once_and_the_others_in_spite_of_bad_ones(tmp_path):
    good = [raw_file(tmp_path / f"good{i}.h5", messages(30, seed=i), i + 1) for i in range(4)]
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "text.h5").write_text("no recording at all")
    cut = tmp_path / "cut.bin"
    cut.write_bytes(log(tmp_path / "whole.bin", messages(10)).read_bytes()[:-5])
    (tmp_path / "link.h5").symlink_to("/dev/zero")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = [1]
    write(tmp_path, Feed(), [100])
    names = ["empty.h5", "text.h5", "link.h5", "other.h5", "cut.bin", "nowhere.h5"]
    out = tmp_path / "out"
    out.mkdir()
    shown = larpixdaq("convert", "-j", 3, "--json", "-o", out, tmp_path, *(tmp_path / name for name in names))
    assert shown.returncode == 1
    assert shown.stderr == ""
    files = json.loads(shown.stdout)["files"]
    assert {path for path, facts in files.items() if facts["ok"]} >= {str(path) for path in good}
    for name in names:
        facts = files[str(tmp_path / name)]
        assert not facts["ok"]
        assert name in facts["text"]
        assert "\n" not in facts["text"]
    assert sorted(path.name for path in out.iterdir()) == [f"good{i}.converted.h5" for i in range(4)]
    assert verify.verify_all(out.iterdir()).ok


def test_what_exists_is_kept(tmp_path):
    path = raw_file(tmp_path / "a.h5", messages(30))
    first = convert(path, None, Options())
    before = target_of(path).read_bytes()
    again = convert(path, None, Options())
    assert again.ok
    assert not again.made
    assert again.words == first.words == 300
    for name in ("rows", "messages", "bytes", "condition", "file"):
        assert getattr(again, name) == getattr(first, name)
    os.utime(path, (1, 1))  # copied, with the same content
    assert convert(path, None, Options()).ok
    raw_file(path, messages(1))  # appends
    with pytest.raises(FileError, match=r"exists, and was made from .* it is not overwritten"):
        convert(path, None, Options())
    other = raw_file(tmp_path / "b.h5", messages(3))
    target_of(other).write_bytes(b"mine")
    assert not next(convert_all([Job(str(other), None)], Options(), 1, lambda *_: None)).ok
    assert target_of(other).read_bytes() == b"mine"
    assert target_of(path).read_bytes() == before


def test_a_killed_conversion_leaves_no_file_under_its_name_and_begins_again(tmp_path):
    path = log(tmp_path / "long.bin", messages(200, 1000) * 20)
    stem = tmp_path / "long.bin.converted"
    with subprocess.Popen(command("cli", "convert", str(path)), stdout=subprocess.DEVNULL) as process:
        part = stem.with_name(stem.name + ".h5.part")
        until(lambda: part.exists() and part.stat().st_size > 1_000_000, "a part of the new file")
        process.send_signal(signal.SIGKILL)
    assert part.exists()
    assert not target_of(path).exists()
    made(path)
    target_of(path).unlink()
    with subprocess.Popen(command("cli", "convert", str(path)), stderr=subprocess.PIPE) as process:
        until(lambda: part.exists() and part.stat().st_size > 1_000_000, "a part of the new file")
        process.send_signal(signal.SIGSTOP)
        second = larpixdaq("convert", path)  # at the same time
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 130
    assert second.returncode == 1
    assert "is locked" in second.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["long.bin"]


def test_a_process_of_the_pool_that_dies_costs_its_file_only(tmp_path):
    paths = [log(tmp_path / f"{i}.bin", messages(100, 1000, seed=i) * 30) for i in range(2)]
    paths += [raw_file(tmp_path / f"{i}.h5", messages(3)) for i in range(3)]
    jobs = [Job(str(path), None) for path in paths]
    killed = []

    def kill(job, progress):
        if job.source == str(paths[0]) and not killed:
            children = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", "convert.py"], capture_output=True, text=True
            ).stdout.split()
            killed.append(children[0])
            os.kill(int(children[0]), signal.SIGKILL)

    reports = {report.source: report for report in convert_all(jobs, Options(), 2, kill)}
    assert killed
    bad = [report for report in reports.values() if not report.ok]
    assert ["was ended by signal SIGKILL" in report.text for report in bad] == [True]
    assert sorted(reports) == sorted(map(str, paths))
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.journal"))
    assert len(list(tmp_path.glob("*.converted.h5"))) == 4


# Bad input


def test_damaged_recordings_are_converted_only_on_request(tmp_path):
    whole = log(tmp_path / "whole.bin", messages(100))
    path = tmp_path / "cut.bin"
    path.write_bytes(whole.read_bytes()[:-20])
    shown = larpixdaq("convert", path)
    assert shown.returncode == 1
    assert shown.stdout == (
        f"{path}: ends inside a message, at byte {path.stat().st_size}: not converted (--damaged converts what can be"
        " read)\n"
    )
    shown = larpixdaq("convert", "--damaged", path)
    assert shown.returncode == 1
    report = verify.verify(target_of(path))
    assert report.condition == RunCondition.INCOMPLETE
    assert any("ends inside a message" in line for line in report.findings)
    assert report.rows == 100 + 1000 - 2
    assert not convert(path, None, Options(damaged=True)).ok


def test_rows_that_no_word_can_look_like(tmp_path):
    rows = np.zeros(50, schema.PACKETS_2_4)
    word_codec.decode(data_words(50), rows, asic=schema.Asic.V2, io_group=1, io_channel=1, receipt=5, direction=1)
    rows["packet_type"][20] = 9
    path = tmp_path / "packets.h5"
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs["version"] = "2.4"
        file["packets"] = rows
    with pytest.raises(FileError, match="1 rows left out: no packet can look like them: not converted"):
        convert(path, None, Options())
    report = convert(path, None, Options(damaged=True))
    assert not report.ok
    assert report.rows == 49
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name or "journal" in file.name] == []


def test_files_of_the_future_and_columns_without_a_place(tmp_path):
    rows = np.zeros(50, [*schema.PACKETS_2_4.descr, ("humidity", "<f4")])
    for name, version in (("future.h5", "4.0"), ("fork.h5", "2.4")):
        with h5py.File(tmp_path / name, "w") as file:
            file.create_group("_header").attrs["version"] = version
            file["packets"] = rows
    with h5py.File(raw_file(tmp_path / "newer.h5", messages(3)), "r+") as file:
        file["meta"].attrs["version"] = "0.1"
    with pytest.raises(FileError, match=r"LArPix\+HDF5 4.0, the newest that is known is 3.0"):
        convert(tmp_path / "future.h5", None, Options())
    with pytest.raises(FileError, match=r"raw file \(rawhdf5format 0.1\), the newest that is known is 0.0"):
        convert(tmp_path / "newer.h5", None, Options())
    report = convert(tmp_path / "fork.h5", None, Options())
    assert report.ok
    assert "no place for the columns humidity, which are left out" in report.text
    assert "humidity" in texts_of(tmp_path / "fork.h5")["notes"]


def test_a_recording_that_is_being_written(tmp_path):
    path = log(tmp_path / "growing.bin", messages(100))
    with path.open("ab") as file, pytest.raises(FileError, match="was written to while it was converted"):
        convert(path, None, Options(), lambda _: (file.write(b"\0"), file.flush()))
    assert [file.name for file in tmp_path.iterdir()] == ["growing.bin"]


def test_a_disk_that_fails_and_places_that_cannot_be_written(tmp_path):
    path = log(tmp_path / "long.bin", messages(100, 1000) * 10)
    limit = 2_000_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    shown = larpixdaq("convert", path, preexec_fn=limited)
    assert (shown.returncode, shown.stderr) == (1, "")
    assert "cannot be written any more: File too large" in shown.stdout
    assert shown.stdout.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["long.bin"]
    for place in ("/proc", tmp_path / "nowhere", path):
        shown = larpixdaq("convert", "-o", place, path)
        assert shown.returncode == 1
        assert (shown.stdout + shown.stderr).count("\n") == 1


def test_names_that_look_like_options(tmp_path):
    raw_file(tmp_path / "--asic.h5", messages(3))
    shown = larpixdaq("convert", "--", "--asic.h5", cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert shown.returncode == 0
    assert (tmp_path / "--asic.converted.h5").exists()
    assert larpixdaq("convert", "").returncode == 2


# Direct reading of raw files


def in_pieces(path):
    """Return all messages of a raw file as pieces() reads them."""
    file = open_recording(path)
    if not isinstance(file, RawFile):
        raise FileError("is no raw file any more")
    with contextlib.closing(file):
        return [
            data[start : start + length].tobytes()
            for data, spans, _ in file.pieces(1)
            for start, length in spans.tolist()
        ]


@settings(max_examples=examples(15))
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 8, 24, 24, 24, 40, 4056, 4064, 4065, 16_008, 100_000]), max_size=60),
    chunk=st.sampled_from([1, 7, 1024]),
    filters=st.sampled_from(
        [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}]
    ),
    userblock=st.sampled_from([0, 512]),
)
def test_messages_are_read_directly_as_by_hdf5(tmp_path_factory, lengths, chunk, filters, userblock):
    random = np.random.default_rng(sum(lengths))
    given_messages = [random.bytes(length) for length in lengths]
    path = tmp_path_factory.mktemp("raw") / "raw.h5"
    with h5py.File(path, "w", userblock_size=userblock) as file:
        stored = file.create_dataset(
            "msgs", (len(lengths),), h5py.vlen_dtype(np.uint8), maxshape=(None,), chunks=(chunk,), **filters
        )
        for i, each in enumerate(given_messages):
            stored[i] = np.frombuffer(each, np.uint8)
    assert in_pieces(path) == given_messages


@settings(max_examples=examples(60))
@given(data=st.data())
def test_damaged_heaps_never_give_other_messages_than_hdf5(tmp_path_factory, data):
    given_messages = messages(40, 3)
    path = raw_file(tmp_path_factory.mktemp("raw") / "raw.h5", given_messages)
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(heap, heap + 200) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(FileError):
        found = in_pieces(path)
        with h5py.File(path, "r") as file:
            assert found == [bytes(each) for each in file["msgs"][:]]


def test_references_out_of_the_file(tmp_path):
    path = tmp_path / "heap"
    path.write_bytes(bytes(100))
    file = os.open(path, os.O_RDONLY)
    try:
        for base in (0, 2**63, 2**64 - 1):
            reader = HeapReader(file, base)
            for address in (0, 84, 100, 2**62, 2**63, 2**64 - 8):
                reference = np.array([(5, address, 1)], REFERENCE)
                assert reader.read(reference, np.zeros(5, np.uint8)) == 0
            assert reader.read(np.array([(0, 2**64 - 1, 7)], REFERENCE), np.zeros(0, np.uint8)) == 1
    finally:
        os.close(file)
