"""Separate the tracks of a manifest of any length: in one process, in shards, or on a Ray cluster.

All of them call the same `TrackWorker`, which returns one result row for every manifest row.
"""
