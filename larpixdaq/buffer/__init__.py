"""Where rows wait until they are stored: the ring in memory, the spool on disk, and what a dead producer left."""
