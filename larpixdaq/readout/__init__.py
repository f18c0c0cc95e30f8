"""The producer's way from its sources to the stream: rows into the ring, blocks out, commands to the boards."""
