"""Where packets come from: PACMAN, Bern and serial boards, IO classes, recorded files."""
