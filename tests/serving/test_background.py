"""Memory that is kept: page faults, in a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from serving.background import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        [np.ones(10_000) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

at_first = faults()
keep_freed_memory()
faults()
print(at_first, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's limits")
def test_freed_memory_is_kept():
    """Twenty arrays of 80 KB, freed and taken a hundred times, fault in their 400 pages no more than once."""
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    at_first, kept = map(int, told.split())
    assert at_first > 10_000, "nothing had to be kept"
    assert kept < 400
