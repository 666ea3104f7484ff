"""The classifier notebook runs from top to bottom, and what it shows is so."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from kinds import WORDINGS, sentences
from run_notebook import run

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_held_out_sentences_share_no_wording_and_no_thing_with_those_learnt_from():
    train, heldout = sentences(20, False, 0), sentences(20, True, 1)
    assert not {one["text"] for one in train} & {one["text"] for one in heldout}
    assert all(not set(learnt) & set(held) for learnt, held in WORDINGS.values())
    for part in (train, heldout):
        assert {kind: sum(one["label"] == kind for one in part) for kind in WORDINGS} == dict.fromkeys(WORDINGS, 20)


def test_the_notebook_runs_and_its_classifiers_do_better_than_guessing(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra train")
    monkeypatch.chdir(EXAMPLES.parent)
    notebook = json.loads((EXAMPLES / "classifier.ipynb").read_text(encoding="utf-8"))
    right = run(notebook)["right"]
    assert right["embeddings"] > right["guessing"] + 0.25
    assert right["fine-tuned"] > right["guessing"] + 0.25
    drawn = [out for cell in notebook["cells"] for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(drawn) == 2
