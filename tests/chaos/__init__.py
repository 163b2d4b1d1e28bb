"""Attack the package: mutated files, failing system calls, killed processes, hours of work.

`python -m tests.chaos NAME --seconds N --seed S` runs one subject; `test_chaos.py` runs each for a
moment. What a subject finds becomes a small test of the room that it concerns.
"""
