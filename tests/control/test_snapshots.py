"""Snapshots of the chips' configurations as files: what is written is read again, and every bad file is named."""

import json

import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq.control import snapshots
from larpixdaq.errors import ConfigError, FileError, LarpixDaqError, RequestError

byte = st.integers(0, 255)
keys = st.tuples(byte, st.integers(1, 255), byte).map(lambda parts: "-".join(map(str, parts)))
registers = st.dictionaries(
    st.sampled_from(["threshold_global", "channel_mask", "csa_enable", "clk_ctrl"]),
    byte | st.lists(st.integers(0, 1), max_size=64),
)


@given(
    asic=st.sampled_from(["1", "2", "2b", "2d", "lightpix-1", "3"]), chips=st.dictionaries(keys, registers, min_size=1)
)
@settings(max_examples=examples(40), deadline=None)
def test_what_is_written_is_read_again(tmp_path_factory, asic, chips):
    folder = tmp_path_factory.mktemp("written")
    snapshot = snapshots.make(asic, chips)
    assert snapshots.unpack(snapshots.pack(snapshot)) == snapshot
    assert snapshots.write(folder / "one.json", snapshot) == 1
    assert snapshots.read(folder / "one.json") == snapshot
    assert snapshots.write(folder / "each", snapshot, "of a test") == len(chips)
    found = snapshots.read(folder / "each")
    assert found.asic == asic
    assert {key: chip.wanted for key, chip in found.chips.items()} == chips
    assert {chip.file for chip in found.chips.values()} == {f"config_{key}.json" for key in chips}
    for path in ("one.json", "each"):
        with pytest.raises(FileError, match="exists"):
            snapshots.write(folder / path, snapshot)
    assert sorted(path.name for path in folder.iterdir()) == ["each", "one.json"]


def test_files_have_the_form_of_the_laboratories(tmp_path):
    snapshots.write(tmp_path / "cfg", snapshots.make("2", {"1-11-90": {"threshold_global": 40}}), "night")
    content = json.loads((tmp_path / "cfg/config_1-11-90.json").read_text())
    assert content.pop("meta").items() >= {
        ("CHIP_KEY", "1-11-90"), ("ASIC_ID", "1-3-90"), ("ASIC_VERSION", 2), ("description", "night"),
    }  # fmt: skip
    assert content == {"threshold_global": 40}


