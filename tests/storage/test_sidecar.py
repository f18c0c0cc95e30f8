"""Second names of finished files, and the content of sidecars."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from file_builder import NS, Feed, write
from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import metadata, names
from larpixdaq.offline_storage import argument_parser, own_options
from larpixdaq.protocol.reports import Comment
from larpixdaq.storage import sidecar
from larpixdaq.storage.sidecar import NameTemplate, finish_raw, give_name

INFO = {"run": 42, "part": 7, "opened_ns": NS, "closed_ns": NS + 10**9}


def test_fields_of_a_template() -> None:
    assert (
        NameTemplate("packet-{tag}-{start}").name(INFO, "self trigger/1", "")
        == "packet-self-trigger-1-20261122T071251Z"
    )
    assert NameTemplate("{storage}{run}_{part}.h5").name(INFO, "", "copy 2") == "copy-20000042_007"
    assert NameTemplate("raw_{tag}_{run}").name(INFO, "", "") == "raw_unknown_0000042"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("packet", "expected {run} or {start}, since each file needs its own name"),
        ("packet-{tag}-{part}", "expected {run} or {start}"),
        ("../packet-{run}", "found '../packet-0000000'"),
        ("/data/{run}", "found '/data/0000000'"),
        ("a/{run}", "found 'a/0000000'"),
        (".{run}", "found '.0000000'"),
        ("-{run}", "found '-0000000'"),
        ("packet {run}", "found 'packet 0000000'"),
        ("packet*{run}", "found 'packet"),
        ("{run}\n", "found '0000000"),
        ("{run}é", "expected a name of at most 200 letters, digits"),
        ("{run}" + "x" * 200, "expected a name of at most 200"),
        ("{date}-{run}", "unknown field {date}; known are {run}, {part}, {start}, {tag}, {storage}"),
        ("{}-{run}", "unknown field {}"),
        ("{run.__class__}", "unknown field {run.__class__}"),
        ("{run[0]}", "unknown field {run[0]}"),
        ("{run!r}", "expected fields without a format"),
        ("{run:>30}", "expected fields without a format"),
        ("{run", "expected '}' before end of string"),
        ("run{run}_x", "would be taken for a file of a run"),
        ("", "expected {run} or {start}"),
    ],
)
def test_templates_that_are_refused(text: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the text is compared
        NameTemplate(text)
    assert why in str(refused.value)
    with pytest.raises(SystemExit):
        argument_parser().parse_args([f"--name-template={text}"])
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2 + text.count("\n")


@given(text=st.text(st.sampled_from("{}runpatgse_-./x!:0[]") | st.characters(), max_size=30), kind=st.text(max_size=64))
def test_names_stay_in_the_directory(text: str, kind: str) -> None:
    try:
        name = NameTemplate(text + "{run}").name(INFO, kind, kind)
    except ValueError:
        return
    assert os.path.basename(name) == name
    assert name.isascii()
    assert name.isprintable()
    assert not name.startswith((".", "-"))
    assert names.parse(name + ".h5") is None


def test_options_are_made_again() -> None:
    words = ["--raw", "--name-template=packet-{tag}-{start}", "--rotate=5min"]
    again = own_options(argument_parser().parse_args(words))
    assert set(words[:2]) < set(again)
    assert own_options(argument_parser().parse_args(again)) == again


def test_no_name_is_taken_from_another_file(tmp_path: Path) -> None:
    report, _ = write(tmp_path, Feed(), [10])
    path = Path(report.path)
    (tmp_path / "a.h5").write_text("precious")
    (tmp_path / "a-2.json").write_text("precious")
    (tmp_path / "a-3.h5").symlink_to(tmp_path / "nothing")
    assert give_name(path, "a", ".h5") == give_name(path, "a", ".h5") == "a-4.h5"
    assert (tmp_path / "a-4.h5").samefile(path)
    assert (tmp_path / "a.h5").read_text() == (tmp_path / "a-2.json").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = write(tmp_path, Feed(), [10])

    def refuse(*paths: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FileError, match=r"cannot name .* also a\.h5: Operation not permitted"):
        give_name(Path(report.path), "a", ".h5")


def content(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text())


def test_a_sidecar_has_the_entry_for_a_catalogue(tmp_path: Path) -> None:
    """Raw file and packet file are two tiers of one subrun; the second name is the entry's."""
    report, _ = write(tmp_path, Feed(), [10])
    path = Path(report.path)
    name = give_name(path, "packet-1", ".h5")
    sidecar.write(path, {"name": name, "metadata": metadata.entry(INFO, "test", "decoded-raw"), "comments": []})
    data = path.read_bytes()
    found = content(path)
    assert (found["file"], found["name"], found["bytes"], found["size"]) == (path.name, name, len(data), len(data))
    sums = {"sha256": hashlib.sha256(data).hexdigest(), "adler32": f"{zlib.adler32(data):08x}"}
    assert found["checksums"] == sums
    assert found["sha256"] == sums["sha256"]
    entry = found["metadata"]
    assert (entry["core.data_tier"], entry["core.data_stream"]) == ("decoded-raw", "test")
    assert (entry["core.runs"], entry["core.runs_subruns"]) == ([42], [420008])
    assert entry["core.end_time"] - entry["core.start_time"] == 1.0
    assert content(tmp_path / "packet-1.h5") == found
    raw = finish_raw(path)
    assert (tmp_path / "raw-1.raw.h5").samefile(raw.path)
    entry = content(raw.path)
    assert entry == content(tmp_path / "raw-1.raw.h5")
    assert (entry["name"], entry["messages"], entry["words"]) == ("raw-1.raw.h5", raw.messages, raw.words)
    assert entry["packet_file"] == path.name
    assert entry["metadata"]["core.data_tier"] == "raw"
    assert entry["checksums"]["adler32"] == f"{zlib.adler32(raw.path.read_bytes()):08x}"
    raw.path.with_suffix(".json").unlink()  # as if the process had been killed before
    assert finish_raw(path) == raw._replace(made=False)
    assert content(raw.path)["name"] == "raw-1.raw.h5"


