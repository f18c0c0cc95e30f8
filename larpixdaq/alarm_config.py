"""The table [alarms] of a detector's configuration file: limits of the conditions, and where alarms are sent.

Keys in the file have hyphens: `hold-off`, `disk-alarm`. docs/alarms.md lists the conditions. Secrets (addresses of
webhooks with a token, passwords) stand in files or environment variables of their own, so that the configuration can be
shown to anybody.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from larpixdaq.errors import ConfigError, advice

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Conditions of alarms, in the order of docs/alarms.md.
Condition = Literal[
    "component-lost",
    "component-restarted",
    "component-stuck",
    "given-up",
    "board-disconnected",
    "board-changed",
    "board-setup",
    "io-group-silent",
    "rate",
    "rows-dropped",
    "board-losses",
    "log-losses",
    "run-verdict",
    "storage-paused",
    "disk-left",
    "not-recovered",
    "on-close",
    "producer-files",
    "bad-parity",
    "fifo-full",
    "hot-channels",
    "dead-channels",
    "clock-offset",
    "ring-filling",
    "spool-filling",
    "catalogue",
]
Level = Literal["warning", "alarm"]
Event = Literal["raised", "acknowledged", "cleared"]
_Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
_Seconds = Annotated[float, Meta(gt=0.0, le=86400.0)]
_IoGroup = Annotated[int, Meta(ge=1, le=255)]
_Text = Annotated[str, Meta(min_length=1, max_length=1000)]
_Name = Annotated[str, Meta(min_length=1, max_length=64)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    pass


class RateBand(_Struct, frozen=True):
    """Band of the packet rate of an io_group in a run."""

    io_group: Annotated[int, Meta(ge=1, le=255, description="Number of the io_group")]
    min: Annotated[float, Meta(ge=0.0, description="Lowest rate in order, in packets/s")] = 0.0
    max: Annotated[float | None, Meta(description="Highest rate in order, in packets/s; no limit by default")] = None

    def __post_init__(self) -> None:
        if self.max is not None and not self.max > self.min:
            raise ValueError(f"max {self.max:g} packets/s of io_group {self.io_group} is not above min {self.min:g}")


class _Destination(_Struct, frozen=True, kw_only=True):
    """What a destination gets, and how many messages."""

    name: Annotated[str, Meta(max_length=64, description="Name in status and log")] = ""
    level: Annotated[Level, Meta(description="Lowest level that is sent: warning or alarm")] = "warning"
    events: Annotated[tuple[Event, ...], Meta(description="Events that are sent: raised, acknowledged, cleared")] = (
        "raised",
        "cleared",
    )
    per_minute: Annotated[
        int, Meta(ge=1, le=600, description="Maximum number of messages a minute; further ones share one message")
    ] = 20
    time_limit: Annotated[float, Meta(gt=0.0, le=300.0, description="Maximum seconds for one message")] = 10.0


class CommandDestination(_Destination, frozen=True, kw_only=True):
    """A command that gets each alarm as JSON on standard input, and in environment variables LARPIXDAQ_ALARM_*."""

    argv: Annotated[
        list[_Text], Meta(min_length=1, max_length=100, description="Program and arguments; there is no shell")
    ]


class WebhookDestination(_Destination, frozen=True, kw_only=True):
    """An address that gets each alarm as JSON by POST. Exactly one of url, url-file and url-env."""

    url: Annotated[str, Meta(max_length=2000, description="http or https address without a secret in it")] = ""
    url_file: Annotated[str, Meta(max_length=4096, description="File with the address, if it has a secret")] = ""
    url_env: Annotated[str, Meta(max_length=256, description="Environment variable of the core with the address")] = ""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.url, self.url_file, self.url_env))) != 1:
            raise ValueError("a webhook has exactly one of url, url-file and url-env")
        if self.url and not is_web_address(self.url):
            raise ValueError("url: expected http://HOST/... or https://HOST/... without spaces")


class MailDestination(_Destination, frozen=True, kw_only=True):
    """Mail by SMTP."""

    host: Annotated[str, Meta(min_length=1, max_length=253, description="Mail server")]
    port: Annotated[int, Meta(ge=1, le=65535, description="Port of the mail server")] = 25
    sender: Annotated[str, Meta(min_length=3, max_length=254, description="Address of the sender")]
    to: Annotated[list[str], Meta(min_length=1, max_length=100, description="Addresses of the receivers")]
    starttls: Annotated[bool, Meta(description="Encrypt the connection with STARTTLS")] = False
    user: Annotated[str, Meta(max_length=256, description="Login name; empty: no login")] = ""
    password_file: Annotated[str, Meta(max_length=4096, description="File with the password")] = ""
    password_env: Annotated[str, Meta(max_length=256, description="Environment variable of the core with it")] = ""

    def __post_init__(self) -> None:
        for address in (self.sender, *self.to):
            if not re.fullmatch(r"[^\s@<>,;:\"]+@[^\s@<>,;:\"]+", address) or not address.isprintable():
                raise ValueError(f"mail address {address[:100]!r}: expected NAME@HOST")
        if self.password_file and self.password_env:
            raise ValueError("mail has password-file or password-env, not both")
        if bool(self.user) != bool(self.password_file or self.password_env):
            raise ValueError("user needs password-file or password-env, and these need user")
        if self.user and not self.starttls:
            raise ValueError("user needs starttls = true, because the password would be sent in the open")


class AlarmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Conditions of alarms, and where they are sent."""

    off: Annotated[list[Condition], Meta(description="Conditions that raise no alarms")] = []
    hold_off: Annotated[
        _Seconds, Meta(description="Seconds in order until an alarm clears; longer for an alarm that flaps")
    ] = 5.0
    expected_io_groups: Annotated[
        list[_IoGroup], Meta(max_length=255, description="io_groups that must send packets in every run")
    ] = []
    expected_after: Annotated[
        _Seconds, Meta(description="Seconds after begin_run until an expected io_group must have sent packets")
    ] = 5.0
    rate: Annotated[list[RateBand], Meta(max_length=255, description="Bands of packet rates; none by default")] = []
    bad_parity: Annotated[
        _Fraction, Meta(description="Fraction of packets with bad parity, over 10 s and at least 1000 packets")
    ] = 0.01
    fifo_full: Annotated[
        _Fraction, Meta(description="Fraction of packets with the flag of a full FIFO, counted in the same way")
    ] = 0.01
    hot_channel: Annotated[
        float, Meta(gt=0.0, le=1e7, description="Rate in Hz above which a channel is hot, in each of 3 spans of 2 s")
    ] = 1000.0
    dead_channels: Annotated[
        int, Meta(ge=0, le=1 << 24, description="Number of dead channels that is in order, by monitor and run")
    ] = 0
    clock_offset: Annotated[_Seconds, Meta(description="Seconds between a board's clock and its host's")] = 1.0
    ring: Annotated[_Fraction, Meta(description="Fraction of a producer's ring in use")] = 0.5
    spool: Annotated[_Fraction, Meta(description="Fraction of a spool's limit in use; 0: any use")] = 0.1
    disk_warning: Annotated[_Seconds, Meta(description="Seconds until a storage's disk is full: warning")] = 3600.0
    disk_alarm: Annotated[_Seconds, Meta(description="Seconds until a storage's disk is full: alarm")] = 600.0
    command: Annotated[list[CommandDestination], Meta(max_length=20, description="Commands that get alarms")] = []
    webhook: Annotated[list[WebhookDestination], Meta(max_length=20, description="Webhooks that get alarms")] = []
    mail: Annotated[list[MailDestination], Meta(max_length=20, description="Mail that gets alarms")] = []

    def __post_init__(self) -> None:
        groups = [band.io_group for band in self.rate]
        if twice := [group for group in groups if groups.count(group) > 1]:
            raise ValueError(f"io_group {twice[0]} has two bands of rates")


