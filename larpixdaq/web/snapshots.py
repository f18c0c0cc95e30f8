"""Snapshots of chips for pages, which name them: their content goes between core and producer, and is no JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.constants import PRODUCER
from larpixdaq.control import snapshots
from larpixdaq.control.client import Connection
from larpixdaq.errors import RequestError, printable
from larpixdaq.web.live import ask

#: Maximum seconds until a producer has given the values of all chips, or the core a snapshot.
_LIMIT: Final = 60.0


class _Save(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    comment: str = ""


class _Load(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: str
    skip_missing: bool = False


class _Compare(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: str
    other: str | None = None


_ACTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "save_snapshot": _Save,
    "load_snapshot": _Load,
    "compare_snapshot": _Compare,
}


class Order(NamedTuple):
    """A request to the core, or to a component, by its name or as the first one of a kind."""

    action: str
    params: Mapping[str, Any]
    component: str
    kind: str


def names_snapshot(action: str) -> bool:
    """Return whether a page's request for this action names a snapshot of the catalogue, as an Operator's method."""
    return action in _ACTIONS


async def with_content(connection: Connection, order: Order) -> Order:
    """Return a page's request as core and producer take it: with the content of the snapshots that it names.

    `connection` is that of the page's viewer, whose key the core checks. Raises LarpixDaqError.
    """
    try:
        params = msgspec.convert(order.params, _ACTIONS[order.action])
    except msgspec.ValidationError as error:
        raise RequestError(f"{order.action}: {printable(str(error))}") from None
    producer = {"component": order.component, "kind": order.kind or ("" if order.component else PRODUCER)}
    if isinstance(params, _Save):
        found = await ask(connection, "retrieve_snapshot", {}, limit=_LIMIT, **producer)
        data = await asyncio.to_thread(_packed, found)
        content = {"name": params.name, "comment": params.comment, "asic": found["asic"], "chips": len(found["chips"])}
        return Order(order.action, {**content, "data": data}, "", "")
    if isinstance(params, _Load):
        sent = {"content": await _content(connection, params.snapshot), "skip_missing": params.skip_missing}
        return Order(order.action, sent, **producer)
    assert isinstance(params, _Compare)
    other = None if params.other is None else await _content(connection, params.other)
    return Order(order.action, {"content": await _content(connection, params.snapshot), "other": other}, **producer)


async def _content(connection: Connection, name: str) -> bytes:
    data: bytes = (await ask(connection, "snapshot", {"name": name}, limit=_LIMIT))["data"]
    return data


def _packed(found: Mapping[str, Any]) -> bytes:
    return snapshots.pack(snapshots.make(found["asic"], found["chips"]))
