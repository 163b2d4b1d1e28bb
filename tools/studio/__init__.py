"""A music studio made of code: multitrack songs with drums, bass, other and vocals, by seed."""
