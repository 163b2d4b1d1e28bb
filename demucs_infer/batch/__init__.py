"""Many tracks: from files to files, skipped when done, resumed when interrupted."""
