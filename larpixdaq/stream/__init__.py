"""The stream of blocks from a producer to its consumers: numbered, acknowledged, replayed from the ring after a break.

Publisher   the producer's side: a ROUTER that serves blocks out of the ring
Consumer    the other side: a thread with a DEALER to each producer
"""

from larpixdaq.stream.publisher import Publisher
from larpixdaq.stream.subscriber import Consumer

__all__ = ["Consumer", "Publisher"]
