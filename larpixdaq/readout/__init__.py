"""The producer between its sources and the stream: rows into the ring, blocks to the stream, commands to the boards."""