_KEY_ERROR: Final = re.compile(r"Object contains unknown field `([^`]*)`")
_VALUE_ERROR: Final = re.compile(r"Invalid enum value '([^']*)'")


def is_web_address(url: str) -> bool:
    """Whether a text is an http or https address that can be sent to."""
    return re.fullmatch(r"https?://[^\s/]+(/\S*)?", url) is not None and url.isascii() and url.isprintable()


def load_alarms(path: Path) -> AlarmConfig:
    """Read the table [alarms] of a TOML file; without that table, the defaults. Other tables are ignored.

    Raises ConfigError, in one line with file and key.
    """
    return parse_alarms(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """Return the content of a file; ConfigError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def parse_alarms(content: bytes, where: str) -> AlarmConfig:
    """Return the alarms of load_alarms() from the content of the file `where`."""
    try:
        table = tomllib.loads(content.decode("utf-8")).get("alarms", {})
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return convert_alarms(table, where)


def convert_alarms(table: Any, where: str) -> AlarmConfig:
    """Check the table [alarms]. Raises ConfigError; `where`: the file, for its text."""
    try:
        return msgspec.convert(table, AlarmConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: [alarms]: {_explain(str(error))}") from None


def _explain(text: str) -> str:
    """Return the text of a ValidationError with the place in front, and a suggestion for an unknown key."""
    problem, _, place = text.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    unknown = _KEY_ERROR.match(problem)
    if unknown is not None:
        tables: dict[str, type[msgspec.Struct]] = {
            "rate": RateBand,
            "command": CommandDestination,
            "webhook": WebhookDestination,
            "mail": MailDestination,
        }
        struct = tables.get(place.partition("[")[0], AlarmConfig)
        known = [field.encode_name for field in msgspec.structs.fields(struct)]
        problem = f"unknown key {unknown[1]!r}; {advice(unknown[1], known, 'there are')}"
    elif (value := _VALUE_ERROR.match(problem)) is not None and place.startswith("off"):
        problem = f"no condition is named {value[1]!r}; {advice(value[1], get_args(Condition), 'there are')}"
    return f"{place}: {problem}" if place else problem
