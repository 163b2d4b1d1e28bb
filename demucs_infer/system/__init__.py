"""Services of the operating system: allocator, threads, checksums."""
