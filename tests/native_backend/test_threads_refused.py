"""Where the system starts fewer threads than are asked for: one line, no wait for those that never came."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from maestrale.batch import CacheLayout
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.config import ModelConfig
from maestrale.errors import UsageError
from maestrale.native_backend.load import make_model
from maestrale.native_backend.rounding import round_to_nearest

def model(threads):
    config = ModelConfig(16, 1, 8, 24, 2, 1, 64, 1e-5, 1e4, (None,))
    return make_model(config, CacheLayout(16, 64, 64, (None,), (4,), (4,)), cache="f32", threads=threads)

def rounded(threads):
    return round_to_nearest("w", StoredTensor.from_array(np.ones((16, 64), np.float32), "F32"), "int8", threads=threads)

pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)  # room for a few stacks
for call in (model, rounded):
    try:
        call(1000)
    except UsageError as error:
        print(error)
    call(2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="holds a process to the addresses it has by Linux's means")
def test_threads_that_the_system_does_not_start_are_refused_with_the_remedy():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("threads = 1000: the system starts no more of them (Resource temporarily unavailable)")
        assert line.endswith("take fewer by --threads or MAESTRALE_THREADS")
