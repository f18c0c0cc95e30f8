"""The socket of a producer's stream, and where it listens: at the interface that reaches the core, at a free port,
unless told otherwise."""

from __future__ import annotations

import zmq

from larpixdaq import config
from larpixdaq.blocks import MAX_FROM_CONSUMER
from larpixdaq.errors import ConfigError

#: Milliseconds after which the connection of a consumer that takes no data is closed: its process is stopped, or the
#: network has cut it off. That gives back the ring's memory that libzmq holds for it. A busy consumer is not affected,
#: since its libzmq thread always takes what comes.
DEAD_CONSUMER = 1000


def router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The socket for a Publisher, still to be bound: what it is set to counts from the bind on."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FROM_CONSUMER)
    config.close_dead_connections(socket, DEAD_CONSUMER)
    return socket


def bind(listener: zmq.Socket[bytes], address: str | None, core: str, *, insecure: bool) -> str:
    """Bind to `address` (default: towards the core), on a free port if it names none; return where others connect."""
    wanted = address or f"tcp://{config.interface_towards(core)}"
    where = config.listen_address(wanted, 0, insecure=insecure, what="--address")
    try:
        listener.ipv6 = config.is_ipv6(where)
        listener.bind(where)
    except zmq.ZMQError as error:
        raise ConfigError(f"--address {where}: {error.strerror}") from None
    endpoint = listener.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return config.reachable(endpoint.decode().rstrip("\0"), core)
