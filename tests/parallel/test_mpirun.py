"""The same ranks, started by Open MPI."""

import json
import shutil
import sys

import pytest
from parallel.start import check_same_words, run
from serve.live import BYTES
from tiny import make_folder, write_tekken

MPIRUN = shutil.which("mpirun")
LAUNCHER = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", 2, sys.executable]
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed")


@pytest.mark.parametrize("split", [("--num-pipeline-ranks", 2), ("--tensor-parallel", 2), ()])
def test_mpirun_gives_the_text_of_one_process(split, tmp_path):
    folder = make_folder(tmp_path / "bytes", BYTES)
    write_tekken(folder)
    # Open MPI lends a rank a terminal, where words are shown without control characters; JSON is the same everywhere.
    arguments = [folder, "-p", "Once", "--max-tokens", 12, "--temperature", 0, "--dtype", "float32", "--json"]
    check_same_words(LAUNCHER, split, "generate", *arguments)


def test_fine_tuning_under_mpirun_tells_its_result_and_its_notices_once(tmp_path):
    folder = make_folder(tmp_path / "bytes", BYTES)
    write_tekken(folder)
    data, config = tmp_path / "data.jsonl", tmp_path / "config.toml"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the bora blows", "a" * 200)))
    config.write_text(f'data = {{train = "{data}"}}\nsteps = 1\nseq_len = 64\nbatch_size = 2\n')
    out = tmp_path / "out"
    done = run("finetune", folder, "--config", config, "--out", out, "--json", launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    assert done.stderr.count("1 of 2 samples are longer than seq_len = 64") == 1
    assert (out / "adapter_model.safetensors").exists()
