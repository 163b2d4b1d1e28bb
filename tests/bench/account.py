"""Run a command and print its time and peak memory as JSON.

On Linux, the peak of a process starts at that of its parent. This small script is the parent, and
not the benchmark, which holds songs and networks: the peak starts at ten megabytes.
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
