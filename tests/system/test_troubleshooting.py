"""Every message of the code is in docs/troubleshooting.md, or explains itself.

Messages are collected from the sources: the texts of log.warning(), log.error() and log.exception(), and of `raise`. A
text that consists of placeholders alone passes on another message. The words of `status` are those of display.py.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import larpixdaq
from larpixdaq.alarm_config import Condition

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()
SOURCES = sorted(Path(larpixdaq.__file__).parent.rglob("*.py"))
LOGGED = {"warning", "error", "exception", "critical"}
#: A text explains itself if it says one of these: which values are right and which was found; what is missing, and what
#: there is; a limit; a command or option that helps; or the reason, after a colon.
EXPLAINED = re.compile(
    r"expected|found|at (most|least)|below|above|larger|more than|limit|waited"
    r"|there (is|are)|no such|not (known|found|among)|cannot|needs?\b|needed|must|only|without|unknown|impossible"
    r"|damaged|already|again|twice|another|holds|announces|reads back|ask for|`|--|\w\(|: …$"
    r"|(is|are|has|have|was|were) (no|not|missing|empty|locked)\b"
)
#: Other texts that explain themselves. A new text without the words above is added here when somebody has read it with
#: the eyes of a user, or it gets a row on the page.
READ = set(
    """
a broker lags behind
stream …: the brokers do not know the position of …
Already listening
Already not listening
a webhook has exactly one of url, url-file and url-env
all components of … have keys: …; 'larpixdaq keys revoke NAME' takes one back
attach: … of … does not fit: … has … left, of which … stay free
attach: …: … bytes at … of …
before '… in' it
board address …: data port 1 leaves no command port; give one
board address …: data port and command port are both …
board address …: io_group … has the same address
chip … is on tile … and on tile …
chip …: channel … of …
chip …: no board of io_group … takes commands here (…)
chip …: on its tile are …
chips … and … are both chip … here
configure_network: no chips in the network of this board
core is the name of the core
counts of shape …
discover_network: exclude: chip … is on none of the requested tiles
end of run … from …: … counts, not …
io_group … has two bands of rates
it has … rows
log record of …: sent with the key of …
low: … channels of io_channel … at … Hz are … packets/s; it carries …
mail has password-file or password-env, not both
message from …: it may not send …
message from …: its key was revoked
multiple values for argument …
no answer
no answer within … s
no chip …; the first is …
no chips in it
no class … with … in …
no io file is loaded in a routine: the producer's options name the boards
not a time: … s since 1970
one of the arguments … is required
packed rows: … bytes after them
prepare_run: run … was the last one, numbers have … digits
prepare_run: …: its rows have …
recorded messages keep their times
register 0x… is past the I2C window, which ends at 0x…
run … and a search: give one of them
run … has rows of … bytes in layout …
run …: no room for the end record
run …: … has files of several runs with this number (…): name a file
several of these files have the same name, and so would their exports: export them one by one
shape: no field ……
state directory …: not writable
stuck bit: register … of …
the files of run … are …
the run catalogue is on …: it is shown by a web server there
token: it is for the component …, not for a viewer
token: it is for the components of a host, not for a viewer
too many lists in each other
… bytes with filters left out (…)
… chips, values of shape …
… does not take …: its queue is full or it has ended
… has layout …, … has …: rows of v1 and of later chips have other columns
… has sent a block of …: refused
… has … MiB left, files made of others leave … MiB
… rows, … columns
…, …: hold no .h5 files
…: /configs has other columns than …
…: /packets has other columns than /run/info says (larpixdaq verify)
…: /run/blocks names a producer that /run/producers does not have
…: /run/blocks reaches to row …, /packets has …
…: /run/blocks: blocks overlap, or do not follow each other
…: /run/configs names producer … of …
…: /run/info says layout …, the columns are …
…: HDF5 file with neither /msgs (raw) nor /packets
…: asked about run …, is in run …
…: boards of revision … do not measure VPLUS
…: chip … is also in …
…: chip …: ASIC_VERSION …, but … has ASIC_VERSION …
…: comes after the end of its source
…: configurations belong to a text
…: connection …: its routing id was set by the peer
…: exists, and was made from …, not from …
…: has a text, but not rows of messages
…: has board messages, not rows: open the packet file …
…: has changed meanwhile: is it still being written?
…: has layout …, … has …
…: has other columns than …
…: has rows of layout …, the part has other columns
…: io_group … has chips on io_channel …, a board of revision … has io_channels 1 to ……
…: is a link out of its directory, to …: name that file instead
…: is of run …, … of run …
…: is of storage …, asked for is storage …
…: is the unfinished file of a storage: larpixdaq recover finishes it
…: it ended with status … and said nothing
…: its CHIP_KEY is …, and its name says …
…: its revision is …, but … says …
…: its storage has died, and none recovers it (larpixdaq recover)
…: keys are for the core's own user, on its host; this is …
…: larpix-daq wrote it, and not …
…: names producer … of …
…: neither a raw file, nor a packet file, nor a log of board messages
…: no change of the log level within … s
…: no chips in it
…: no config_*.json in it
…: no register …; …
…: none of its … can be read…
…: not the name of a file of a run, whose further parts could be followed
…: not the name of a part (….h5.part) or of its journal
…: of an earlier version (schema …, here …): a core of this version brings it up to date when it starts
…: part … of run … does not come: is a storage there?
…: power_up: no tiles, in the arguments or in settings
…: raw file that larpix-daq did not write
…: the blocks do not cover the … rows (larpixdaq verify)
…: the blocks have … different rows of …
…: the blocks have … rows of … (larpixdaq verify)
…: tile …: its lines do not read back as inverted
…: tile …: no …_dac, in the arguments or in settings…
…: was written to while it was converted (… bytes before, now …): convert it when it is finished
…: with a configuration file, all options of the processes are in the file
…: … (larpixdaq verify)
…: … leaves no room for … io_groups … ports apart
…: … …, … …: not converted
…: … …=N, N from 2 to 5
…: … …=N, N from 2 to 5…
…: …, the newest that is known is …
…: …, … ends before block …
…: …; no file is overwritten
…:1: not TOML: too many brackets in each other
…; nothing was changed
…; nothing was loaded
…; the tile was switched off
""".strip().splitlines()
)


def template(node: ast.expr) -> str:
    """Return the text of an expression, with … for what is filled in; "" if it is no literal text."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%(\.\d+)?[sdrgxf]", "…", node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "…") + (template(node.right) or "…")
    return ""


