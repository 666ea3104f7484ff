"""The same ranks, started by Open MPI."""

import shutil
import sys

import pytest
from parallel.start import check_same_words
from serve.live import BYTES
from tiny import make_folder, write_tekken

MPIRUN = shutil.which("mpirun")
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed")


@pytest.mark.parametrize("split", [("--num-pipeline-ranks", 2), ("--tensor-parallel", 2), ()])
def test_mpirun_gives_the_text_of_one_process(split, tmp_path):
    folder = make_folder(tmp_path / "bytes", BYTES)
    write_tekken(folder)
    launcher = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", 2, sys.executable]
    arguments = [folder, "-p", "Once", "--max-tokens", 12, "--temperature", 0, "--dtype", "float32"]
    check_same_words(launcher, split, "generate", *arguments)
