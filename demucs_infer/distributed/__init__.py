"""A manifest of tracks, as many as there are: in one process, in shards, or on a Ray cluster.

All of them call the same `TrackWorker`, and a row in is a row out, whatever happens.
"""
