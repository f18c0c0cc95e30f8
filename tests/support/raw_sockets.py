"""Sockets of programs that speak to a core or to its components without larpixdaq.control, with the user's own key."""

from typing import Any

import zmq

from larpixdaq.keys import credentials
from larpixdaq.keys.curve import connect_with


class Context(zmq.Context):
    """Keeps its sockets until it is destroyed, which closes them."""

    def socket(self, *arguments: Any, **options: Any) -> Any:
        made = super().socket(*arguments, **options)
        self.__dict__.setdefault("made", []).append(made)
        return made


def use_key(socket: Any, core: str, server: str = "") -> None:
    """Give a socket, before connect(), the key of this user for the core at this address.

    `server`: the public key of the component that the socket will connect to; "": the core's.
    """
    own = credentials.find(core)
    assert own is not None, f"no key for {core}"
    if own.server:
        connect_with(socket, own.pair, server or own.server)
