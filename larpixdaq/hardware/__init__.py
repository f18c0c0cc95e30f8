"""The producer's child process, which configures chips and boards and runs routines, and its supervisor."""
