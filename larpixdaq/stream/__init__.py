"""The stream of blocks from a producer to its consumers: numbered, acknowledged, sent again after a lost connection.

Publisher   the producer's side: a ROUTER that sends blocks from ring and spool
Consumer    the consumers' side: a thread with a DEALER to each producer
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from larpixdaq.stream.publisher import Publisher
    from larpixdaq.stream.subscriber import Consumer

__all__ = ["Consumer", "Publisher"]


def __getattr__(name: str) -> Any:
    """Import a class when it is used, because both need numpy, and a core that uses the brokers does not."""
    modules = {"Consumer": "subscriber", "Publisher": "publisher"}
    if name not in modules:
        raise AttributeError(f"module {__name__} has no {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)
