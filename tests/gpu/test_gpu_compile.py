"""Every kernel compiles for the GPU it is written for, though there is none, and spills no register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED = 227 << 10  # bytes that a program may have on an H100 or H200 (CUDA C++ Programming Guide, table of limits)


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux")
def test_every_kernel_compiles_for_an_h200_and_spills_nothing(tmp_path):
    script = Path(__file__).with_name("compile_all.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in found}
    wanted = {"_attend", "_join", "_norm", "_turn_and_keep", "_silu_product", "_route", "_up", "_down", "_sum"}
    wanted |= {"_few_product", "_few_gated", "_few_turned", "_some_rows"}
    assert names == wanted | {"_unpack", "_up_packed", "_down_packed"}
    assert [kernel for kernel in found if kernel["stack"] or kernel["shared"] > SHARED] == []
