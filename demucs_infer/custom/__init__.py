"""Networks of other people, run by the same engine: how they are described, found and filled."""
