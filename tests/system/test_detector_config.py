"""The configuration file of a detector: what it means, and one line with file, line and key for each error in it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.cli import main
from larpixdaq.cli.detector import PROGRAMS, explain
from larpixdaq.config_schema import Board, explanations, json_schema
from larpixdaq.detector_config import DetectorConfig, find_lines
from larpixdaq.errors import ConfigError, LarpixDaqError
from larpixdaq.hardware.power_settings import read_settings
from larpixdaq.schema import ASICS
from larpixdaq.sources.command_channel import REVISIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DETECTOR = """\
[detector]
name = "2x2"
output-dir = "data"

[hosts.daq1]
address = "10.0.0.1"
[hosts.daq2]
address = "10.0.0.2"
state-dir = "state of daq2"

[storages.first]
rotate = [
    "100Mrows",  # or after two hours
    "2h",
]
on-close = "gzip -k"

[boards]
module0 = {address = "pacman1.lab", io-group = 1, revision = 4}
module1 = {address = "pacman2.lab:6000", io-group = 2, asic = "2b"}

[producers.north]
host = "daq2"
boards = ["module0", "module1"]
ring = "64MiB"
clock-limit = 0.5
no-record-sent = true

[producers."made up"]
fake = 1e5

[routines]
directories = ["routines"]

