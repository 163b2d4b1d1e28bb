"""Runs a command and prints what it took as JSON; a script of its own because it has to be small.

Linux begins the peak of a process with that of the one that started it, and the bench holds songs
and networks. From here it begins with ten megabytes.
"""

import json
import os
import subprocess
import sys
import time

started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
cpu, peak = (
    usage.ru_utime + usage.ru_stime,
    usage.ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)),
)
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))
sys.exit(status != 0)
