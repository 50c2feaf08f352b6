"""What a server that stays up holds after much work."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading
import numpy as np
import psutil
from sparsewsi.web.memory import give_back, share_heaps

share_heaps()
rest = psutil.Process().memory_info().rss
barrier, kept = threading.Barrier(24), []

def work():
    held = [np.ones(100_000, np.uint8) for _ in range(100)]  # too small for pages of their own
    kept.append(held[-1])  # keeps the heap from shrinking from its end
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(24)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back()
print(psutil.Process().memory_info().rss - rest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_what_many_threads_were_freed_of_goes_back_to_the_system():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert int(ended.stdout) < 60e6  # of 240 MB
