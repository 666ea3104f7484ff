"""bench/gpu.py without a GPU: its judgements, its file, and that what it checks is right by its own checks."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gpu
from gpu_checks import CHECKS, error
from gpu_parts import Bench
from gpu_report import Report


@pytest.mark.parametrize("name", CHECKS)
def test_a_kernel_stands_the_check(name, device):
    off, allowed = CHECKS[name](device, tiny=True)
    assert off <= allowed


def test_a_row_of_small_values_is_held_to_them():
    expected = torch.tensor([[100.0, -3.0], [0.01, 0.02]])
    assert error(expected, expected) == 0
    assert error(expected + 0.01, expected) == pytest.approx(0.5)
    assert error(torch.zeros(2, 2), expected) == 1
    assert error(expected * math.nan, expected) == math.inf


def test_a_figure_stands_beside_its_limit_and_its_goal(capsys):
    report = Report({}, None)
    report.begin("7B")
    report.add("fast", 90.0, "tokens/s", limit=100.0, least=0.9)
    report.add("slow", 1.4, "times", least=1.5)
    report.add("wrong", 2.0, "error", limit=1.0, most=1)
    assert [row["met"] for row in report.rows] == [True, False, False]
    fast, slow, wrong = capsys.readouterr().out.splitlines()[-3:]
    assert all(word in fast for word in ("90.0%", ">= 0.9", "met"))
    assert all("MISSED" in line for line in (slow, wrong))


def test_a_part_that_breaks_off_keeps_its_rows_and_the_parts_before_it(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    first = Report({"device": "a"}, path)
    assert gpu.run(first, "7B", lambda: first.add("7B: engine, 1 at once", 5.0, "tokens/s"))
    second = Report({"device": "b"}, path)

    def breaks():
        second.add("half of it", 1.0, "s")
        raise RuntimeError("out of memory")

    assert not gpu.run(second, "8x7B", breaks)
    kept = json.loads(path.read_text())["parts"]
    assert [row["what"] for row in kept["8x7B"]["rows"]] == ["half of it"]
    assert kept["8x7B"]["error"] == "RuntimeError: out of memory"
    assert (kept["7B"]["device"], kept["8x7B"]["device"]) == ("a", "b")
    assert second.value("7B", "7B: engine, 1 at once") == 5.0
    assert second.value("7B", "nothing") is None


def test_a_check_that_breaks_off_or_fails_is_told_and_the_others_go_on(monkeypatch, capsys):
    def breaks(device, tiny):
        raise RuntimeError("ptxas failed")

    checks = {"bad": breaks, "off": lambda device, tiny: (2.0, 1.0), "good": lambda device, tiny: (0.5, 1.0)}
    monkeypatch.setattr("gpu_parts.CHECKS", checks)
    report = Report({}, None)
    assert not gpu.run(report, "checks", Bench(torch.device("cpu"), True, True, report).checks)
    assert [row["met"] for row in report.rows] == [False, False, True]
    assert "ptxas failed" in capsys.readouterr().out


def test_what_triton_would_stumble_over_is_said_before(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in gpu.what_is_missing(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in gpu.what_is_missing(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler" in gpu.what_is_missing(torch.device("cuda"))