META = {"CHIP_KEY": "1-3-21", "ASIC_ID": "1-1-21", "ASIC_VERSION": "2b"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"threshold_global": 40, "meta": META}, ("2b", {"threshold_global": 40})),
        ({"threshold_global": 40, **META, "description": "older"}, ("2b", {"threshold_global": 40})),
        ({"channel_mask": [True, 0], "meta": {**META, "ASIC_VERSION": 2}}, ("2", {"channel_mask": [True, 0]})),
        ({"meta": {**META, "ASIC_VERSION": "lightpix-v1.0"}}, ("lightpix-1", {})),
        ({"chip_id": 21}, ("", {"chip_id": 21})),
    ],
)
def test_files_of_laboratories_are_read(tmp_path, content, expected):
    (tmp_path / "config_1-3-21.json").write_text(json.dumps(content))
    (tmp_path / "README.txt").write_text("not a configuration")
    found = snapshots.read(tmp_path)
    assert (found.asic, found.chips["1-3-21"].wanted) == expected


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no config_\\*.json in it"),
        ({"config_1-3-21.json": '{"a": '}, "config_1-3-21.json: damaged JSON: Expecting value: line 1 column 7"),
        ({"config_1-3-21.json": "[]"}, "config_1-3-21.json: expected a JSON object, found list"),
        ({"config_1-3-21.json": '{"a": 1, "a": 2}'}, "config_1-3-21.json: damaged JSON: 'a' is there twice"),
        ({"config_1-3-21.json": "\xff"}, "config_1-3-21.json: damaged JSON: Expecting value"),
        ({"config_1-3-21.json": '{"meta": 3}'}, "config_1-3-21.json: meta: expected an object, found 3"),
        ({"config_1-3-21.json": "[" * 100_000}, "config_1-3-21.json: damaged JSON"),
        ({"config_today.json": "{}"}, "config_today.json: no chip: expected CHIP_KEY in meta"),
        ({"config_x.json": {"CHIP_KEY": "1-300-2"}}, "config_x.json: chip '1-300-2': expected a chip key"),
        (
            {"config_1-3-22.json": {"meta": META}},
            "config_1-3-22.json: its CHIP_KEY is 1-3-21, and its name says 1-3-22",
        ),
        (
            {"config_1-3-21.json": {"meta": {**META, "ASIC_ID": "1-3-21"}}},
            "config_1-3-21.json: chip 1-3-21: ASIC_ID: expected 1-1-21, found '1-3-21'",
        ),
        (
            {"config_1-3-21.json": {"threshold_global": "40"}},
            "config_1-3-21.json: chip 1-3-21: register threshold_global: expected a number or a list of .*, found '40'",
        ),
        ({"config_1-3-21.json": {"a": [1, None]}}, "chip 1-3-21: register a: expected .* found \\[1, None\\]"),
        ({"config_1-3-21.json": {"a": 1.5}}, "chip 1-3-21: register a: expected .* found 1.5"),
        (
            {"config_1-3-21.json": {"meta": META}, "config_again.json": {"meta": META}},
            "config_again.json: chip 1-3-21 is also in config_1-3-21.json",
        ),
        (
            {"config_1-3-21.json": {"meta": META}, "config_1-3-22.json": {"ASIC_VERSION": 2}},
            "config_1-3-22.json: chip 1-3-22: ASIC_VERSION 2, but config_1-3-21.json has ASIC_VERSION 2b",
        ),
        (
            {f"config_1-1-{chip}.json": "{" for chip in range(11, 16)},
            "config_1-1-11.json: .*; config_1-1-12.json: .*; config_1-1-13.json: .*; and 2 more like these",
        ),
    ],
)
def test_each_bad_file_is_named(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    with pytest.raises(ConfigError, match=says) as raised:
        snapshots.read(tmp_path)
    assert "\n" not in str(raised.value)


@settings(max_examples=examples(200), deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | byte | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["chips", "wanted", "meta", "CHIP_KEY", "larpixdaq_snapshot", "1-1-2", "a"]),
                inner,
                max_size=3,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_content_of_a_file_raises_another_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    for file in ("config_1-1-2.json", "one.json"):
        (folder / file).write_bytes(content)
    for read in (
        lambda: snapshots.read(folder),
        lambda: snapshots.read(folder / "one.json"),
        lambda: snapshots.unpack(content),
        lambda: snapshots.read_disabled(folder / "one.json"),
    ):
        said = ""
        try:
            read()
        except LarpixDaqError as error:
            said = str(error)
        assert "\n" not in said


def test_a_snapshot_that_does_not_fit_into_a_request_is_refused():
    import random

    made = random.Random(1)
    chips = {
        f"{a}-{b}-{c}": {"pixel_trim_dac": [made.randrange(32) for _ in range(64)]}
        for a in range(1, 9)
        for b in range(1, 41)
        for c in range(1, 101)
    }
    with pytest.raises(RequestError, match=r"32000 chips: has [0-9]+ bytes, a request has at most"):
        snapshots.pack(snapshots.make("2b", chips))
    chips = dict(list(chips.items())[:6_400])
    assert snapshots.unpack(snapshots.pack(snapshots.make("2b", chips))).chips.keys() == chips.keys()


def test_lists_of_disabled_channels(tmp_path):
    channels = {"1-1-21": [6, 7], "1-2-3": []}
    snapshots.write_disabled(tmp_path / "list.json", channels)
    assert snapshots.read_disabled(tmp_path / "list.json") == channels
    with pytest.raises(FileError, match=r"list.json: File exists"):
        snapshots.write_disabled(tmp_path / "list.json", channels)
    (tmp_path / "meta.json").write_text(json.dumps({"1-1-21": [6], "meta": {"by": "me"}}))
    assert snapshots.read_disabled(str(tmp_path / "meta.json")) == {"1-1-21": [6]}
    for content in ('{"1-1-21": 6}', '{"1-1-21": ["6"]}', '{"1-1-21": [true]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=r"bad.json: chip 1-1-21: expected a list of channels, found"):
            snapshots.read_disabled(tmp_path / "bad.json")
    with pytest.raises(FileError, match=r"absent.json"):
        snapshots.read_disabled(tmp_path / "absent.json")
