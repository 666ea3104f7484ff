"""Memory that a server has freed does not stay with it."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, gc, sys, threading
from pathlib import Path
import numpy as np
from maestrale.serve import heap
if sys.argv[1] == "prepared":
    heap.prepare()

def taken():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

def work():
    for _ in range(3):
        np.ones(2 << 20)  # 16 MiB
        many = [bytearray(200_000) for _ in range(50)]
        del many

async def tended():
    heap._PERIOD = 0.01
    task = asyncio.create_task(heap.tend())
    await asyncio.sleep(0.5)
    task.cancel()

before = taken()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
    thread.join()
print(taken() - before)
gc.disable()
for _ in range(1000):  # 20 MB that only the collector finds
    cycle = [bytearray(20_000)]
    cycle.append(cycle)
del cycle
held = [bytearray(20_000) for _ in range(4000)]
del held[::2]  # 40 MB, between what is used
print(taken() - before)
asyncio.run(tended())
print(taken() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_is_freed_goes_back_to_the_system():
    def kept(how):
        found = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return [float(line) for line in found.stdout.split()]

    of_threads, with_holes, tended = kept("prepared")
    assert of_threads < 12  # MiB: the 8 that may stay, and what the interpreter took
    assert with_holes - tended > 40
    assert kept("as it is")[0] > 12  # an array of 16 MiB in some heap
