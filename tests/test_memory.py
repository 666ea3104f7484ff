"""What the process takes from the system, and gives back."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the setting")
def test_freed_memory_stays_so_that_a_step_does_not_fault_it_in_again():
    program = """
import ctypes, resource, sys
from maestrale.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def step():
    places = [libc.malloc(30 << 20) for _ in range(3)]
    for place in places:
        ctypes.memset(place, 1, 30 << 20)
    for place in places:
        libc.free(ctypes.c_void_p(place))
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    pages = 3 * (90 << 20) // 4096
    assert faults["kept"] < pages / 100
    assert faults["given back"] > pages / 3  # else there was nothing to mend
