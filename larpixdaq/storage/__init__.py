"""What a storage does with the stream: which file a block goes into, what is acknowledged, when a file is closed.

service.py         what the core asks of a storage, and the runs that are open here
open_run.py        one run: its open part, and how the next one follows
finisher.py        a part after its last row: its final name, its checksum, the command that was asked for; and what a
                   storage before this one has left
limits.py          when a part is full (--rotate), how much room the disk has, and for how long
directory_lock.py  who may write: one process a name and directory, and none that has stood still
sidecar.py         the JSON file beside a finished file, and its second name
conversion.py      recordings of other programs made into such files; convert.py does several at a time
"""
