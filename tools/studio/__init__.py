"""Generate multitrack songs (drums, bass, other, vocals) from seeds."""
