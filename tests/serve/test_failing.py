"""Faults 65 and 66: a model that fails in a step, or gives what is no number."""

import pytest
import torch
from live import LONG, Live, open_request, read_all, read_events
from safetensors.torch import load_file, save_file
from tiny import write_tekken

FAILING = """
from maestrale.torch_backend import runner
from maestrale.errors import MemoryLimitError
whole = runner.TorchRunner.step  # the server is told to take this backend
def step(self, batch):
    if (batch.token_ids == 32 + ord("#")).any():
        short = (batch.token_ids == 32 + ord("!")).any()
        raise MemoryLimitError("out of memory: 99 GiB") if short else ValueError("broken")
    return whole(self, batch)
runner.TorchRunner.step = step
from maestrale.cli import main
main()
"""


@pytest.mark.parametrize(("prompt", "code"), [("one #", None), ("one #!", "out_of_memory")])
def test_a_step_that_breaks_off_fails_its_request_and_the_server_goes_on(start, prompt, code):
    server = start("--backend", "torch", program=("-c", FAILING))
    answer = server.complete(prompt)
    assert (answer.status, answer.error["type"], answer.error["code"]) == (500, "server_error", code)
    events = server.complete(prompt, stream=True).events
    assert [event["error"]["type"] for event in events] == ["server_error"]
    assert server.complete("one").status == 200
    assert server.pages_used() == 0
    assert any("ValueError: broken" in line or "99 GiB" in line for line in server.log)


@pytest.fixture(scope="module")
def nan_folder(bytes_folder, tmp_path_factory):
    """The tiny model, but whoever reads a "~" gets NaN."""
    folder = tmp_path_factory.mktemp("nan") / "nan"
    folder.mkdir()
    (folder / "params.json").write_bytes((bytes_folder / "params.json").read_bytes())
    write_tekken(folder)
    weights = load_file(bytes_folder / "consolidated.safetensors")
    weights["tok_embeddings.weight"][32 + ord("~")] = torch.nan
    save_file(weights, folder / "consolidated.safetensors")
    return folder


def test_logits_that_are_nan_fail_their_request_alone(nan_folder, start):
    server = Live(nan_folder)
    try:
        beside = open_request(server, "/v1/completions", LONG | {"stream": True, "max_tokens": 500})
        answer = server.complete("a ~")
        assert (answer.status, answer.error["code"]) == (500, "model_error")
        assert "nan" in answer.error["message"]
        (event,) = server.complete("a ~", stream=True).events
        assert event["error"]["code"] == "model_error"
        assert server.metric("maestrale_requests_total", outcome="error") == 2
        assert read_events(read_all(beside))[-1]["choices"][0]["finish_reason"] == "length"
        beside.close()
    finally:
        server.close()