[emulators.trial]
io-groups = 2
chips = 4
data-port = [7000]
"""


BERN = """
[boards]
module1 = {address = "bern.lab", io-group = 2, kind = "bern", vdda-dac = 1}
[producers.south]
boards = ["module1"]
"""


def load(folder: Path, text: str | bytes) -> DetectorConfig:
    path = folder / "detector.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return DetectorConfig(path, PROGRAMS)


def parsed(file: DetectorConfig) -> list[dict[str, Any]]:
    """Return the options of all processes as they get them."""
    return [vars(file.parsed(component)) for component in file.components]


def test_processes_of_two_hosts(tmp_path: Path) -> None:
    file = load(tmp_path, DETECTOR)
    core, log, storage, monitor, trial, made_up = file.wanted("daq1")
    (north,) = file.wanted("daq2")
    assert core.arguments == ["--log-address=tcp://10.0.0.1:5678", "--address=tcp://10.0.0.1"]
    assert log.arguments == ["--core=tcp://10.0.0.1:5551", "--name=Log", "--address=tcp://10.0.0.1"]
    assert storage.arguments == [
        "--core=tcp://10.0.0.1:5551", "--name=first", "--output-dir=data", "--rotate=100Mrows", "--rotate=2h",
        "--on-close=gzip -k",
    ]  # fmt: skip
    assert (monitor.name, monitor.arguments[1:]) == ("Online monitor", ["--name=Online monitor"])
    assert (trial.module, trial.name) == ("emulators", "trial")
    assert trial.arguments == ["pacman", "--io-groups=2", "--data-port", "7000", "--chips=4"]
    assert made_up.arguments[2:] == ["--fake=100000", "--routines=routines"]
    assert north.arguments == [
        "--core=tcp://10.0.0.1:5551", "--name=north", f"--state-dir={tmp_path}/state of daq2",
        "--pacman", "1=pacman1.lab", "2=pacman2.lab:6000", "--asic=2b", "--pacman-revision", "1=4", "--ring=64MiB",
        "--routines=routines", "--clock-limit=0.5", "--no-record-sent",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="asic: expected 2 as for other boards"):
        load(tmp_path, DETECTOR.replace("revision = 4", 'revision = 4, asic = "2"'))


def test_modules_of_hosts_and_components(tmp_path: Path) -> None:
    """A component has the module of its table, or else that of its host; processes that are no components have none."""
    named = DETECTOR.replace('state-dir = "state of daq2"', 'state-dir = "state of daq2"\nmodule = "module 3"')
    file = load(
        tmp_path, named.replace('ring = "64MiB"', 'ring = "64MiB"\nmodule = "north"') + "[monitors]\nm.host='daq2'"
    )
    assert "--module=north" in file.wanted("daq2")[1].arguments
    assert "--module=module 3" in file.wanted("daq2")[0].arguments
    assert not any("module=" in text for process in file.wanted("daq1") for text in process.arguments)
    assert (file.module("daq2"), file.module("daq1"), file.module("")) == ("module 3", "", "")
    lines = list(file.effective())
    assert f'module = "module 3"  # {tmp_path}/detector.toml:10' in lines[lines.index("[monitors.m]") :]
    assert f'module = "north"  # {tmp_path}/detector.toml:27' in lines[lines.index("[producers.north]") :]
    assert 'module = ""  # default' in lines[lines.index("[log]") : lines.index("[storages.first]")]
    with pytest.raises(ConfigError, match=r":24: producers.north.module: expected a name of 1 to 64 printable"):
        load(tmp_path, DETECTOR.replace('host = "daq2"', 'host = "daq2"\nmodule = "\\t"'))


def test_one_host_without_a_name(tmp_path: Path) -> None:
    file = load(tmp_path, "[producers.a]\nfake = true\n[monitors]\n[core]\naddress = 'tcp://*:7000'\n")
    assert [process.module for process in file.wanted("")] == ["core", "log", "offline_storage", "producer"]
    assert file.core_address("") == "tcp://127.0.0.1:7000"
    assert file.wanted("")[-1].arguments == ["--core=tcp://127.0.0.1:7000", "--name=a", "--fake"]


def test_settings_of_boards_for_power_up(tmp_path: Path) -> None:
    first = "revision = 4, tiles = [0, 2], vdda-dac = 46000, vddd-dac = [31000, 0, 31500], inverted = true"
    second = '6000", io-group = 2, limits = {vdda_ma = 600, vdda_mv = [1700, 1900.5]}'
    file = load(tmp_path, DETECTOR.replace("revision = 4", first).replace('6000", io-group = 2', second))
    north = next(options for options in parsed(file) if options.get("name") == "north")
    found = read_settings(north["power_settings"])
    assert (found[1].tiles, found[1].inverted) == ([0, 2], True)
    assert found[1].dacs == {"vdda": [46000] * 10, "vddd": [31000, 0, 31500]}
    assert (found[2].tiles, found[2].inverted) == ([], False)
    assert found[2].limits == {"vdda_ma": (None, 600), "vdda_mv": (1700, 1900.5)}
    (tmp_path / "routines").mkdir()
    file.check_start("daq2", frozenset({"north"}))
    assert parsed(load(tmp_path, "\n".join(file.effective()))) == parsed(file)
    with pytest.raises(
        ConfigError, match=r"25: producers\.north\.power-settings: the boards have settings of their own"
    ):
        load(tmp_path, DETECTOR.replace("revision = 4", first).replace('ring = "64MiB"', 'power-settings = "x.json"'))
    with pytest.raises(
        ConfigError, match=r"3: boards\.module1\.vdda-dac: is for PACMAN boards only, not for kind bern"
    ):
        load(tmp_path, BERN)
    file = load(tmp_path, DETECTOR.replace("revision = 4", "limits = {vdda_mv = [2, 1]}"))
    with pytest.raises(ConfigError, match=r"22: producers\.north: power settings: limits: vdda_mv: the lowest value 2"):
        file.check_start("daq2", frozenset({"north"}))


#: Text to be replaced, by what, and the message with its line.
ERRORS = [
    ('ring = "64MiB"', 'rimg = "64MiB"', "25: producers.north.rimg: unknown key; did you mean ring?"),
    ('ring = "64MiB"', 'ring-bytes = 3', "25: producers.north.ring-bytes: unknown key; expected one of host, boards"),
    ('ring = "64MiB"', 'ring = "64 miles"', "25: producers.north.ring: size '64 miles': expected a number"),
    ('ring = "64MiB"', "ring = [1]", "25: producers.north.ring: expected a text or a number, found [1]"),
    ("no-record-sent = true", "no-record-sent = 1", "27: producers.north.no-record-sent: expected true or false"),
    ("clock-limit = 0.5", "clock-limit = 0", "26: producers.north.clock-limit: expected a number above 0"),
    ("clock-limit = 0.5", 'when-full = "spil"', '26: producers.north.when-full: expected one of "spill", "wait"'),
    ("fake = 1e5", "", '29: producers."made up": one of the arguments --serial --pacman'),
    ("fake = 1e5", 'fake = true\nserial = "x"', '29: producers."made up": --'),
    ("fake = 1e5", 'boards = ["module1"]', "30: producers.\"made up\".boards: board 'module1' is read by"),
    ("fake = 1e5", "fake = 1e5\nspeed = true", '31: producers."made up".speed: expected a text or a number'),
    ('"made up"', "north", "29: not TOML: Cannot declare"),
    ('"made up"', "first", "29: producers.first: the name 'first' is that of storages.first (line 11) already"),
    ('"made up"', '"a\\u0007b"', '29: producers."a\\u0007b": '),
    ('host = "daq2"', 'host = "daq3"', "23: producers.north.host: unknown host 'daq3'; the hosts are daq1, daq2"),
    ('"module1"]', '"modul1"]', "24: producers.north.boards: unknown board 'modul1'; did you mean module1?"),
    ('"module1"]', '"module0"]', "24: producers.north.boards: board 'module0' twice"),
    ("revision = 4", "revision = 6", "19: boards.module0.revision: expected a whole number from 2 to 5, found 6"),
    ("revision = 4", "tiles = [10]", "19: boards.module0.tiles: expected a list of values, each a whole number from"),
    ("revision = 4", "vdda-dac = 65536", "19: boards.module0.vdda-dac: expected "),
    ("revision = 4", "limits = {vdda_ma = true}", "19: boards.module0.limits.vdda_ma: expected a number or a list"),
    ("revision = 4", 'vdda-dac = 1, kind = "bern"', "24: producers.north.boards: a producer reads boards of one kind"),
    ("revision = 4", "limits = [600]", "19: boards.module0.limits: expected a table, found [600]"),
    ("revision = 4", 'kind = "bern"', "24: producers.north.boards: a producer reads boards of one kind"),
    ("io-group = 2", "io-group = 1", "20: boards.module1.io-group: io_group 1 is that of boards.module0.io-group"),
    ("io-group = 2", "io-group = 0", "20: boards.module1.io-group: expected a whole number from 1 to 255, found 0"),
    ("pacman2.lab:6000", "pacman1.lab", "20: boards.module1.address: pacman1.lab, port 5556, is that of"),
    ('"made up"', "Log", "29: producers.Log: the name 'Log' is that of log (default) already"),
    (', io-group = 2', "", "20: boards.module1: the key io-group is missing: a whole number from 1 to 255"),
    (':6000"', ':6000:7:8"', '20: boards.module1.address: expected a text'),
    ('rotate = [\n    "100Mrows"', 'rotate = [\n    "100miles"', "12: storages.first.rotate: "),
    ("[storages.first]", "[storage.first]", "11: storage: unknown table; did you mean storages?"),
    ("[storages.first]", "[storages]", "12: storages.rotate: expected a table, found"),
    ('name = "2x2"', "name = 2", "2: detector.name: expected a text of at most 64 characters, found 2"),
    ('name = "2x2"', "name = 1979-05-27", "2: detector.name: expected a text of at most 64 characters, found 1979-05"),
    ('name = "2x2"', 'name = "2x2', "2: not TOML: "),
    ("[detector]", "[core]\naddress = 'tcp://10.0.0.1:5678'\n[detector]", "1: log.address: port 5678 is that of core"),
    ("[detector]", "[log]\naddress = 'here there'\n[detector]", "2: log.address: address 'here there': expected"),
    ("[detector]", "[log]\naddress = 'tcp://10.0.0.1:*'\n[detector]", "2: log.address: expected tcp://HOST[:PORT]"),
    ("[detector]", "[[detector]]", "1: detector: expected a table, found"),
    ("[detector]", "[alarms]\nno-such = 1\n[detector]", "2: alarms.no-such: unknown key"),
    ("[detector]", f"x = {'[' * 5000}{']' * 5000}\n[detector]", "1: not TOML: too many brackets"),
    ("[routines]\ndirectories", "directories", None),
    ("data-port = [7000]", "data-port = [5678]", "35: emulators.trial: port 5678 is that of log.address (default) alr"),
    ("data-port = [7000]", "wait-for-go = true", "38: emulators.trial.wait-for-go: unknown key"),
    ("data-port = [7000]", "odd = 2", "38: emulators.trial.odd: expected a fraction, 0 to 1, found 2"),
    ("emulators.trial", "emulators.core", "35: emulators.core: core is the name of the core"),
    ('host = "daq2"', 'höst = "daq2"', "23: not TOML: "),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), ERRORS, ids=range(len(ERRORS)))
def test_errors_name_file_line_and_key(tmp_path: Path, old: str, new: str, words: str | None) -> None:
    assert old in DETECTOR
    changed = DETECTOR.replace(old, new, 1 if old.startswith(("[d", "name")) else -1)
    if words is None:
        words = '31: producers."made up".directories: unknown key'
        changed = changed.replace("\n\ndirectories", "\ndirectories")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, changed)
    assert f"{tmp_path}/detector.toml:{words}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700


def test_other_bytes_and_files(tmp_path: Path) -> None:
    for text, words in (
        (b"", "1: expected a table [producers.NAME]"),
        (b"[a]\n\xff = 1\n", "2: expected UTF-8, found"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"/detector.toml:{words}")):
            load(tmp_path, text)
    with pytest.raises(LarpixDaqError, match="expected at most 262144"):
        load(tmp_path, b"#" * 300_000)
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(LarpixDaqError, match=re.escape(str(path))):
            DetectorConfig(path, PROGRAMS)
    assert load(tmp_path, DETECTOR.replace("\n", "\r\n")).wanted("daq2") == load(tmp_path, DETECTOR).wanted("daq2")


def test_what_must_exist_on_the_host_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load(tmp_path, DETECTOR)

    def check(name: str, words: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/detector.toml:{words}")):
            file.check_start("daq1", frozenset({name}))

    check("first", "3: detector.output-dir: no such directory: ")
    (tmp_path / "data").mkdir()
    file.check_start("daq1", frozenset({"first", "north"}))  # north is of the other host
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    check("first", "3: detector.output-dir: the disk of ")
    check("made up", "33: routines.directories: no such directory: ")
    (tmp_path / "routines").mkdir()
    file.check_start("daq1", frozenset({"made up"}))
    file = load(tmp_path, DETECTOR.replace("chips = 4", "chips = 4\nodd = 0.5"))
    check("trial", "35: emulators.trial: --chips determines the packets")
    file = load(tmp_path, '[producers.a]\nio-config = ["PACMAN_IO", "none.json"]\n')
    with pytest.raises(ConfigError, match=r":1: producers.a: io config none.json: no such file"):
        file.check_start("", frozenset({"a"}))
    (tmp_path / "none.json").write_text('{"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, "here"]]}')
    file.check_start("", frozenset({"a"}))  # relative to the file


def test_the_effective_file_means_the_same(tmp_path: Path) -> None:
    file = load(tmp_path, DETECTOR)
    lines = list(file.effective())
    assert f'ring = "64MiB"  # {tmp_path}/detector.toml:25' in lines
    assert f'output-dir = "data"  # {tmp_path}/detector.toml:3' in lines[lines.index("[storages.first]") :]
    assert 'spool-limit = "8GiB"  # default' in lines
    again = load(tmp_path, "\n".join(lines))
    assert [line.partition("  #")[0] for line in again.effective()] == [line.partition("  #")[0] for line in lines]
    assert parsed(again) == parsed(file)


def test_every_option_of_every_process_is_a_key() -> None:
    """Those that are not are determined by other tables, for all processes alike."""
    tables: dict[str, set[str]] = {}
    for each in explanations(PROGRAMS):
        assert each.text, each
        tables.setdefault(each.table, set()).add(each.key)
    for program in PROGRAMS:
        options = {
            text[2:] for action in program.parser()._actions for text in action.option_strings if text[:2] == "--"
        }
        table = f"{program.table}.NAME" if program.many else program.table
        missing = options - tables[table] - {"help", "core", "state-dir", "insecure", "log-address", "alarms"}
        assert missing <= {"name", "wait-for-go"} | program.by_host
        assert "name" not in missing or program.many


def test_limits_of_boards_are_those_of_the_sources() -> None:
    properties = msgspec.json.schema(Board)["$defs"]["Board"]["properties"]
    assert (properties["revision"]["minimum"], properties["revision"]["maximum"]) == (REVISIONS[0], REVISIONS[-1])
    assert set(properties["asic"]["enum"]) == set(ASICS)


def test_schema_and_explanations(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json_schema(PROGRAMS)
    assert schema["$defs"]["Producers"]["properties"]["when-full"]["enum"] == ["spill", "wait"]
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema))
    assert main(["config", "--explain", "storages.NAME.rotate"]) == 0
    assert capsys.readouterr().out.startswith(
        "[storages.NAME]  The options of `larpixdaq-offline-storage`.\n  rotate: a"
    )
    assert main(["config", "--explain", "nothing"]) == 1
    assert "no key contains this" in capsys.readouterr().err


def test_the_reference_in_the_documentation_is_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """`larpixdaq config --explain --markdown` prints it."""
    explain("", markdown=True)
    reference = capsys.readouterr().out.strip()
    assert reference in (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


KEYS = st.sampled_from(
    ["detector", "hosts", "core", "log", "storages", "monitors", "boards", "producers", "routines", "alarms", "name",
     "emulators", "host", "address", "io-group", "fake", "ring", "rotate", "a", "é", "", '"', "x y"]
)  # fmt: skip
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    return repr(value)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.booleans())
def test_any_toml_is_read_or_refused_with_its_line(tmp_path_factory: Any, content: Any, producer: bool) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in content.items())
    if producer and "producers" not in content:
        text += "\n[producers.a]\nfake = true"
    tomllib.loads(text)
    file, refusal = None, ""
    try:
        file = load(folder, text)
    except ConfigError as error:
        refusal = str(error)
    if file is None:
        match = re.fullmatch(r".*/detector\.toml:(\d+): .*", refusal)
        assert match is not None, refusal
        assert 1 <= int(match[1]) <= len(text.split("\n"))
        return
    assert parsed(load(folder, "\n".join(file.effective()))) == parsed(file)


STATEMENTS = st.sampled_from(
    ["# [not a table]", "", "{} = 1", "{} = [ # ]\n  1,\n  2,\n]", '{} = """\n[x]\na = 1 \\\n"""', "{}.inner = 'x'",
     "[{}]", "[{}.inner]  # a", "  {} = {{in = {{line = 1}}}}", "{} = '''#'''"]
)  # fmt: skip


@given(st.lists(STATEMENTS, max_size=12))
def test_lines_of_keys(statements: list[str]) -> None:
    text, at, table, expected = "", 1, (), {}
    for number, form in enumerate(statements):
        statement = form.format(key := f"k{number}")
        keys = (key, "inner") if ".inner" in form else (key,)
        if form.startswith("["):
            table = keys
            expected[keys] = at
        elif "{}" in form:
            expected[(*table, *keys)] = at
        text += statement + "\n"
        at += statement.count("\n") + 1
    tomllib.loads(text)
    found = find_lines(text)
    assert {keys: found[keys] for keys in expected} == expected


@given(st.binary(max_size=60) | st.text(st.sampled_from("[]{}=\"'.\n#a1,\\ "), max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"/detector\.toml:\d+: "):  # they are too short for a producer
        load(tmp_path_factory.getbasetemp(), data)
