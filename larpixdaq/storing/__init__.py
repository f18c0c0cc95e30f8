"""What a storage does with the stream: which file a block goes into, what is acknowledged, when a file is closed.

storing.py    what the core asks of a storage
writing.py    the runs that are open here: which part a block goes into, what is acknowledged
parts.py      one run: its open part, and how the next one follows
finishing.py  a part after its last row: its final name, its checksum, the command that was asked for
before.py     what a storage before this one has left
space.py      how much room the disk has, and for how long
limits.py     when a part is full (--rotate)
turn.py       who may write: one process a name and directory, and none that has stood still
"""

from larpixdaq.storing.storing import Storing

__all__ = ["Storing"]
