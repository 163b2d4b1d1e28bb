"""Build optimized copies of loaded networks: the same results, within a stated tolerance."""
