"""check-raw: good files of larpix-control and of larpix-daq, and every kind of fault, with its number."""

import json
import os

import h5py
import numpy as np
import pytest
from decoder_harness import data_word, legacy, message_1_0, odd_parity, word_1_0
from file_builder import Feed, write
from larpix.format import rawhdf5format

from larpixdaq import cli
from larpixdaq.hdf5.raw_file import make_raw
from larpixdaq.sources.raw_check import check_raw


def word(n, receipt=0):
    return data_word(odd_parity(n << 2), channel=1 + n % 8, receipt=receipt)


GOOD = [legacy([word(k + 7 * n) for k in range(n % 5)], 1_700_000_000 + n // 10) for n in range(200)]


def raw(path, messages, groups=(1, 2)):
    given = [groups[n % len(groups)] for n in range(len(messages))]
    rawhdf5format.to_rawfile(
        str(path), msgs=messages, version="0.0", msg_headers={"io_groups": given}, io_version="0.0"
    )
    return path


def test_good_files(tmp_path):
    found = check_raw(raw(tmp_path / "raw.h5", GOOD))
    assert found.findings == []
    assert (found.messages, found.words) == (200, sum(n % 5 for n in range(200)))
    assert set(found.boards) == {1, 2}
    assert found.boards[1]["messages"] == 100
    assert (found.boards[1]["first_s"], found.boards[1]["last_s"]) == (1_700_000_000, 1_700_000_019)
    newer = [message_1_0([word_1_0(odd_parity(n << 2)) for n in range(3)], 10**18 + 10**9 * n) for n in range(20)]
    assert check_raw(raw(tmp_path / "newer.h5", newer)).findings == []
    report, _ = write(tmp_path, Feed(), [3000])
    own = make_raw(report.path)
    found = check_raw(own.path)
    assert (found.findings, found.messages, found.words) == ([], own.messages, own.words)


@pytest.mark.parametrize(
    ("messages", "finding"),
    [
        ([*GOOD, legacy([word(1)], 1_700_000_100, count=3)], "io_group 1: 1 messages have another number of words"),
        ([*GOOD, GOOD[3] + b"abc"], "io_group 1: 3 bytes behind the last word"),
        ([*GOOD, b"junk"], "io_group 1: 1 messages with 4 bytes are not those of a PACMAN"),
        ([*GOOD, legacy([b"Q" + bytes(15)])], "io_group 1: 1 words of unknown type"),
        ([*GOOD, GOOD[8][:-3]], "io_group 1: 13 bytes behind the last word"),
    ],
)
def test_faults_of_messages(tmp_path, messages, finding):
    found = check_raw(raw(tmp_path / "raw.h5", messages))
    assert any(finding in line for line in found.findings), found.findings


def test_wrong_parity_is_a_note(tmp_path):
    found = check_raw(raw(tmp_path / "raw.h5", [*GOOD, legacy([data_word(odd_parity(4) ^ 1 << 9)], 1_700_000_100)]))
    assert found.ok
    assert any("1 of" in note and "wrong parity" in note for note in found.notes)


def test_faults_of_the_structure(tmp_path):
    path = raw(tmp_path / "raw.h5", GOOD)
    with h5py.File(path, "r+") as file:
        file["msg_headers"].resize((190,))
        file["meta"].attrs["version"] = "7.1"
    lines = "\n".join(check_raw(path).findings)
    assert "200 messages in /msgs, but 190 io_groups in /msg_headers" in lines
    assert "/meta says version '7.1'" in lines
    with h5py.File(path, "r+") as file:
        del file["meta"], file["msg_headers"]
    found = check_raw(path)
    assert "attributes of /meta cannot be read" in found.findings[0]
    assert found.messages == 200
    with h5py.File(path, "r+") as file:
        file["msgs"].resize((1 << 45,))
    assert any("are not in the file" in line for line in check_raw(path).findings)
    os.truncate(path, path.stat().st_size // 2)
    assert not check_raw(path).ok


def test_the_command(tmp_path, capsys):
    good, bad = raw(tmp_path / "good.h5", GOOD), raw(tmp_path / "bad.h5", [b"junk"])
    (tmp_path / "empty.h5").write_bytes(b"")
    assert cli.main(["check-raw", str(good)]) == 0
    text = capsys.readouterr().out
    assert f"{good}: good, 200 messages with 400 words" in text
    assert "io_group 1: 2023-11-14 22:13:20 UTC to" in text
    assert cli.main(["check-raw", "--json", *map(str, (good, bad, tmp_path / "empty.h5", tmp_path))]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert [facts["ok"] for facts in files.values()] == [True, False, False, False]
    assert np.all([facts["findings"] for facts in list(files.values())[1:]])
