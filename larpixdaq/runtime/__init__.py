"""Parts that every process needs: event loop, timing, child processes, and access to files."""
