"""What every process needs whatever it does: its event loop, times, children and files."""
