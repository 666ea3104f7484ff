"""The comparison with rivals: what the driver and a worker say, what is kept, and what the table says of it."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import compare_rivals as rivals
import make_checkpoint
import protocol
import pytest
import report
from limits import least_seconds
from tiny import DENSE, make_folder

MACHINE = {
    "processor": "a processor",
    "threads": 2,
    "read_bytes_per_second": 1e9,
    "operations_per_second": {"int4": 2e12, "int8": 2e12, "bf16": 1e12},
    "commit": "abc",
}
WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from protocol import serve

class Slow:
    version, settings = "slow 1", "none"
    def __init__(self, model, weights, threads, sequences, length):
        print("a library that prints")
    @staticmethod
    def prepare(source, target, weights):
        target.write_bytes(weights.encode())
    def prefill(self, prompt):
        if len(prompt) == 512:
            sys.exit(7)
    def start(self, prompts):
        Path({started!r}).open("a").write(f"{{len(prompts)}} ")
    def step(self):
        pass

serve(Slow)
"""


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Options of a comparison whose two sides are a worker that does nothing, and dies of 512 tokens."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(rivals.RIVALS_FOLDER), started=str(tmp_path / "started")))
    monkeypatch.setattr(rivals, "script", lambda name: script)
    monkeypatch.setitem(rivals.RIVALS, rivals.OURS, rivals.Rival("native"))
    (tmp_path / "S").mkdir()
    (tmp_path / "S-bf16.gguf").touch()
    return argparse.Namespace(
        checkpoints=tmp_path,
        models=tmp_path,
        results=tmp_path / "results",
        python={"llama.cpp": sys.executable},
        threads=1,
        repeats=3,
        again=False,
    )


def test_prompts_are_the_same_in_every_environment_and_hold_no_control_token():
    assert protocol.draw_prompt(4, 0) == [27021, 24255, 13460, 8287]  # of Python 3.11
    assert min(protocol.draw_prompt(100_000, 1)) == 3
    assert max(protocol.draw_prompt(100_000, 1)) == protocol.VOCABULARY - 1


@pytest.mark.parametrize(("quiet", "started"), [(100.0, "8 8 1 1 "), (-1.0, "8 8 1 1 8 8 1 1 ")])
def test_what_is_kept_is_measured_again_only_where_others_kept_the_machine_busy(
    quiet, started, chosen, tmp_path, monkeypatch
):
    monkeypatch.setattr(rivals, "QUIET", quiet)
    book = rivals.Book(tmp_path / "rivals.json")
    for _ in range(2):
        rivals.compare("llama.cpp", "S", "int4", ["decode 8", "decode 1"], chosen, book)
    assert (tmp_path / "started").read_text() == started  # each side once a kind: the sequences then go on
    kept = json.loads((tmp_path / "rivals.json").read_text())["S int4 llama.cpp decode 8"]
    assert (len(kept["ours"]), len(kept["theirs"]), kept["version"]) == (3, 3, "slow 1")
    assert all(0 < seconds < 0.1 for seconds in kept["ours"] + kept["theirs"])


def test_a_side_that_dies_leaves_a_reason_and_the_columns_before_it(chosen, tmp_path):
    book = rivals.Book(tmp_path / "rivals.json")
    rivals.compare("llama.cpp", "S", "int4", ["decode 1", "prefill 512"], chosen, book)
    kept = json.loads((tmp_path / "rivals.json").read_text())
    assert "S int4 llama.cpp decode 1" in kept
    assert "ended with 7" in kept["S int4 llama.cpp"]["without"]


def test_a_rival_that_cannot_run_a_format_leaves_the_reason(chosen, tmp_path):
    book = rivals.Book(tmp_path / "rivals.json")
    rivals.compare("CTranslate2", "S", "int4", ["decode 1"], chosen, book)
    assert book.entries["S int4 CTranslate2"]["without"] == "none for a CPU"


def test_the_ratio_is_of_neighbours_and_losses_stand_in_the_table(tmp_path):
    entry = {"ours": [1.0, 10.0, 1.0], "theirs": [0.5, 5.0, 0.6], "version": "v", "settings": "s", "commit": "abc"}
    entry["others"] = 0.2
    dash = {"without": "it cannot", "commit": "abc"}
    entries = {"machine": MACHINE, "S int4 llama.cpp decode 8": entry, "S int4 vLLM": dash}
    report.write_report(entries, tmp_path)
    text = (tmp_path / "rivals.md").read_text()
    assert "| S int4 | decode 8 | 8.0 | " in text
    assert "| 13.3 (**0.50**†, 0.50 … 0.60) |" in text
    assert "- S int4 vLLM: it cannot" in text
    assert (tmp_path / "rivals.png").read_bytes().startswith(b"\x89PNG")


def test_our_own_side_prepares_loads_and_answers(tmp_path):
    source = make_folder(tmp_path / "source", replace(DENSE, vocab_size=protocol.VOCABULARY))
    worker = [sys.executable, str(rivals.RIVALS_FOLDER / "maestrale_worker.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*worker, "prepare", source, tmp_path / "int8", "int8"], check=True, env=environment)
    asked = [
        {"do": "load", "model": str(tmp_path / "int8"), "weights": "int8", "threads": 1, "sequences": 2, "length": 200},
        {"do": "prefill", "tokens": 40, "seed": 0},
        {"do": "decode", "sequences": 2, "steps": 3},
    ]
    lines = "".join(json.dumps(line) + "\n" for line in asked)
    done = subprocess.run(worker, input=lines, capture_output=True, text=True, check=True, env=environment)
    loaded, *answers = map(json.loads, done.stdout.splitlines())
    assert loaded["version"] == "maestrale"
    assert [answer["seconds"] > 0 for answer in answers] == [True, True]


def test_the_least_time_is_of_reading_or_of_multiplying_whichever_is_longer():
    shape = make_checkpoint.SHAPES["D"]
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    weights = 8 * layer + 32000 * 4096
    cache = protocol.CONTEXT * 8 * 2 * 8 * 128 * 2
    assert least_seconds(shape, "decode 1", "int4", MACHINE) == pytest.approx((weights * 4.5 / 8 + cache) / 1e9, 1e-3)
    slow = MACHINE | {"operations_per_second": {"int4": 1e9}}
    assert least_seconds(shape, "decode 16", "int4", slow) == pytest.approx(16 * 2 * weights / 1e9, 1e-3)
    assert least_seconds(DENSE, "prefill 512", "bf16", MACHINE) > 0


def test_the_table_of_starts_gives_each_side_its_own_figures_whatever_their_order_in_the_file(tmp_path):
    ours = {"first_token": [1.0], "load": [0.5], "peak": [2**30]}
    theirs = {"first_token": [4.0], "load": [3.0], "peak": [2**32]}
    entry = {"ours": [1.0], "theirs": [4.0], "version": "v", "settings": "s", "commit": "abc", "others": 0.0}
    entries = {"machine": MACHINE, "D int4 llama.cpp start": entry | {"both": {"llama.cpp": theirs, rivals.OURS: ours}}}
    text = report.table(entries, report.collect(entries))
    assert "| D int4 | Maestrale | 1.00 | 0.50 | 1.00 |  |" in text
    assert "| D int4 | llama.cpp | 4.00 | 3.00 | 4.00 | 4.00 |" in text
