"""Use the operating system: memory, threads, locks, durable files, checksums."""