def plain(text: str) -> str:
    """Return a template as the page writes it, in a code span."""
    return " ".join(text.split()).replace("`", "'")


def calls() -> Iterator[tuple[bool, str]]:
    """Yield whether it is logged or raised, and the template, for each message of the sources."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                yield False, template(node.exc.args[0])
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LOGGED
                and ast.unparse(node.func.value) in ("log", "_log", "self._log")
            ):
                yield True, template(node.args[0])


def messages(*, logged: bool) -> list[str]:
    return sorted({plain(text) for kind, text in calls() if kind == logged and re.search(r"[a-z]{3}", text)})


def explained() -> set[str]:
    """Return the messages in the first column of the page's tables."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    return {message for cell in cells for message in re.findall(r"`([^`]+)`", cell)}


def test_logged_messages_are_on_the_page():
    assert [message for message in messages(logged=True) if message not in explained()] == []


def test_errors_are_on_the_page_or_explain_themselves():
    known = READ | explained()
    assert [text for text in messages(logged=False) if not EXPLAINED.search(text) and text not in known] == []


def test_the_page_has_no_messages_that_the_code_has_not():
    known = {plain(text) for _, text in calls()}
    code = " ".join(" ".join(path.read_text().split()) for path in SOURCES)
    unknown = [
        message for message in explained() - known if not all(part.strip(" :,;") in code for part in message.split("…"))
    ]
    assert unknown == []
    assert known >= READ


def test_every_alarm_condition_has_a_row():
    alarms = (DOCS / "alarms.md").read_text()
    assert [condition for condition in get_args(Condition) if f"| `{condition}` |" not in alarms] == []
