"""The same ranks, started by Open MPI."""

import os
import shutil
import subprocess
import sys

import pytest
from parallel.start import PLAIN
from serve.live import BYTES
from tiny import make_folder, write_tekken

MPIRUN = shutil.which("mpirun")
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed")


@pytest.mark.parametrize("split", [("--num-pipeline-ranks", 2), ("--tensor-parallel", 2), ()])
def test_mpirun_gives_the_text_of_one_process(split, tmp_path):
    folder = make_folder(tmp_path / "bytes", BYTES)
    write_tekken(folder)
    arguments = ["-m", "maestrale", "generate", folder, "-p", "Once", "--max-tokens", 12, "--temperature", 0]
    command = [sys.executable, *map(str, arguments), "--dtype", "float32"]
    said = []
    for launcher in ([], [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2"]):
        done = subprocess.run(
            [*launcher, *command, *(map(str, split) if launcher else ())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | PLAIN,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0]
    assert said[0] == said[1]
