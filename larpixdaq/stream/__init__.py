"""The stream of blocks from a producer to its consumers: numbered, acknowledged, sent again after a lost connection.

Publisher   the producer's side: a ROUTER that sends blocks from ring and spool
Consumer    the consumers' side: a thread with a DEALER to each producer
"""

from larpixdaq.stream.publisher import Publisher
from larpixdaq.stream.subscriber import Consumer

__all__ = ["Consumer", "Publisher"]
