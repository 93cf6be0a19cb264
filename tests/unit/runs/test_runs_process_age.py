"""A process knows how long ago it started."""

import subprocess
import sys
import time

CODE = """
import time
time.sleep(0.2)
from composer_replication.runs.process_age import cold_start_s
print(cold_start_s())
"""


def test_the_cold_start_runs_from_the_start_of_the_process():
    started_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    elapsed_s = time.perf_counter() - started_s
    assert 0.2 < float(done.stdout) < elapsed_s + 0.1
