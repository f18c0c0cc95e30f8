"""The producer's options for sources: the sources that they make, and the errors."""

import argparse
import json
import math

import pytest

from larpixdaq.errors import ConfigError
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources import options
from larpixdaq.sources.options import BoardAddress


class Recorder:
    """Stands in for a source and keeps its arguments."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


@pytest.fixture
def recorded(monkeypatch):
    for module, name in [
        ("pacman", "PacmanSource"),
        ("bern", "BernSource"),
        ("serial", "SerialSource"),
        ("replay", "ReplaySource"),
        ("fake", "FakeSource"),
        ("io_class", "IoClassSource"),
    ]:
        monkeypatch.setattr(f"larpixdaq.sources.{module}.{name}", type(name, (Recorder,), {}))


def create(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_arguments(parser)
    made = options.create(parser.parse_args(words))
    return [(type(source).__name__, source.args, source.kwargs) for source in made]


V2 = {"asic": Asic.V2}
PACMAN = {**V2, "format": "auto", "clock64": False, "revision": 0, "uarts": 0}
REPLAY = {**V2, "format": "auto", "clock64": False, "speed": 1.0}
IO_CLASS = {**V2, "clock64": False, "revisions": {}}
SERIAL = {**V2, "baud": 1_000_000, "rule": "strict"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--pacman a", [("PacmanSource", (1, "a", 5556, 5555), PACMAN)]),
        (
            "--pacman a:6000 7=b.lab:6000:7000 [::1]:9",
            [
                ("PacmanSource", (1, "a", 6000, 5999), PACMAN),
                ("PacmanSource", (7, "b.lab", 6000, 7000), PACMAN),
                ("PacmanSource", (3, "[::1]", 9, 8), PACMAN),
            ],
        ),
        (
            "--pacman tcp://10.0.0.1 --asic 3 --pacman-format 1.0 --clock64",
            [
                (
                    "PacmanSource",
                    (1, "10.0.0.1", 5556, 5555),
                    {"asic": Asic.V3, "format": "1.0", "clock64": True, "revision": 0, "uarts": 0},
                )
            ],
        ),
        ("--bern a b", [("BernSource", (1, "a", 5556, 5555), V2), ("BernSource", (2, "b", 5556, 5555), V2)]),
        ("--serial /dev/ttyUSB0", [("SerialSource", ("/dev/ttyUSB0", 1), SERIAL)]),
        (
            "--serial /dev/x --baud 115200 --serial-rule larpix-control --asic 1",
            [("SerialSource", ("/dev/x", 1), {"asic": Asic.V1, "baud": 115_200, "rule": "larpix-control"})],
        ),
        ("--replay a.h5 3=b.bin", [("ReplaySource", ([(1, "a.h5"), (3, "b.bin")],), REPLAY)]),
        ("--replay a=b.h5 --speed 2.5", [("ReplaySource", ([(1, "a=b.h5")],), {**REPLAY, "speed": 2.5})]),
        ("--replay a --speed max", [("ReplaySource", ([(1, "a")],), {**REPLAY, "speed": math.inf})]),
        ("--fake", [("FakeSource", (1, 10_000.0), {**V2, "seed": 1})]),
        (
            "--fake 4e6 --io-groups 2 --asic 2b --fifo-diagnostics",
            [("FakeSource", (i, 2e6), {"asic": Asic.V2_DIAGNOSTICS, "seed": i}) for i in (1, 2)],
        ),
        ("--io-config PACMAN_IO", [("PacmanSource", (1, "pacman.local", 5556, 5555), PACMAN)]),
        ("--io-config ZMQ_IO", [("BernSource", (1, "localhost", 5556, 5555), V2)]),
        (
            "--io-config MultiZMQ_IO io/default.json",
            [("BernSource", (i, f"daq-srv{i}.local", 5556, 5555), V2) for i in range(1, 8)],
        ),
        ("--io-config SerialPort /dev/x", [("SerialSource", ("/dev/x", 1), SERIAL)]),
        (
            "--pacman a 7=b --pacman-revision 4 7=5",
            [
                ("PacmanSource", (1, "a", 5556, 5555), {**PACMAN, "revision": 4}),
                ("PacmanSource", (7, "b", 5556, 5555), {**PACMAN, "revision": 5}),
            ],
        ),
        ("--io-config FakeIO", [("IoClassSource", ("FakeIO", ()), IO_CLASS)]),
        (
            "--pacman a 7=b --pacman-uarts 7=32",
            [
                ("PacmanSource", (1, "a", 5556, 5555), PACMAN),
                ("PacmanSource", (7, "b", 5556, 5555), {**PACMAN, "uarts": 32}),
            ],
        ),
        (
            "--io-config FakeIO --pacman-revision 2=3",
            [("IoClassSource", ("FakeIO", ()), {**IO_CLASS, "revisions": {2: 3}})],
        ),
        (
            "--io-config lab.boards:Mine here.json 3 --asic 1",
            [("IoClassSource", ("lab.boards:Mine", ("here.json", "3")), {**IO_CLASS, "asic": Asic.V1})],
        ),
        ("--io-config SerialPort /dev/x 9600", [("SerialSource", ("/dev/x", 1), {**SERIAL, "baud": 9600})]),
    ],
)
def test_options_make_sources(recorded, words, expected):
    assert create(*words.split()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pacman a:0", "board address 'a:0': data port: expected 1 to 65535, found 0"),
        ("--pacman a:1", "data port 1 leaves no command port"),
        ("--pacman a:5:70000", "command port: expected 1 to 65535, found 70000"),
        ("--pacman a:5:5", "data port and command port are both 5"),
        ("--pacman a:", "board address 'a:': expected [IO_GROUP=]HOST"),
        ("--pacman =a", "board address '=a': expected"),
        ("--pacman x=a", "board address 'x=a': expected"),
        ("--pacman a:b:c", "board address 'a:b:c': expected"),
        ("--pacman 0=a", "io_group: expected 1 to 255, found 0"),
        ("--pacman 256=a", "io_group: expected 1 to 255, found 256"),
        ("--pacman 2=a b", "board address 'b': io_group 2 is that of a already"),
        ("--bern a b a", "board address 'a': io_group 1 has the same address"),
        ("--replay 0=a", "0=a: io_group: expected 1 to 255, found 0"),
        ("--fake --io-groups 256", "--io-groups 256: a producer has at most 255"),
        ("--bern a --baud 9600", "--baud is for --serial only, not for --bern"),
        ("--serial a --speed 2", "--speed is for --replay only, not for --serial"),
        ("--bern a --clock64", "--clock64 is for --pacman and --replay and --io-config only, not for --bern"),
        ("--bern a --pacman-revision 2", "--pacman-revision is for --pacman and --io-config only, not for --bern"),
        ("--pacman a --pacman-revision 6", "--pacman-revision 6: revision: expected 2 to 5, found 6"),
        ("--pacman a --pacman-revision rev4", "--pacman-revision rev4: revision: expected 2 to 5, found rev4"),
        ("--pacman a --pacman-revision 1=4 1=5", "--pacman-revision 1=5: io_group 1 twice"),
        ("--pacman a --pacman-revision 2=4", "--pacman-revision 2=4: no board has io_group 2"),
        ("--pacman a --pacman-uarts 2=32", "--pacman-uarts 2=32: no board has io_group 2"),
        ("--pacman a --pacman-uarts 40", "--pacman-uarts 40: UARTs: expected 32, found 40"),
        ("--bern a --pacman-uarts 32", "--pacman-uarts is for --pacman only, not for --bern"),
        ("--pacman a --io-groups 2", "--io-groups is for --fake only, not for --pacman"),
        ("--pacman a --asic 1 --fifo-diagnostics", "--fifo-diagnostics is for v2 chips only, not for --asic 1"),
        ("--io-config a:b.c", "--io-config a:b.c: expected a class of larpix.io or package.module:Class"),
        ("--io-config ./mine.py", "--io-config ./mine.py: expected a class"),
        ("--io-config FakeIO --baud 9600", "--baud is for --serial only, not for --io-config"),
        ("--io-config SerialPort", "name the device"),
        ("--io-config SerialPort /dev/x fast", "baud rate: expected 1 to 100000000, found fast"),
        ("--io-config PACMAN_IO a b", "too many arguments: a b"),
        ("--io-config PACMAN_IO absent.json", "io config absent.json: no such file here or in larpix-control"),
        ("--io-config PACMAN_IO io/loopback.json", "expected io_class PACMAN_IO, found 'ZMQ_IO'"),
        ("--io-config ZMQ_IO io/default.json", "ZMQ_IO has one address, found 7"),
    ],
)
def test_wrong_options_are_refused_in_one_line(recorded, words, message):
    with pytest.raises(ConfigError) as caught:
        create(*words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--fake --pacman a",
        "--pacman",
        "--serial",
        "--fake none",
        "--fake -1",
        "--fake nan",
        "--replay a --speed 0",
        "--replay a --speed fast",
        "--serial a --baud 0",
        "--serial a --serial-rule loose",
        "--fake --asic 4",
    ],
)
def test_wrong_usage_is_refused_by_the_parser(words):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words.split())
    assert caught.value.code == 2


def test_io_configurations_of_all_kinds(recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, **config):
        (tmp_path / name).write_text(json.dumps({"_config_type": "io"} | config))

    write("base.json", io_class="PACMAN_IO", io_group=[[1, "other"]])
    write("mine.json", _include=["base.json"], io_group=[[4, "a"], [2, "b:7000"]])
    assert [args for _, args, _ in create("--io-config", "PACMAN_IO", "mine.json")] == [
        (4, "a", 5556, 5555),
        (2, "b", 7000, 6999),
    ]
    write("revisions.json", _include=["mine.json"], pacman_revision={"4": 3, "2": 5})
    for words, expected in ((), [3, 5]), (("--pacman-revision", "2=4"), [3, 4]), (("--pacman-revision", "2"), [2, 2]):
        made = create("--io-config", "PACMAN_IO", "revisions.json", *words)
        assert [source["revision"] for _, _, source in made] == expected
    write("serial.json", io_class="SerialPort", io_group=[[5, "/dev/ttyAMA0"]])
    assert create("--io-config", "SerialPort", "serial.json")[0][1] == ("/dev/ttyAMA0", 5)
    wrong = {
        "round.json": ({"_include": ["round.json"]}, "more than 8 files include each other"),
        "list.json": ({"io_class": "PACMAN_IO", "io_group": {"1": "a"}}, "expected a list of [number, address]"),
        "entry.json": ({"io_class": "PACMAN_IO", "io_group": [[1, 2]]}, "expected [number, address], found [1, 2]"),
        "empty.json": ({"io_class": "PACMAN_IO", "io_group": []}, "expected a list of [number, address], found []"),
        "include.json": ({"_include": "base.json"}, "_include: expected a list of file names"),
        "group.json": ({"io_class": "PACMAN_IO", "io_group": [[300, "a"]]}, "io_group: expected 1 to 255, found 300"),
        "twice.json": ({"io_class": "PACMAN_IO", "io_group": [[1, "a"], [1, "b"]]}, "io_group 1 is that of a already"),
        **{
            f"revision{at}.json": (
                {"_include": ["mine.json"], "pacman_revision": found},
                "expected one of 2, 3, 4, 5, or",
            )
            for at, found in enumerate((6, [4], 4.0, True, {"x": 4}, {"9" * 5000: 4}, {"4": {}}))
        },
        "stranger.json": ({"_include": ["mine.json"], "pacman_revision": {"1": 4}}, "1=4: no board has io_group 1"),
        "kind.json": ({"_config_type": "chip"}, '"_config_type": "io" is missing'),
    }
    for name, (config, message) in wrong.items():
        write(name, **config)
        with pytest.raises(ConfigError) as caught:
            create("--io-config", "PACMAN_IO", name)
        assert message in str(caught.value)
    (tmp_path / "text.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="not JSON"):
        create("--io-config", "PACMAN_IO", "text.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        create("--io-config", "PACMAN_IO", "deep.json")


def test_the_help_can_be_shown_and_names_every_source():
    parser = argparse.ArgumentParser(prog="larpixdaq-producer")
    options.add_arguments(parser)
    text = parser.format_help()
    parser.format_usage()
    for word in ("--serial", "--pacman", "--bern", "--replay", "--fake", "--io-config", "io_groups", "default"):
        assert word in text


def test_addresses_of_boards():
    assert options.boards(["a", "9=b:1000"]) == [BoardAddress(1, "a", 5556, 5555), BoardAddress(9, "b", 1000, 999)]


def test_real_sources_have_one_layout():
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    for words in (
        ["--fake", "--io-groups", "2"],
        ["--replay", "a.bin"],
        ["--serial", "/dev/x"],
        ["--pacman", "a", "b"],
    ):
        made = options.create(parser.parse_args(words))
        assert {source.layout for source in made} == {layout_of(Asic.V2)}
        assert sorted(group for source in made for group in source.io_groups) == list(range(1, len(made) + 1))
