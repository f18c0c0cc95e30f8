"""A process that wants a lease, and writes every 10 ms what it believes: lines `TIME TERM`, by the clock of the host.

The arguments are the address of the brokers, the key, and the seconds of the lease. TERM is 0 without the lease. A line
is left out if the process stood still while it looked.
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
            before = clock()
            term = lease.term
            if clock() - before < 0.005:
                out.write(f"{before} {term or 0}\n")
            time.sleep(0.01)
