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
cpu = usage.ru_utime + usage.ru_stime
unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": usage.ru_maxrss * unit / (1 << 20)}))
sys.exit(status != 0)
