"""Sources of packets: PACMAN, Bern and serial boards, IO classes, recorded files."""
