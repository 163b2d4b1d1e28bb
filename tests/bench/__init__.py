"""Ours against its peers: `python -m tests.bench` prints one table, made in one run."""
