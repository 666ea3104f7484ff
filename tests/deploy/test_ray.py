"""`deploy/ray_serve.py` on a Ray cluster of two nodes on this machine. Ray lives in an environment of its own, `ray`
under the folder that MAESTRALE_CLIENTS names, made by  python -m venv FOLDER/ray && FOLDER/ray/bin/pip install
'ray[serve]' httpx psutil."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serve.live import BYTES
from tiny import make_folder, write_tekken

ROOM = os.environ.get("MAESTRALE_CLIENTS")
PYTHON = Path(ROOM or "/nowhere") / "ray" / "bin" / "python"
SOURCE = Path(__file__).parents[2] / "src"
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What clients saw, as ray_cluster.py tells it."""
    if not PYTHON.exists():
        pytest.skip("no environment with Ray: MAESTRALE_CLIENTS names no folder that has one")
    folder = make_folder(tmp_path_factory.mktemp("ray") / "bytes", BYTES)
    write_tekken(folder)
    done = subprocess.run(
        [PYTHON, Path(__file__).parent / "ray_cluster.py", folder, sys.executable],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # Ray prints too


def test_no_accepted_request_is_lost_when_a_replica_is_killed_under_load(seen):
    assert seen["replicas"] == 2
    assert seen["open_at_kill"] == 16  # else it would prove nothing
    assert seen["whole"] == [[200, text] for text in seen["alone"]]


def test_a_stream_that_has_begun_ends_with_an_error_event_and_the_others_go_on(seen):
    ends = [end for _, end in seen["streamed"]]
    assert set(ends) == {"done", "replica_lost"}
    for (text, end), whole in zip(seen["streamed"], seen["alone"], strict=True):
        assert text == whole if end == "done" else whole.startswith(text)


def test_another_replica_takes_its_place(seen):
    assert seen["replicas_after"] == 2


def test_prompts_that_begin_alike_meet_the_cache_of_one_replica(seen):
    assert seen["found"] > 0.9 * seen["length"]  # bytes are tokens here; a page's end is computed again
