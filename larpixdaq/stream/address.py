"""Where a producer's stream listens: the interface that reaches the core, a free port, unless told otherwise."""

from __future__ import annotations

import zmq

from larpixdaq import config
from larpixdaq.errors import ConfigError


def bind(listener: zmq.Socket[bytes], address: str | None, core: str, *, insecure: bool) -> str:
    """Bind to `address` (default: towards the core), on a free port if it names none; return where others connect."""
    wanted = address or f"tcp://{config.interface_towards(core)}"
    where = config.listen_address(wanted, 0, insecure=insecure, what="--address")
    try:
        listener.bind(where)
    except zmq.ZMQError as error:
        raise ConfigError(f"--address {where}: {error.strerror}") from None
    endpoint = listener.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return config.reachable(endpoint.decode().rstrip("\0"), core)
