"""A process that wants a lease, and writes each change of its term: lines `TIME TERM` with the clock of the host.

The arguments are the address of the brokers, the key, and the seconds of the lease. A line `TIME TERM` with the same
term comes at least every 20 ms, so that what the process believed in a pause is known too.
"""

import sys
import time

from larpixdaq.stream.jetstream import Brokers, parse_servers
from larpixdaq.stream.lease import Bucket, Lease, clock

if __name__ == "__main__":
    servers, key, seconds = sys.argv[1:]
    with open(1, "w", buffering=1) as out:
        lease = Lease(Bucket(Brokers(parse_servers(servers)), "test"), key, seconds=float(seconds))
        while True:
            term = lease.term
            out.write(f"{clock()} {term or 0}\n")
            time.sleep(0.01)
