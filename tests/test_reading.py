"""Embeddings and classes against transformers' own classes on the same weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import DENSE, MIXTURE, WINDOWED, hf_model, make_folder, native_weights, tokens, write_native

from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.errors import CheckpointError, RequestError
from maestrale.reader import Reader

TEXTS = [tokens(5 + 7 * i, seed=i) for i in range(5)]
LABELS = ["no", "perhaps", "yes"]


def classifier(folder, config):
    """A random classifier in that folder, and the same in transformers."""
    base = hf_model(config)
    base.config.num_labels, base.config.pad_token_id = 3, 0
    kind = "Mixtral" if config.moe else "Mistral"
    theirs = getattr(transformers, f"{kind}ForSequenceClassification")(base.config).eval()
    theirs.model.load_state_dict(base.model.state_dict())
    torch.nn.init.normal_(theirs.score.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    write_native(folder, config, native_weights(base, config))
    (folder / "classifier.json").write_text(json.dumps({"labels": LABELS}))
    save_file({"score.weight": theirs.score.weight.data.clone()}, folder / "classifier.safetensors")
    return folder, theirs


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("config", [DENSE, WINDOWED, MIXTURE], ids=["dense", "windowed", "mixture"])
@pytest.mark.parametrize("chunk", [16, 64], ids=["in chunks", "two at once"])
def test_scores_are_those_of_transformers_sequence_classification(config, backend, chunk, tmp_path):
    folder, theirs = classifier(tmp_path / "m", config)
    reader = Reader(folder, classes=True, max_len=64, max_batch_tokens=chunk, backend=backend)
    for ids, scores, shares in zip(TEXTS, reader.scores(TEXTS), reader.classify(TEXTS), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert next(iter(shares)) == LABELS[int(expected.argmax())]
        np.testing.assert_allclose([shares[label] for label in LABELS], expected.softmax(0), atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "error"),
    [(["native"], 1e-5), (["hf"], 1e-5), (["hf", "native"], 1e-5), (["int8"], 0.02), (["hf", "int4", "native"], 0.06)],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_classifier_keeps_its_classes_in_every_folder_it_is_turned_into(steps, error, tmp_path):
    folder, theirs = classifier(tmp_path / "m", DENSE)
    head = [(folder / name).read_bytes() for name in ("classifier.json", "classifier.safetensors")]
    for i, step in enumerate(steps):
        source, folder = folder, tmp_path / str(i)
        if step in ("native", "hf"):
            convert(source, folder, to=step)
        else:
            quantize(source, folder, Recipe(step), round_to_nearest)
    assert [(folder / name).read_bytes() for name in ("classifier.json", "classifier.safetensors")] == head
    reader = Reader(folder, classes=True, max_len=64)
    assert reader.labels == tuple(LABELS)
    for ids, scores in zip(TEXTS, reader.scores(TEXTS), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(scores, expected, atol=error)


def test_a_damaged_classifier_is_turned_into_nothing(tmp_path):
    folder, _ = classifier(tmp_path / "m", DENSE)
    (folder / "classifier.safetensors").unlink()
    for write in (
        lambda: convert(folder, tmp_path / "hf", to="hf"),
        lambda: quantize(folder, tmp_path / "q", Recipe("int8"), round_to_nearest),
    ):
        with pytest.raises(CheckpointError, match=r"classifier\.safetensors"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("config", [WINDOWED, MIXTURE], ids=["windowed", "mixture"])
@pytest.mark.parametrize("chunk", [16, 64], ids=["in chunks", "two at once"])
def test_an_embedding_is_the_mean_of_transformers_last_hidden_states(config, backend, chunk, tmp_path):
    base = hf_model(config)
    folder = write_native(tmp_path, config, native_weights(base, config))
    reader = Reader(folder, max_len=64, max_batch_tokens=chunk, backend=backend)
    assert reader.embed([]) == []
    for ids, vector in zip(TEXTS, reader.embed(TEXTS), strict=True):
        with torch.no_grad():
            expected = base.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_what_it_was_not_opened_for_is_refused(tmp_path):
    folder = make_folder(tmp_path, DENSE)
    with pytest.raises(CheckpointError, match=r"no classifier; expected classifier\.json"):
        Reader(folder, classes=True)
    with pytest.raises(RequestError, match="opened for embeddings"):
        Reader(folder, max_len=64).classify(TEXTS)
    with pytest.raises(RequestError, match="a text of 65 tokens: expected 1 to 64"):
        Reader(folder, max_len=64).embed([TEXTS[0], [1] * 65])


def test_one_text_is_a_list_of_one():
    reader = Reader("stories")
    np.testing.assert_array_equal(reader.embed("Once"), reader.embed(["Once"]))


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        (["one"], (1, 32), "expected a list of two texts or more"),
        ("yes", (2, 32), "expected a list of two texts or more"),
        (LABELS, (2, 32), r"score\.weight: expected \(3, dim\), got F32 \(2, 32\)"),
        (LABELS, (3,), r"score\.weight: expected \(3, dim\), got F32 \(3,\)"),
        (LABELS, (3, 16), r"classifier\.safetensors: expected rows of dim = 32, got 16"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(labels, shape, message, tmp_path):
    folder = make_folder(tmp_path, DENSE)
    (folder / "classifier.json").write_text(json.dumps({"labels": labels}))
    save_file({"score.weight": torch.zeros(shape)}, folder / "classifier.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Reader(folder, classes=True)
