"""`maestrale embed` and `maestrale classify`."""

import json

import numpy as np
import pytest
import torch
from byte_models import byte_ids
from safetensors.torch import save_file


@pytest.fixture
def classifier(models, tmp_path):
    for path in models["dense"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "classifier.json").write_text(json.dumps({"labels": ["a", "b"]}))
    save_file({"score.weight": torch.randn(2, 32)}, tmp_path / "classifier.safetensors")
    return tmp_path


def test_embeddings_are_lines_of_json_and_those_of_the_model(command, models, references, tmp_path):
    (tmp_path / "t.jsonl").write_text('"one"\n\n{"text": "two"}\n')
    done = command("embed", models["dense"], "-t", "zero", "--texts", tmp_path / "t.jsonl")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["text"] for line in lines] == ["zero", "one", "two"]
    for line in lines:
        with torch.no_grad():
            hidden = references["dense"].model(torch.tensor([byte_ids(line["text"])])).last_hidden_state[0]
        np.testing.assert_allclose(line["embedding"], hidden.mean(0), atol=1e-5)


def test_classes_are_told_with_their_probabilities(command, classifier):
    one = json.loads(command("classify", classifier, "-t", "a fox", "--json").out)
    assert one["label"] == max(one["probabilities"], key=one["probabilities"].get)
    assert sum(one["probabilities"].values()) == pytest.approx(1)
    assert command("classify", classifier, "-t", "a\nfox").out.startswith(f"{one['label']} 0.")


def test_what_is_missing_is_told_in_a_line(command, models, tmp_path):
    (tmp_path / "t.jsonl").write_text("{}\n")
    for code, arguments in (
        (3, ("classify", models["dense"], "-t", "x")),
        (2, ("embed", models["dense"])),
        (2, ("embed", models["dense"], "--texts", tmp_path / "t.jsonl")),
    ):
        done = command(*arguments)
        assert (done.code, done.err.count("\n")) == (code, 1)