def test_comments_come_into_the_sidecars_of_both_names(tmp_path: Path) -> None:
    report, _ = write(tmp_path, Feed(), [10])
    path = Path(report.path)
    second = tmp_path / give_name(path, "packet-1", ".h5")
    sidecar.write(path, {"name": second.name, "comments": []})
    sidecar.add_comments(path, [Comment(1, NS, "me", "Ada", "one")])
    assert [content(one)["comments"][0]["text"] for one in (path, second)] == ["one", "one"]
    sidecar.add_damage(path, ["rows 1 to 2"])
    assert content(second)["damaged"] == ["rows 1 to 2"]
    # The second file was moved away, and another file has its name now: nothing of it is changed.
    second.unlink()
    second.with_suffix(".json").unlink()
    second.write_text("another")
    second.with_suffix(".json").write_text("another")
    sidecar.add_comments(path, [Comment(2, NS, "me", "Ada", "two")])
    assert len(content(path)["comments"]) == 2
    assert second.with_suffix(".json").read_text() == "another"
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("name", ["../outside.h5", "/outside.h5", 7, None, ["x"], "absent.h5", "inside.h5"])
def test_a_sidecar_names_no_other_file(name: Any, tmp_path: Path) -> None:
    """The name in a sidecar is only a name: what others wrote into it reaches no file that is not this one."""
    folder = tmp_path / "data"
    folder.mkdir()
    report, _ = write(folder, Feed(), [10])
    path = Path(report.path)
    for other in (tmp_path / "outside.json", folder / "inside.json", folder / "inside.h5"):
        other.write_text("precious")
    path.with_suffix(".json").write_text(json.dumps({"file": path.name, "name": name, "comments": []}))
    sidecar.add_comments(path, [Comment(1, NS, "me", "Ada", "one")])
    assert len(content(path)["comments"]) == 1
    assert {other.read_text() for other in (tmp_path / "outside.json", folder / "inside.json")} == {"precious"}
    assert len(list(folder.iterdir())) == 4


def test_subruns_of_very_many_parts_are_left_out() -> None:
    """Because they would be those of the next run."""
    assert metadata.attributes(42, 9_998, "x") == {"run": 42, "subrun": 429_999, "data_stream": "x"}
    assert metadata.attributes(42, 9_999, "") == {"run": 42}
    assert "core.runs_subruns" not in metadata.entry({**INFO, "part": 9_999}, "x", "raw")
