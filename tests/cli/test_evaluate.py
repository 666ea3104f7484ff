import json
import math

import pytest
import torch
from byte_models import byte_ids
from tiny import hf_logits

from maestrale.cli.evaluate import cut

TEXT = "The maestrale blows from the north-west, cold and dry; è il re dei venti. " * 3


def logprobs(model, ids):
    """Natural logprob of each id but the first, all given what stands before it."""
    rows = hf_logits(model, ids).double().log_softmax(-1)
    return rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()


def evaluated(command, model, file, *args):
    run = command("eval", file, "--model", model, "--dtype", "float32", "--json", *args)
    assert (run.code, run.err) == (0, "")
    return json.loads(run.out)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["dense", "windowed", "mixed"])
def test_loss_is_that_of_transformers(command, models, references, file, name):
    scored = logprobs(references[name], byte_ids(TEXT))
    found = evaluated(command, models[name], file)
    nats = -sum(scored)
    assert found["tokens"] == len(scored)
    assert found["bytes"] == len(TEXT.encode())
    assert found["nats_per_token"] == pytest.approx(nats / len(scored), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(scored)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_windows_everywhere_read_beyond_the_models_context_in_one_go(command, models, references, tmp_path):
    long = TEXT * 4
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    assert len(byte_ids(long)) > 512  # max_position_embeddings in params.json
    scored = logprobs(references["windowed"], byte_ids(long))
    found = evaluated(command, models["windowed"], tmp_path / "long.txt", "--max-batch-tokens", 50)
    assert found["nats_per_token"] == pytest.approx(-sum(scored) / len(scored), rel=1e-5)


def test_a_text_over_the_context_is_read_in_overlapping_segments(command, models, references, file):
    ids, context, stride = byte_ids(TEXT), 48, 20
    scored = logprobs(references["dense"], ids[:context])
    while len(scored) < len(ids) - 1:
        end = min(len(scored) + 1 + stride, len(ids))
        scored += logprobs(references["dense"], ids[end - context : end])[len(scored) + 1 - end :]
    found = evaluated(command, models["dense"], file, "--max-len", context, "--stride", stride)
    assert found["tokens"] == len(ids) - 1
    assert found["nats_per_token"] == pytest.approx(-sum(scored) / len(scored), rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 14, 15, 100])
@pytest.mark.parametrize("stride", [1, 5, 9])
def test_segments_score_every_id_but_the_first_exactly_once(length, stride):
    ids = list(range(length))
    segments = list(cut(ids, 10, stride))
    assert [i for segment in segments for i in segment.ids[segment.given :]] == ids[1:]
    assert all(segment.given > 0 and len(segment.ids) <= 10 for segment in segments)
    assert all(segment.given >= 10 - stride for segment in segments[1:])


def test_documents_are_texts_of_their_own(command, models, references, tmp_path):
    documents = ["One wind.", "Another\n\nwind.", "\nA third."]
    (tmp_path / "d.txt").write_text("\n\n\n".join(documents) + "\n\n\n")
    scored = [p for text in documents for p in logprobs(references["dense"], byte_ids(text))]
    found = evaluated(command, models["dense"], tmp_path / "d.txt", "--documents")
    assert found["tokens"] == len(scored)
    assert found["bytes"] == sum(len(text) for text in documents)
    assert found["nats_per_token"] == pytest.approx(-sum(scored) / len(scored), rel=1e-5)


def test_text_output_is_one_line(command, models):
    run = command("eval", "-", "--model", models["dense"], stdin="maestrale")
    assert (run.code, run.err, run.out.count("\n")) == (0, "", 1)
    assert "9 tokens, 9 bytes" in run.out
    assert "perplexity" in run.out


@pytest.mark.parametrize(
    ("content", "args", "word"),
    [
        (b"", [], "no text"),
        (b"\n\n\n", ["--documents"], "no text"),
        (b"abc\xff", [], "byte 3"),
        (b"abc", ["--stride", 0], "--stride"),
        (b"abc", ["--max-len", 8, "--stride", 8], "--stride"),
        (b"abc", ["--max-len", 1], "--max-len"),
    ],
)
def test_what_cannot_be_scored_is_a_usage_error(command, models, tmp_path, content, args, word):
    (tmp_path / "x.txt").write_bytes(content)
    run = command("eval", tmp_path / "x.txt", "--model", models["dense"], *args)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert word in run.err
    assert command("eval", tmp_path / "absent.txt", "--model", models["dense"]).code == 2
